// HTTP around the routes of `sdxl serve`: who may ask, how much and how long they may send, and what an error looks like. Node's own
// server: there are a dozen fixed paths, and nothing of a framework would be used.
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { UserError } from '../../io/errors.ts';
import { isDeeper, isRecord } from '../../io/json.ts';
import { inOneLine } from '../terminal.ts';
import { limitConnections } from './connections.ts';
import { type Rules, refusal } from './guard.ts';

/** A picture of 16 megapixels in base64, with room. */
const MOST_BYTES = 32e6;
/** Of lists and objects in each other. */
const MOST_DEPTH = 32;

/** An answer with another status than that of a mistake in what was asked (400). */
export class Refusal extends Error {
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

export interface HttpRequest {
  url: URL;
  /** The body's JSON object. @throws Refusal, UserError */
  json(): Promise<Record<string, unknown>>;
  /** The body's form (multipart). @throws the same */
  form(): Promise<FormData>;
  /** Aborted when who has asked is gone. */
  signal: AbortSignal;
}

/** JSON, a page, or events as they come (server-sent), each a JSON object under its name. */
export type Reply =
  | { json: unknown }
  | { html: string }
  | { events(send: (event: string, data: unknown) => void): Promise<void> };

/** By `METHOD /path`. */
export type Routes = Readonly<Record<string, (asked: HttpRequest) => Reply | Promise<Reply>>>;

export interface HttpOptions extends Rules {
  /** Routes that need no key, as they tell nothing and do nothing. */
  keyless: readonly string[];
  /** Hears of errors that are bugs. */
  onBug(error: unknown): void;
}

export function httpServer(routes: Routes, options: HttpOptions): Server {
  // A slow client holds its connection up, not the server: ten seconds for the header, a minute for the body.
  const limits = { headersTimeout: 10_000, requestTimeout: 60_000, connectionsCheckingInterval: 2_000 };
  const server = createServer(limits, (request, response) => void answer(request, response, routes, options));
  limitConnections(server);
  return server;
}

async function answer(
  request: IncomingMessage,
  response: ServerResponse,
  routes: Routes,
  options: HttpOptions,
): Promise<void> {
  response.setHeader('X-Content-Type-Options', 'nosniff');
  response.setHeader('Cache-Control', 'no-store');
  const gone = new AbortController();
  response.on('close', () => {
    if (!response.writableEnded) gone.abort(new Refusal(499, 'who asked is gone'));
  });
  try {
    const { url, path } = targetOf(request);
    const name = `${request.method} ${path}`;
    allow(request, response, name, options);
    if (request.method === 'OPTIONS') return void response.writeHead(204).end();
    const route = Object.hasOwn(routes, name) ? routes[name] : undefined;
    if (!route) throw notThere(path, routes);
    const reply = await route({
      url,
      json: () => jsonOf(request),
      form: () => formOf(request),
      signal: gone.signal,
    });
    await write(response, reply);
  } catch (error) {
    failed(request, response, error, options);
  }
}

/** What is asked for, and its path decoded. Two slashes at its begin are a path here, though a browser would read a host. @throws UserError */
function targetOf({ url: target = '/' }: IncomingMessage): { url: URL; path: string } {
  try {
    const url = new URL(target.startsWith('/') ? `http://localhost${target}` : target, 'http://localhost');
    return { url, path: decodeURIComponent(url.pathname) };
  } catch {
    throw new UserError('the path that is asked for is none');
  }
}

/** @throws Refusal for those who may not ask */
function allow(request: IncomingMessage, response: ServerResponse, name: string, options: HttpOptions): void {
  const { origin } = request.headers;
  if (origin !== undefined && options.origins.includes(origin)) {
    response.setHeader('Access-Control-Allow-Origin', origin);
    const asked = request.headers['access-control-request-headers'];
    response.setHeader('Access-Control-Allow-Headers', asked ?? 'authorization, content-type');
    response.setHeader('Access-Control-Allow-Methods', 'GET, POST');
    response.setHeader('Vary', 'Origin');
  }
  const refused = refusal(request, options, request.method === 'OPTIONS' || options.keyless.includes(name));
  if (!refused) return;
  if (refused[0] === 401) response.setHeader('WWW-Authenticate', 'Bearer, Basic realm="sdxl"');
  throw new Refusal(...refused);
}

function notThere(path: string, routes: Routes): Refusal {
  const methods = Object.keys(routes)
    .filter((name) => name.endsWith(` ${path}`))
    .map((name) => name.split(' ')[0]);
  return methods.length > 0
    ? new Refusal(405, `${path} takes ${methods.join(' and ')}`)
    : new Refusal(404, `there is no ${path} here`);
}

async function bytesOf(request: IncomingMessage): Promise<Buffer> {
  const tooMuch = new Refusal(
    413,
    `a request of more than ${MOST_BYTES / 1e6} MB is not read; send smaller pictures`,
  );
  if (Number(request.headers['content-length'] ?? 0) > MOST_BYTES) throw tooMuch;
  const parts: Buffer[] = [];
  let size = 0;
  try {
    for await (const part of request) {
      size += part.length;
      if (size > MOST_BYTES) throw tooMuch;
      parts.push(part);
    }
  } catch (error) {
    throw error === tooMuch ? tooMuch : new Refusal(400, 'the connection ended before the body did');
  }
  return Buffer.concat(parts);
}

async function jsonOf(request: IncomingMessage): Promise<Record<string, unknown>> {
  const { 'content-type': type, origin, 'sec-fetch-site': site } = request.headers;
  // A page's form cannot send this type without asking first (CORS). A program, such as Dify, may send none; a page says that it is one.
  const isProgram = origin === undefined && site === undefined;
  if (!/^application\/json\b/i.test(type ?? (isProgram ? 'application/json' : '')))
    throw new Refusal(415, 'send JSON, with Content-Type: application/json');
  let value: unknown;
  try {
    value = JSON.parse((await bytesOf(request)).toString());
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new UserError(`the body is no JSON: ${error.message}`);
  }
  if (!isRecord(value))
    throw new UserError('the body is no JSON object; send one such as {"prompt": "a red fox"}');
  if (isDeeper(value, MOST_DEPTH))
    throw new UserError(`the body has lists or objects more than ${MOST_DEPTH} deep; no key takes such`);
  return value;
}

async function formOf(request: IncomingMessage): Promise<FormData> {
  const type = request.headers['content-type'] ?? '';
  if (!/^multipart\/form-data\b/i.test(type))
    throw new Refusal(415, 'send a form, with Content-Type: multipart/form-data');
  const body = await bytesOf(request);
  try {
    return await new Response(body, { headers: { 'content-type': type } }).formData();
  } catch (error) {
    throw new UserError(`the body is no form: ${(error as Error).message}`);
  }
}

async function write(response: ServerResponse, reply: Reply): Promise<void> {
  if ('json' in reply) return sendJson(response, 200, reply.json);
  if ('html' in reply) {
    // The page is its own and loads nothing from elsewhere.
    response.setHeader(
      'Content-Security-Policy',
      "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; frame-ancestors 'none'",
    );
    response.writeHead(200, { 'Content-Type': 'text/html; charset=utf-8' }).end(reply.html);
    return;
  }
  const send = (event: string, data: unknown): void => {
    // nginx would keep events until the answer ends.
    if (!response.headersSent)
      response.writeHead(200, { 'Content-Type': 'text/event-stream', 'X-Accel-Buffering': 'no' });
    response.write(`event: ${event}\ndata: ${JSON.stringify(data)}\n\n`);
  };
  await reply.events(send);
  response.end();
}

function sendJson(response: ServerResponse, status: number, value: unknown): void {
  const body = Buffer.from(JSON.stringify(value));
  response.writeHead(status, { 'Content-Type': 'application/json', 'Content-Length': body.length });
  response.end(body);
}

/** An error as both OpenAI's and A1111's clients read one. */
const errorOf = (status: number, message: string) => ({
  error: { message, type: status < 500 ? 'invalid_request_error' : 'server_error', code: status },
  detail: message,
});

function failed(
  request: IncomingMessage,
  response: ServerResponse,
  error: unknown,
  { onBug }: HttpOptions,
): void {
  const known = error instanceof UserError || error instanceof Refusal;
  const status = error instanceof Refusal ? error.status : known ? 400 : 500;
  if (!known) onBug(error);
  const told = errorOf(
    status,
    known ? inOneLine(error.message) : 'the server failed; its own output says how',
  );
  if (response.destroyed) return;
  if (response.headersSent) {
    response.end(`event: error\ndata: ${JSON.stringify(told)}\n\n`);
    return;
  }
  // What is still to come of a body that nobody reads ends with the connection.
  if (!request.complete) response.setHeader('Connection', 'close');
  sendJson(response, status, told);
}
