// fetch through the proxy that the environment names (HTTPS_PROXY, HTTP_PROXY, NO_PROXY, in either case), as curl and
// Python's libraries take it. Node's own fetch does so from version 24 alone, and only where it was started with a flag.
// Each request is a tunnel of its own (CONNECT): a download is one long answer, so there is nothing to reuse.
import http from 'node:http';
import https from 'node:https';
import type { Socket } from 'node:net';
import { Readable } from 'node:stream';
import { connect as connectTls } from 'node:tls';
import { UserError } from './errors.ts';

const mostRedirects = 10;

/** How long a connection may be silent, in milliseconds: as long as fetch waits. */
const patience = 300_000;

const stalled = (wait: number): Error => new Error(`nothing came for ${wait / 1000} s`);

/** The proxy for `url`; undefined where it is reached directly. */
function proxyFor(url: URL): URL | undefined {
  const variable = (name: string) => process.env[name.toLowerCase()] || process.env[name.toUpperCase()];
  const name = url.protocol === 'https:' ? 'https_proxy' : 'http_proxy';
  const proxy = variable(name) || variable('all_proxy');
  if (!proxy || isDirect(url, variable('no_proxy') ?? '')) return undefined;
  const address = /^[a-z][a-z0-9+.-]*:\/\//i.test(proxy) ? proxy : `http://${proxy}`;
  if (!URL.canParse(address) || !/^https?:\/\//i.test(address))
    throw new UserError(`${name.toUpperCase()} is "${proxy}": give the address of an HTTP proxy`);
  return new URL(address);
}

/** NO_PROXY lists hosts, each with its subdomains, perhaps with a port; `*` is all of them. */
function isDirect({ hostname, port, protocol }: URL, list: string): boolean {
  const hostPort = `${hostname}:${port || (protocol === 'https:' ? 443 : 80)}`;
  return list
    .split(',')
    .map((entry) => entry.trim().replace(/^\*?\./, ''))
    .some((entry) => {
      if (!entry) return false;
      const host = /:\d+$/.test(entry) ? hostPort : hostname;
      return entry === '*' || host === entry || host.endsWith(`.${entry}`);
    });
}

/** A GET as fetch makes it, redirects followed, through the proxy where there is one. */
export async function fetchOf(
  address: string,
  headers: Record<string, string>,
  wait = patience,
): Promise<Response> {
  let url = new URL(address);
  let sent = headers;
  for (let turn = 0; turn < mostRedirects; turn++) {
    const proxy = proxyFor(url);
    if (!proxy) return fetch(url, { headers: sent });
    const answer = await get(url, sent, proxy, wait);
    const { statusCode = 0, headers: received } = answer;
    const location = received.location;
    if (statusCode < 300 || statusCode >= 400 || !location) return asResponse(answer);
    answer.destroy();
    const next = new URL(location, url);
    // As fetch does: a token is for the host that it was meant for.
    if (next.origin !== url.origin)
      sent = Object.fromEntries(Object.entries(sent).filter(([name]) => name !== 'authorization'));
    url = next;
  }
  throw new Error(`more than ${mostRedirects} redirects`);
}

async function get(
  url: URL,
  headers: Record<string, string>,
  proxy: URL,
  wait: number,
): Promise<http.IncomingMessage> {
  const socket = await tunnel(url, proxy, wait);
  const secure = url.protocol === 'https:';
  const createConnection = () => (secure ? connectTls({ socket, servername: url.hostname }) : socket);
  // Without it Node would write the port as well, and a signed address may hold for the bare host alone.
  const all = { host: url.host, ...headers };
  return new Promise((resolve, reject) => {
    const request = (secure ? https : http).get(url, { headers: all, createConnection });
    let answer: http.IncomingMessage | undefined;
    request.on('response', (begun) => resolve((answer = begun)));
    request.on('error', reject);
    request.setTimeout(wait, () => (answer ?? request).destroy(stalled(wait)));
  });
}

/** A connection to `url`'s host that the proxy has made. */
function tunnel(url: URL, proxy: URL, wait: number): Promise<Socket> {
  const path = `${url.hostname}:${url.port || (url.protocol === 'https:' ? 443 : 80)}`;
  const account = [proxy.username, proxy.password].map(decodeURIComponent).join(':');
  const login = `Basic ${Buffer.from(account).toString('base64')}`;
  const headers = proxy.username ? { host: path, 'proxy-authorization': login } : { host: path };
  const host = proxy.hostname.replace(/^\[(.+)\]$/, '$1'); // an IPv6 address stands in brackets in URLs alone
  return new Promise((resolve, reject) => {
    const { request } = proxy.protocol === 'https:' ? https : http;
    const asked = request({ host, port: proxy.port, method: 'CONNECT', path, headers, agent: false });
    asked
      .setTimeout(wait, () => asked.destroy(stalled(wait)))
      .on('connect', ({ statusCode }, socket) => {
        if (statusCode === 200) return resolve(socket);
        socket.destroy();
        reject(new Error(`the proxy ${proxy.host} answers ${statusCode}`));
      })
      .on('error', (error: NodeJS.ErrnoException) =>
        reject(new Error(`the proxy ${proxy.host}: ${error.code ?? error.message}`)),
      )
      .end();
  });
}

function asResponse(answer: http.IncomingMessage): Response {
  const headers = Object.entries(answer.headersDistinct).flatMap(([name, values = []]) =>
    values.map((value): [string, string] => [name, value]),
  );
  const empty = answer.statusCode === 204 || answer.statusCode === 304;
  const body = empty ? null : (Readable.toWeb(answer) as ReadableStream<Uint8Array>);
  return new Response(body, { status: answer.statusCode, headers });
}
