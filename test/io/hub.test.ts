// The hub's downloader against a small hub of our own on 127.0.0.1.

import { createHash } from 'node:crypto';
import {
  lstatSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { UserError } from '../../io/errors.ts';
import { looksLikeHubId, resolveHub } from '../../io/hub.ts';
import { refused } from '../support/mistake.ts';

const sha = 'c'.repeat(40);
const large = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * 7919) >> 3));
const small = Buffer.from('{"a": 1}');
const sha256 = createHash('sha256').update(large).digest('hex');
const sha1 = createHash('sha1').update(`blob ${small.length}\0`).update(small).digest('hex');

interface FakeHub {
  requests: IncomingMessage[];
  /** Answers instead of the hub when it returns true. */
  intercept: (request: IncomingMessage, response: ServerResponse) => boolean;
}

function answer(hub: FakeHub, request: IncomingMessage, response: ServerResponse): void {
  hub.requests.push(request);
  if (hub.intercept(request, response)) return;
  const url = request.url ?? '';
  if (url.startsWith('/api/models/o/n/revision/')) {
    const siblings = [
      {
        rfilename: 'unet/model.safetensors',
        size: large.length,
        blobId: 'd'.repeat(40),
        lfs: { sha256, size: large.length },
      },
      { rfilename: 'config.json', size: small.length, blobId: sha1 },
      { rfilename: 'README.md', size: 5, blobId: 'e'.repeat(40) },
    ];
    response.end(JSON.stringify({ sha, siblings }));
    return;
  }
  const body = url.endsWith('model.safetensors') ? large : url.endsWith('config.json') ? small : undefined;
  if (!body) {
    response.writeHead(404, { 'x-error-code': 'RepoNotFound' }).end();
    return;
  }
  const start = Number(/bytes=(\d+)-/.exec(request.headers.range ?? '')?.[1] ?? 0);
  response.writeHead(start ? 206 : 200, { 'content-length': body.length - start });
  response.end(body.subarray(start));
}

const names = [
  'HF_HOME',
  'HF_HUB_CACHE',
  'HUGGINGFACE_HUB_CACHE',
  'HF_ENDPOINT',
  'HF_TOKEN',
  'HUGGING_FACE_HUB_TOKEN',
  'HF_TOKEN_PATH',
  'HF_HUB_OFFLINE',
];

/** A fresh hub and an empty cache, both gone after the test. */
async function fakeHub(
  t: Test,
): Promise<FakeHub & { home: string; repo: string; close: () => Promise<void> }> {
  const hub: FakeHub = { requests: [], intercept: () => false };
  const server = createServer((request, response) => answer(hub, request, response));
  await new Promise<void>((ready) => server.listen(0, '127.0.0.1', ready));
  for (const name of names) delete process.env[name];
  const home = t.testdir({});
  process.env.HF_HOME = home;
  process.env.HF_ENDPOINT = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
  const close = () =>
    new Promise<void>((done) => {
      server.closeAllConnections();
      server.close(() => done());
    });
  t.teardown(close);
  return Object.assign(hub, { home, repo: join(home, 'hub', 'models--o--n'), close });
}

const wanted = { files: ['config.json', 'unet/model.safetensors'] };

test('a download fills the shared cache', async (t) => {
  const hub = await fakeHub(t);
  const progress: number[] = [];
  const folder = await resolveHub('o/n', { ...wanted, onProgress: ({ done }) => progress.push(done) });
  t.equal(folder, join(hub.repo, 'snapshots', sha));
  t.ok(readFileSync(join(folder, 'unet', 'model.safetensors')).equals(large), 'the bytes');
  t.equal(readlinkSync(join(folder, 'unet', 'model.safetensors')), join('..', '..', '..', 'blobs', sha256));
  t.equal(readlinkSync(join(folder, 'config.json')), join('..', '..', 'blobs', sha1));
  t.equal(readFileSync(join(hub.repo, 'refs', 'main'), 'utf8'), sha);
  t.equal(readdirSync(join(hub.repo, 'blobs')).length, 2, 'only the files wanted, nothing left over');
  t.equal(progress.at(-1), large.length + small.length);
  t.ok(
    progress.every((done, i) => i === 0 || done >= progress[i - 1]),
    'progress only grows',
  );
  t.equal(hub.requests[0].headers.authorization, undefined, 'no token, none sent');

  await resolveHub('o/n', { files: (all) => all.filter((name) => name.endsWith('.json')) });
  t.equal(hub.requests.length, 4, 'what is there is not fetched again');
  const written = statSync(join(hub.repo, 'refs', 'main')).ino;
  await resolveHub('o/n', wanted);
  t.equal(
    statSync(join(hub.repo, 'refs', 'main')).ino,
    written,
    'nor written, as the cache may be read-only',
  );
  process.env.HF_HUB_OFFLINE = '1';
  t.equal(await resolveHub('o/n', wanted), folder, 'offline');
  t.equal(
    await resolveHub('o/n', { files: (all) => all.filter((name) => name === 'unet/model.safetensors') }),
    folder,
  );
  t.equal(hub.requests.length, 5);
  process.env.HF_HUB_OFFLINE = '0';
  await hub.close();
  t.equal(await resolveHub('o/n', wanted), folder, 'without a network the cache serves');
  await refused(t, resolveHub('o/other', wanted), /cannot reach .*ECONNREFUSED.*check the network/);
});

