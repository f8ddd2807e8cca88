// HTTP around `sdxl serve` without a model: who is let in, what is read of a body, and the order of a queue.
import { once } from 'node:events';
import { Agent, type IncomingMessage, request } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { type Test, test } from 'tap';
import { type Drawer, openDrawer } from '../../cli/serve/drawer_process.ts';
import { isLoopback, type Rules, refusal } from '../../cli/serve/guard.ts';
import {
  type HttpOptions,
  type HttpRequest,
  httpServer,
  type Reply,
  type Routes,
} from '../../cli/serve/http.ts';
import type { Order, Standing } from '../../cli/serve/messages.ts';
import { openQueue } from '../../cli/serve/queue.ts';

type Headers = Record<string, string>;
const own = 'localhost:7860';

/** The status that a request is refused with, 0 where it is let in. */
const status = (headers: Headers, rules: Partial<Rules> = {}, method = 'POST', keyless = false): number =>
  refusal(
    { headers: { host: own, ...headers }, method } as unknown as IncomingMessage,
    { origins: [], ...rules },
    keyless,
  )?.[0] ?? 0;

test('programs of this machine and its own page are let in', (t) => {
  const let_in: [Headers, Partial<Rules>?, string?, boolean?][] = [
    [{}],
    [{ host: '127.0.0.1:7860' }],
    [{ host: '127.0.0.1' }],
    [{ host: '[::1]:7860' }],
    [{ host: 'localhost' }],
    [{ host: 'LocalHost:7860' }],
    [{ origin: `http://${own}`, 'sec-fetch-site': 'same-origin' }],
    [{ 'sec-fetch-site': 'none', 'sec-fetch-mode': 'navigate' }, {}, 'GET'],
    [{ 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'navigate' }, {}, 'GET'], // a link to the page
    [{ origin: 'https://example.org', 'sec-fetch-site': 'cross-site' }, { origins: ['https://example.org'] }],
    [{ authorization: 'Bearer secret-key' }, { key: 'secret-key' }],
    [{ authorization: `Basic ${Buffer.from('me:secret-key').toString('base64')}` }, { key: 'secret-key' }],
    [{ authorization: 'Bearer secret-key', host: 'gpu.lan:7860' }, { key: 'secret-key' }],
    [{ host: 'gpu.lan' }, { key: 'secret-key' }, 'GET', true],
  ];
  for (const [headers, rules, method, keyless] of let_in)
    t.equal(status(headers, rules, method, keyless), 0, JSON.stringify([headers, rules]));
  t.end();
});

test('pages of other sites, other names of this machine and wrong keys are not', (t) => {
  const key = 'secret-key';
  const basic = (text: string) => `Basic ${Buffer.from(text).toString('base64')}`;
  const refused: [number, Headers, Partial<Rules>?, string?][] = [
    // DNS rebinding: a name of the page's own that leads here.
    ...[
      'evil.example',
      'evil.example:7860',
      'localhost.evil.example',
      '127.0.0.1.evil.example',
      '192.168.1.5',
      '0.0.0.0',
      '',
      '[::2]',
      'localhost:80:80',
      '127.evil.example',
    ].map((host): [number, Headers] => [403, { host }]),
    // Another page's script or form.
    ...[
      'http://evil.example',
      'null',
      'https://localhost:7860',
      'http://localhost:8080',
      'http://localhost',
      'file://',
      'http://127.0.0.1:7860',
    ].map((origin): [number, Headers] => [403, { origin }]),
    [403, { origin: 'http://evil.example' }, { origins: ['https://example.org'] }],
    [403, { origin: 'https://example.org.evil' }, { origins: ['https://example.org'] }],
    [403, { origin: 'http://evil.example', authorization: `Bearer ${key}` }, { key }],
    // A picture or a frame of another page, which has no origin.
    ...['cross-site', 'same-site'].map((site): [number, Headers] => [403, { 'sec-fetch-site': site }]),
    [403, { 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'no-cors' }, {}, 'GET'],
    [403, { 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'navigate' }, {}, 'POST'],
    ...[
      '',
      'Bearer',
      'Bearer ',
      'Bearer secret-kez',
      'Bearer secret-key2',
      'secret-key',
      'Token secret-key',
      basic('secret-key'),
      basic('secret-key:'),
      basic(':secret'),
    ].map((authorization): [number, Headers, Partial<Rules>] => [401, { authorization }, { key }]),
  ];
  t.ok(refused.length >= 30);
  for (const [want, headers, rules, method] of refused)
    t.equal(status(headers, rules, method), want, JSON.stringify([headers, rules]));
  t.end();
});

