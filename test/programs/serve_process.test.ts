// `sdxl serve` as a program that runs on: pictures are watched and stopped, it outlives the process that draws, and it says why where it
// cannot begin.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { sdxl } from '../support/command_line.ts';
import {
  type Answer,
  drawers,
  eventually,
  fox,
  model,
  pixels,
  seen,
  serve,
  small,
} from '../support/served.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-process-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

test('a picture is watched, stopped, and left by who is gone', async (t) => {
  const server = await serve('--width', '64', '--height', '64', '--steps', '150');
  t.teardown(() => server.end());
  const until = (holds: (progress: Answer['body']) => boolean) => seen(server, holds);
  const drawing = server.post('/sdapi/v1/txt2img', { ...fox, n_iter: 16 });
  const look = await until(({ current_image }) => current_image !== null);
  t.ok(look.progress > 0 && look.progress < 1 && look.eta_relative > 0);
  t.equal(look.state.sampling_steps, 150);
  t.equal((await pixels(look.current_image)).width, 8, "latents' colours");
  await server.post('/sdapi/v1/interrupt', {});
  const stopped = await drawing;
  t.equal(stopped.status, 200);
  t.ok(stopped.body.images.length < 16, 'what was finished');

  const leaving = new AbortController();
  const left = server.post('/v1/images/generations', { ...fox, n: 16 }, leaving.signal);
  await until(({ state }) => state.sampling_step > 0);
  leaving.abort();
  await t.rejects(left, { name: 'AbortError' });
  await until(({ state }) => state.job === '');

  const events = await fetch(`${server.url}/v1/images/generations`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({
      ...fox,
      num_inference_steps: 12,
      stream: true,
      partial_images: 2,
      output_format: 'webp',
    }),
  });
  t.match(events.headers.get('content-type'), /event-stream/);
  const told = (await events.text())
    .trim()
    .split('\n\n')
    .map((event) => event.split('\n'));
  t.same(
    told.map(([name]) => name),
    ['partial_image', 'partial_image', 'completed'].map((name) => `event: image_generation.${name}`),
  );
  const last = JSON.parse(told[2][1].slice('data: '.length));
  t.equal(Buffer.from(last.b64_json, 'base64').toString('latin1', 8, 12), 'WEBP');
});

test('a server outlives the process that draws, and lets it go when it is idle', async (t) => {
  const server = await serve('--width', '64', '--height', '64', '--steps', '150', '--keep-alive', '0.01');
  await eventually(async () => drawers().length === 0); // nobody has asked yet
  const drawing = server.post('/v1/images/generations', { ...fox, n: 16 });
  const waiting = server.post('/v1/images/generations', { ...fox, num_inference_steps: 1 });
  await seen(server, ({ state }) => state.sampling_step > 0);
  const [first] = drawers();
  process.kill(first, 'SIGKILL');
  const lost = await drawing;
  t.equal(lost.status, 500);
  t.match(lost.body.detail, /the process that draws has ended \(SIGKILL\)/);
  t.equal((await waiting).status, 200, 'who waited is drawn for by the next');
  t.not(drawers()[0], first);
  t.match(server.said(), /it is started again/);
  t.match(server.said(), /1 drawn in [\d.]+ s after waiting [\d.]+ s, from seed 5/);
  await eventually(async () => drawers().length === 0);
  t.equal((await server.get('/healthz')).body.state, 'idle', 'memory is free');
  const early = server.post('/sdapi/v1/txt2img', fox);
  await seen(server, ({ state }) => state.job !== '');
  await server.post('/sdapi/v1/interrupt', {});
  t.same((await early).body.images, [], 'interrupted while the model is loaded');
  t.equal(
    (await server.post('/v1/images/generations', { ...fox, num_inference_steps: 1 })).status,
    200,
    'and comes back',
  );

  const last = server.post('/v1/images/generations', { ...fox, num_inference_steps: 40 });
  await seen(server, ({ state }) => state.sampling_step > 0);
  const ended = server.end();
  t.equal((await server.get('/healthz')).status, 503, 'nobody is to ask any more');
  t.equal((await last).status, 200, 'the request at work is finished');
  t.equal(await ended, 143);
  await eventually(async () => drawers().length === 0);
});

test('a server that ends starts no other process in the place of one that dies', async (t) => {
  const server = await serve('--width', '64', '--height', '64', '--steps', '150');
  const last = server.post('/v1/images/generations', { ...fox, n: 16 });
  await seen(server, ({ state }) => state.sampling_step > 0);
  const ended = server.end();
  process.kill(drawers()[0], 'SIGKILL');
  t.equal((await last).status, 500);
  t.equal(await ended, 143);
  t.notMatch(server.said(), /started again/);
});

test('a server that cannot begin says why', async (t) => {
  const taken = createServer();
  await new Promise<void>((resolve) => taken.listen(0, '127.0.0.1', resolve));
  const { port } = taken.address() as { port: number };
  const [short, key] = [join(folder, 'short.txt'), join(folder, 'key.txt')];
  writeFileSync(short, 'abc\n');
  writeFileSync(key, 'a-long-enough-key\n');
  const cases: [string[], RegExp][] = [
    [['--port', `${port}`], /port \d+ of 127.0.0.1 is taken/],
    [['--listen-ip', '0.0.0.0'], /reached from other machines: give --api-key-file/],
    [['--listen-ip', '203.0.113.7', '--api-key-file', key], /cannot be listened on/],
    [['--api-key-file', join(folder, 'none.txt')], /none.txt/],
    [['--api-key-file', short], /8 letters or more/],
    [['--model', join(folder, 'none'), '--listen-port', '0'], /none/],
    [['--cache-branch-id', '1'], /needs --cache-interval/],
    [['--preview', 'tae'], /needs --tae/],
    [['--denoising-end', '0.8'], /half denoised, for a refiner to finish/],
    [['--prompt', 'x'], /unknown option '--prompt'/],
    [['--queue', '0'], /--queue takes/],
    [['--cors', 'https://example.org/'], /--cors takes an origin/],
    [['--cors', '*'], /--cors takes an origin/],
    [
      ['--controlnet', 'a/edges', '--adapter', 'b/edges.safetensors'],
      /a\/edges and b\/edges.safetensors would both be called edges, by which/,
    ],
  ];
  for (const [flags, sentence] of cases) {
    const { status, err } = await sdxl('serve', '--model', model, ...flags);
    t.equal(status, 2, flags.join(' '));
    t.match(err, sentence);
  }
  await new Promise((resolve) => taken.close(resolve));
  await eventually(async () => drawers().length === 0);

  const server = await serve(...small, '--api-key-file', key);
  t.equal((await server.get('/healthz')).status, 200, 'without the key');
  t.equal((await server.post('/v1/images/generations', fox)).status, 401);
  await server.end();
});