test('a choice that the cached files cannot satisfy', async (t) => {
  const hub = await fakeHub(t);
  const folder = await resolveHub('o/n', { files: ['config.json'] });
  const weights = (all: readonly string[]): string[] => {
    if (!all.includes('unet/model.safetensors')) throw new UserError('no such weights; name another');
    return ['unet/model.safetensors'];
  };
  process.env.HF_HUB_OFFLINE = '1';
  const offline = /OFFLINE is set and o\/n is not .* \(of what is there: no such weights; .*\): unset it to/;
  await refused(t, resolveHub('o/n', { files: weights }), offline);
  process.env.HF_HUB_OFFLINE = '0';
  t.equal(await resolveHub('o/n', { files: weights }), folder, 'is not what the hub has');
  t.ok(readFileSync(join(folder, 'unet/model.safetensors')).equals(large), 'and is downloaded');
  const never = () => {
    throw new UserError('none of them will do');
  };
  await refused(t, resolveHub('o/n', { files: never }), /^none of them will do$/);
  await hub.close();
  await refused(t, resolveHub('o/n', { files: never }), /cannot reach .*what is there: none of them will do/);
});

test('a cut connection resumes, also from an earlier process', async (t) => {
  const hub = await fakeHub(t);
  let cuts = 0;
  hub.intercept = (request, response) => {
    if (!request.url?.endsWith('model.safetensors') || cuts > 0) return false;
    cuts++;
    response.writeHead(200, { 'content-length': large.length });
    response.write(large.subarray(0, 100_000), () => setTimeout(() => response.destroy(), 50));
    return true;
  };
  const folder = await resolveHub('o/n', wanted);
  t.ok(readFileSync(join(folder, 'unet/model.safetensors')).equals(large), 'whole');
  t.equal(hub.requests.at(-1)?.headers.range, 'bytes=100000-');

  rmSync(join(hub.repo, 'blobs', sha256));
  rmSync(join(folder, 'unet'), { recursive: true });
  writeFileSync(join(hub.repo, 'blobs', `${sha256}.incomplete`), large.subarray(0, 5000));
  utimesSync(join(hub.repo, 'blobs', `${sha256}.incomplete`), 1e9, 1e9);
  await resolveHub('o/n', wanted);
  t.equal(hub.requests.at(-1)?.headers.range, 'bytes=5000-', 'what another program left is continued');
  t.ok(readFileSync(join(folder, 'unet/model.safetensors')).equals(large), 'whole');
});

test('a commit asks the hub once, and has no name of its own', async (t) => {
  const hub = await fakeHub(t);
  const pinned = { ...wanted, revision: sha };
  const folder = await resolveHub('o/n', pinned);
  t.equal(folder, join(hub.repo, 'snapshots', sha));
  t.notOk(
    lstatSync(join(hub.repo, 'refs'), { throwIfNoEntry: false }),
    'a ref would be a second name for it',
  );
  const asked = hub.requests.length;
  t.equal(await resolveHub('o/n', pinned), folder);
  t.equal(hub.requests.length, asked, 'a commit never changes');
  const every = { ...pinned, files: (all: readonly string[]) => all.filter((name) => /config/.test(name)) };
  await resolveHub('o/n', every);
  t.equal(hub.requests.length, asked + 1, 'but what is to be chosen from is not all here');
  await resolveHub('o/n', wanted);
  rmSync(join(hub.repo, 'snapshots'), { recursive: true });
  process.env.HF_HUB_OFFLINE = '1';
  for (const given of [wanted, every]) await refused(t, resolveHub('o/n', given), /HF_HUB_OFFLINE is set/);
});