test('what is an address of this machine alone', (t) => {
  for (const host of ['127.0.0.1', '127.8.9.1', '::1', 'localhost']) t.ok(isLoopback(host), host);
  for (const host of ['0.0.0.0', '::', '10.0.0.1', '127.0.0.1.evil.example', '127.1', ''])
    t.notOk(isLoopback(host), host);
  t.end();
});

/** A server of `routes`, with its address; closed with the test. */
async function opened(t: Test, routes: Routes, rules: Partial<HttpOptions> = {}): Promise<string> {
  const server = httpServer(routes, {
    origins: [],
    keyless: [],
    onBug() {},
    ...rules,
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  t.teardown(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

test('a body that is not what was asked for is told of', async (t) => {
  const url = await opened(t, {
    'POST /json': async ({ json }) => ({ json: await json() }),
    'POST /form': async ({ form }) => ({ json: [...(await form()).keys()] }),
    'GET /page': () => ({ html: '<p>' }),
    'POST /bug': () => {
      throw new TypeError('inner workings');
    },
  });
  const json = { 'Content-Type': 'application/json' };
  const said = async (path: string, init: RequestInit): Promise<[number, string]> => {
    const response = await fetch(url + path, init);
    const { error, detail } = (await response.json()) as { error: { message: string }; detail: string };
    t.equal(error.message, detail, 'for clients of both kinds');
    return [response.status, detail];
  };
  const deep = `{"a": ${'['.repeat(1e5)}${']'.repeat(1e5)}}`;
  const cases: [number, RegExp, string, RequestInit][] = [
    [404, /there is no \/nowhere/, '/nowhere', {}],
    [404, /there is no/, '/../../etc/passwd', {}],
    [404, /there is no/, '/__proto__', {}],
    [404, /there is no \/\/json here/, '//json', {}],
    [400, /the path that is asked for is none/, '/%ff', {}],
    [405, /\/json takes POST/, '/json', {}],
    [415, /send JSON/, '/json', { method: 'POST', body: '{}', headers: { 'Content-Type': 'text/plain' } }],
    [415, /send JSON/, '/json', { method: 'POST', body: Buffer.from('{}'), headers: { Origin: url } }],
    [400, /no JSON: /, '/json', { method: 'POST' }],
    [400, /no JSON: /, '/json', { method: 'POST', body: '{"a":', headers: json }],
    [400, /no JSON object/, '/json', { method: 'POST', body: '[1]', headers: json }],
    [400, /no JSON object/, '/json', { method: 'POST', body: 'null', headers: json }],
    [400, /more than 32 deep/, '/json', { method: 'POST', body: deep, headers: json }],
    [415, /send a form/, '/form', { method: 'POST', body: '{}', headers: json }],
    [
      400,
      /no form/,
      '/form',
      { method: 'POST', body: 'x', headers: { 'Content-Type': 'multipart/form-data; boundary=b' } },
    ],
    [413, /more than 32 MB/, '/json', { method: 'POST', body: Buffer.alloc(33e6, 32), headers: json }],
    [500, /its own output says/, '/bug', { method: 'POST' }],
  ];
  for (const [want, sentence, path, init] of cases) {
    const [status, message] = await said(path, init);
    t.equal(status, want, `${path}: ${message}`);
    t.match(message, sentence);
    t.notMatch(message, /inner workings/);
  }
  const target = await new Promise<number | undefined>((resolve) => {
    request(url, { path: 'http://[' }, ({ statusCode }) => resolve(statusCode)).end();
  });
  t.equal(target, 400, 'a target that no client sends');
  const typeless = await fetch(`${url}/json`, { method: 'POST', body: Buffer.from('{"a": 1}') });
  t.same(await typeless.json(), { a: 1 }, 'as Dify sends it');
  const form = new FormData();
  form.set('prompt', 'a fox');
  t.same(await (await fetch(`${url}/form`, { method: 'POST', body: form })).json(), ['prompt']);
  const page = await fetch(`${url}/page`);
  t.match(page.headers.get('content-security-policy'), /default-src 'none'/);
});

test('who leaves while a body is sent is no bug', async (t) => {
  const bugs: unknown[] = [];
  let left: () => void;
  const isOver = new Promise<void>((resolve) => {
    left = resolve;
  });
  const take = async ({ json }: HttpRequest): Promise<Reply> => {
    try {
      return { json: await json() };
    } finally {
      setImmediate(left);
    }
  };
  const url = await opened(t, { 'POST /json': take }, { onBug: (error) => bugs.push(error) });
  const headers = { 'Content-Type': 'application/json', 'Content-Length': 100 };
  const sent = request(`${url}/json`, { method: 'POST', headers }).on('error', () => {});
  sent.write('{', () => setTimeout(() => sent.destroy(), 50));
  await isOver;
  t.same(bugs, [], 'nothing for the log');
});

test('hundreds of connections that say little keep nobody out', async (t) => {
  let tell = (_: string): void => {};
  const url = await opened(t, {
    'GET /now': () => ({ json: 1 }),
    'POST /body': async ({ json }) => ({ json: await json() }),
    'GET /events': () => ({
      events: (send) =>
        new Promise((resolve) => {
          tell = (event) => resolve(send(event, 1));
          send('begin', 0);
        }),
    }),
  });
  const port = Number(new URL(url).port);
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  t.teardown(() => agent.destroy());
  const ask = () =>
    new Promise<number>((resolve, reject) => {
      const asked = request(`${url}/now`, { agent }, (response) =>
        response.resume().on('end', () => resolve(asked.socket?.localPort ?? 0)),
      );
      asked.on('error', reject).end();
    });
  const from = await ask();
  const events = await fetch(`${url}/events`);
  const headers = { 'Content-Type': 'application/json' };
  const upload = request(`${url}/body`, { method: 'POST', headers });
  const answered = once(upload, 'response');
  upload.write(`{"prompt": "${' '.repeat(2000)}`);
  // In the order of their numbers, as each is let in before the next.
  const open = async (said: string) => {
    const socket = connect(port, '127.0.0.1').on('error', () => {});
    t.teardown(() => socket.destroy());
    await once(socket, 'connect');
    socket.write(said);
  };
  const post = 'POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n';
  for (let i = 0; i < 300; i++) await open(['', 'G', 'GET /now HTTP/1.1\r\nA: b'][i % 3]);
  t.equal(await ask(), from, 'a connection that is kept is still the same');
  for (let i = 0; i < 300; i++) await open(i === 0 ? '' : `${post}Content-Length: 9\r\n\r\n{`);
  const began = performance.now();
  t.equal((await fetch(`${url}/now`)).status, 200);
  t.ok(performance.now() - began < 5000, 'another is answered at once, where it had to wait for ten seconds');
  upload.end('"}');
  const [{ statusCode }] = await answered;
  t.equal(statusCode, 200, 'a slow upload goes on');
  tell('end');
  t.match(await events.text(), /event: end/, 'and a stream');
});

test('a page that may ask is told so, and another is not', async (t) => {
  const url = await opened(
    t,
    { 'GET /x': () => ({ json: 1 }) },
    { origins: ['https://example.org'], key: 'secret-key' },
  );
  const preflight = (origin: string, more = {}) =>
    fetch(`${url}/x`, { method: 'OPTIONS', headers: { origin, ...more } });
  const allowed = await preflight('https://example.org');
  t.equal(allowed.status, 204, 'asked without the key, as browsers do');
  t.equal(allowed.headers.get('access-control-allow-origin'), 'https://example.org');
  t.match(allowed.headers.get('access-control-allow-headers'), /authorization/);
  const asked = { 'access-control-request-headers': 'authorization, x-stainless-os' };
  const library = await preflight('https://example.org', asked);
  t.match(library.headers.get('access-control-allow-headers'), /x-stainless-os/, "OpenAI's own client");
  const other = await preflight('https://evil.example');
  t.equal(other.status, 403);
  t.equal(other.headers.get('access-control-allow-origin'), null);
  const keyless = await fetch(`${url}/x`);
  t.equal(keyless.status, 401);
  t.match(keyless.headers.get('www-authenticate'), /Bearer/);
});

/** A drawer whose orders end when the test says. */
function slowDrawer() {
  const begun: { order: Order; end(): void; fail(error: Error): void; signal: AbortSignal }[] = [];
  const drawer: Drawer = {
    open: async () => ({ device: 'none', dtype: 'float32', edm: false }),
    told: () => undefined,
    draw: (order, hearing, signal) =>
      new Promise((resolve, fail) => {
        const picture = {
          png: Buffer.from(String(order.settings.seed)),
          seed: order.settings.seed ?? 0,
          parameters: '',
        };
        const end = () => {
          hearing.picture(picture);
          resolve();
        };
        signal.addEventListener('abort', () => resolve());
        begun.push({ order, end, fail, signal });
      }),
    look() {},
    state: () => 'open',
    close() {},
  };
  return { drawer, begun };
}

test('orders are drawn one after the other, in their order, and no more wait than may', async (t) => {
  const { drawer, begun } = slowDrawer();
  const queue = openQueue(drawer, 2);
  const never = new AbortController().signal;
  const asked = (seed: number, signal = never) => queue.draw({ settings: { seed }, pictures: {} }, signal);
  const [first, second] = [asked(1), asked(2)];
  const leaving = new AbortController();
  const third = asked(3, leaving.signal);
  await t.rejects(asked(4), /2 orders wait already/);
  t.equal(queue.waiting(), 2);
  t.equal(begun.length, 1, 'one at a time');
  begun[0].end();
  t.same(
    (await first).map(({ seed }) => seed),
    [1],
  );
  leaving.abort(new Error('gone'));
  await t.rejects(third, /gone/, 'who waits and is gone is not drawn for');
  queue.interrupt();
  t.same(await second, [], 'interrupted, with nothing finished');
  const fifth = asked(5);
  begun[2].fail(new Error('broken'));
  await t.rejects(fifth, /broken/);
  const [sixth, seventh] = [asked(6), asked(7)];
  const closed = queue.close();
  await t.rejects(seventh, /about to end/, 'a server that ends lets nobody wait');
  await t.rejects(asked(8), /about to end/);
  begun[3].end();
  t.same(
    (await sixth).map(({ seed }) => seed),
    [6],
    'and finishes the picture at work',
  );
  await closed;
  t.same(
    begun.map(({ order }) => order.settings.seed),
    [1, 2, 5, 6],
  );
});

test('a process that cannot be started is told of, and tried again', async (t) => {
  const { execPath } = process;
  t.teardown(() => {
    process.execPath = execPath;
  });
  process.execPath = '/nowhere/node';
  const drawer = openDrawer({ model: 'none' } as Standing, { tell() {}, onLost() {} });
  for (let i = 0; i < 2; i++) {
    await t.rejects(drawer.open(), /the process that draws has ended \(spawn .*ENOENT\)/);
    t.equal(drawer.state(), 'lost');
  }
});