test('a server that sends everything again, one that is busy, and bytes too many', async (t) => {
  const hub = await fakeHub(t);
  const answers: ((response: ServerResponse) => unknown)[] = [
    (response) => response.writeHead(503).end(),
    (response) => {
      response.writeHead(200, { 'content-length': large.length });
      response.write(large.subarray(0, 100_000), () => setTimeout(() => response.destroy(), 50));
    },
    (response) => response.end(large), // whatever the range
  ];
  hub.intercept = (request, response) => {
    if (!request.url?.endsWith('model.safetensors')) return false;
    const next = answers.shift();
    next?.(response);
    return next !== undefined;
  };
  const done: number[] = [];
  const one = { files: ['unet/model.safetensors'] };
  const folder = await resolveHub('o/n', { ...one, onProgress: (told) => done.push(told.done) });
  t.ok(readFileSync(join(folder, 'unet/model.safetensors')).equals(large), 'whole');
  t.equal(answers.length, 0);
  t.equal(done.at(-1), large.length);

  rmSync(hub.repo, { recursive: true });
  answers.push((response) => response.end(Buffer.concat([large, small])));
  await refused(t, resolveHub('o/n', one), /unet\/model\.safetensors arrived damaged/);
  t.equal(readdirSync(join(hub.repo, 'blobs')).length, 0);
});

test('damaged bytes are refused and forgotten', async (t) => {
  const hub = await fakeHub(t);
  hub.intercept = (request, response) => {
    if (!request.url?.endsWith('config.json')) return false;
    response.end('{"a": 2}');
    return true;
  };
  await refused(t, resolveHub('o/n', wanted), /config\.json arrived damaged/);
  t.equal(readdirSync(join(hub.repo, 'blobs')).length, 0);
  t.notOk(lstatSync(join(hub.repo, 'refs'), { throwIfNoEntry: false }), 'no ref to a broken snapshot');
});

test('tokens and refusals', async (t) => {
  const hub = await fakeHub(t);
  writeFileSync(join(hub.home, 'token'), 'hf_file\n');
  await resolveHub('o/n', { files: ['config.json'] });
  t.equal(hub.requests[0].headers.authorization, 'Bearer hf_file', 'the token file');
  process.env.HF_TOKEN = 'hf_variable';
  await resolveHub('o/n', { files: ['config.json'] });
  t.equal(hub.requests.at(-1)?.headers.authorization, 'Bearer hf_variable', 'HF_TOKEN goes first');
  await refused(t, resolveHub('o/n', { files: ['absent.json'] }), /has no file absent\.json/);
  await refused(t, resolveHub('o/n', { files: () => [] }), /none of the files needed/);
  await refused(t, resolveHub('o/nothing', wanted), /no model o\/nothing/);
  await refused(t, resolveHub('o/../n', wanted), /owner\/name/);
  await refused(t, resolveHub('o/n', { ...wanted, revision: '../x' }), /is no revision/);
  const status = (code: number, error: string) => {
    hub.intercept = (_, response) => Boolean(response.writeHead(code, { 'x-error-code': error }).end());
  };
  status(403, 'GatedRepo');
  await refused(t, resolveHub('o/n', wanted), /o\/n is gated: accept its terms at http.*\/o\/n/);
  await refused(t, resolveHub('o/n', wanted), /with the account of your token$/);
  status(403, '');
  await refused(t, resolveHub('o/n', wanted), /is gated/);
  status(429, '');
  await refused(t, resolveHub('o/n', wanted), /refuses more requests for now: wait/);
  status(418, '');
  await refused(t, resolveHub('o/n', wanted), /refuses o\/n \(status 418\): try again later/);
  const { HF_TOKEN } = process.env;
  delete process.env.HF_TOKEN;
  rmSync(join(hub.home, 'token'));
  status(403, 'GatedRepo');
  await refused(t, resolveHub('o/n', wanted), /and set HF_TOKEN to a token of your account$/);
  process.env.HF_TOKEN = HF_TOKEN;
  status(404, 'RevisionNotFound');
  await refused(t, resolveHub('o/n', { ...wanted, revision: 'v9' }), /no revision "v9"/);
  hub.intercept = (request, response) =>
    Boolean(request.url?.includes('/resolve/') && response.writeHead(404).end());
  await refused(
    t,
    resolveHub('o/n', wanted),
    /^o\/n on the hub lists unet\/model\.safetensors, but does not/,
  );
  hub.intercept = (_, response) => Boolean(response.end('<html>'));
  await refused(t, resolveHub('o/n', wanted), /does not answer like the Hugging Face hub/);
  const siblings = [{ rfilename: '../../evil', size: 1, blobId: sha1 }];
  hub.intercept = (_, response) => Boolean(response.end(JSON.stringify({ sha, siblings })));
  await refused(t, resolveHub('o/n', { files: (all) => all }), /not safe to store/);
  const beside = { rfilename: 'samples\\of:it.png', size: 1, blobId: sha1 };
  const usual = { rfilename: 'config.json', size: small.length, blobId: sha1 };
  hub.intercept = (request, response) =>
    !request.url?.includes('/resolve/') &&
    Boolean(response.end(JSON.stringify({ sha, siblings: [beside, usual] })));
  await t.resolves(
    resolveHub('o/beside', { files: ['config.json'] }),
    'of a file that nobody wants the name is free',
  );
  process.env.HF_HUB_OFFLINE = 'true';
  await refused(t, resolveHub('o/absent', wanted), /HF_HUB_OFFLINE is set/);
});

test('through a proxy that the environment names', async (t) => {
  const hub = await fakeHub(t);
  const port = Number(new URL(process.env.HF_ENDPOINT as string).port);
  const tunnels: string[] = [];
  const proxy = createServer().on('connect', (request, client, head) => {
    tunnels.push(`${request.url} ${request.headers['proxy-authorization']}`);
    const server = connect(port, '127.0.0.1', () => {
      client.write('HTTP/1.1 200 Connection established\r\n\r\n');
      server.write(head);
      server.pipe(client).pipe(server);
    });
    for (const end of [server, client]) end.on('error', () => [server, client].map((each) => each.destroy()));
  });
  await new Promise<void>((ready) => proxy.listen(0, '127.0.0.1', ready));
  const proxyPort = (proxy.address() as AddressInfo).port;
  t.teardown(() => {
    for (const name of ['HTTP_PROXY', 'NO_PROXY']) delete process.env[name];
    proxy.closeAllConnections();
    proxy.close();
  });
  // Only the proxy knows such a host.
  process.env.HF_ENDPOINT = 'http://hub.invalid';
  process.env.HTTP_PROXY = `http://me:p%40ss@127.0.0.1:${proxyPort}`;
  process.env.HF_TOKEN = 'hf_secret';
  let redirected: IncomingMessage | undefined;
  hub.intercept = (request, response) => {
    if (!request.url?.includes('/resolve/') || !request.url.endsWith('model.safetensors')) return false;
    if (request.headers.host === 'hub.invalid')
      response.writeHead(302, { location: `http://cdn.invalid:81${request.url}` }).end('elsewhere');
    else {
      redirected = request;
      response.end(large);
    }
    return true;
  };
  const folder = await resolveHub('o/n', wanted);
  t.ok(readFileSync(join(folder, 'unet/model.safetensors')).equals(large), 'the bytes');
  const login = `Basic ${Buffer.from('me:p@ss').toString('base64')}`;
  t.same([...new Set(tunnels)], [`hub.invalid:80 ${login}`, `cdn.invalid:81 ${login}`]);
  t.equal(hub.requests[0].headers.authorization, 'Bearer hf_secret');
  t.equal(redirected?.headers.authorization, undefined, 'the token stays with its host');

  process.env.NO_PROXY = 'localhost, .invalid';
  await refused(t, resolveHub('o/else', wanted), /cannot reach http:\/\/hub\.invalid/);
  delete process.env.NO_PROXY;
  process.env.HTTP_PROXY = '127.0.0.1:1';
  await refused(t, resolveHub('o/else', wanted), /the proxy 127\.0\.0\.1:1: ECONNREFUSED/);
  process.env.HTTP_PROXY = 'socks5://127.0.0.1:1';
  await refused(t, resolveHub('o/else', wanted), /HTTP_PROXY is "socks5/);
});

test('two downloads at once', async (t) => {
  const hub = await fakeHub(t);
  const folders = await Promise.all([resolveHub('o/n', wanted), resolveHub('o/n', wanted)]);
  t.equal(folders[0], folders[1]);
  t.ok(readFileSync(join(folders[0], 'unet/model.safetensors')).equals(large), 'whole');
  t.equal(readdirSync(join(hub.repo, 'blobs')).length, 2);
});

test('what looks like a model on the hub', async (t) => {
  for (const id of ['stabilityai/stable-diffusion-xl-base-1.0', 'o/n']) t.ok(looksLikeHubId(id), id);
  for (const other of ['io/hub.ts', './o/n', 'model.safetensors', '/o/n', 'a/b/c', '../n', 'o/a..b']) {
    t.notOk(looksLikeHubId(other), other);
  }
  for (const ending of ['safetensors', 'SAFETENSORS', 'ckpt', 'pt', 'pth', 'bin', 'gguf'])
    t.notOk(looksLikeHubId(`models/sdxl.${ending}`), `a file that is not there: ${ending}`);
  t.ok(looksLikeHubId('owner/sdxl-gguf'), 'a name that only tells of files');
});
