// `sdxl serve` with a folder of LoRAs: each request has its own, whatever the last one had, and draws what `sdxl sample` draws.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { maxDifference } from '../support/golden.ts';
import { drawers, fox, pixels, sampledTo, serve, small } from '../support/served.ts';
import { writeAdapter } from '../support/tiny_adapter.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-loras-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const loras = join(folder, 'loras');
mkdirSync(join(loras, 'sub'), { recursive: true });
const metadata = { ss_output_name: 'a style' };
const style = writeAdapter(join(loras, 'style.safetensors'), { metadata });
const deep = writeAdapter(join(loras, 'sub', 'deep.safetensors'), { conv: 'down_blocks_0_resnets_0_conv2' });
writeFileSync(join(loras, 'broken.safetensors'), 'no file of tensors');
const always = writeAdapter(join(folder, 'always.safetensors'), { size: 0.5 });
const flags = [...small, '--lora', `${always}:0.5`, '--lora-model-dir', loras];

test('each request is drawn with the LoRAs that it names', async (t) => {
  const server = await serve(...flags);
  const [process] = drawers();
  const wanted = async (prompt: string, ...more: string[]) =>
    (await sampledTo(join(folder, 'sampled.png'), ...flags, '--prompt', prompt, '--seed', '5', ...more))
      .picture.data;
  const asA1111 = ['--emphasis', 'original', '--max-token-length', '225'];
  const drawn = async (prompt: string) => {
    const { status, body } = await server.post('/sdapi/v1/txt2img', { ...fox, prompt });
    t.equal(status, 200, body.detail);
    t.match(JSON.parse(body.info).infotexts[0], new RegExp(`^${prompt}\n`), 'the tag stays in the text');
    return (await pixels(body.images[0])).data;
  };
  const styled = await wanted('a red fox<lora:style:0.5>', ...asA1111);
  const plain = await wanted('a red fox', ...asA1111);
  t.ok(maxDifference(styled, plain) > 0);
  t.equal(maxDifference(await drawn('a red fox<lora:style:0.5>'), styled), 0);
  t.equal(maxDifference(await drawn('a red fox'), plain), 0, 'none');
  t.equal(maxDifference(await drawn('a red fox<lora:style:0.5>'), styled), 0, 'and back');
  const openai = await server.post('/v1/images/generations', { ...fox, prompt: 'a red fox<lora:deep:2>' });
  const other = await wanted('a red fox<lora:deep:2>');
  t.equal(maxDifference((await pixels(openai.body.data[0].b64_json)).data, other), 0, "in OpenAI's words");

  for (const [prompt, sentence] of [
    ['a fox <lora:stile:1>', /^no LoRA "stile" in .*; did you mean "style"\?$/],
    ['a fox <lora:../always:1>', /^no LoRA "..\/always"/],
    ['a fox <lora:broken:1>', /broken.safetensors/],
    ['a fox <lora:style:much>', /takes a number, not "much"/],
    ['a fox <hypernet:style:1>', /takes no <hypernet:style:1> here/],
  ] as const) {
    const { status, body } = await server.post('/sdapi/v1/txt2img', { ...fox, prompt });
    t.equal(status, 400, prompt);
    t.match(body.detail, sentence);
  }
  const off = { ...fox, disable_extra_networks: true };
  t.match(
    (await server.post('/sdapi/v1/txt2img', off)).body.detail,
    /disable_extra_networks true is not there/,
  );

  const byList = { ...fox, lora: [{ path: 'style.safetensors', multiplier: 1 }] };
  t.match(
    (await server.post('/sdapi/v1/txt2img', byList)).body.detail,
    /^lora .* is not there; leave lora out/,
  );

  // Given up while the LoRAs are merged, or soon after.
  const stop = new AbortController();
  const left = server.post(
    '/sdapi/v1/txt2img',
    { ...fox, steps: 150, prompt: 'a red fox<lora:deep:3>' },
    stop.signal,
  );
  setTimeout(() => stop.abort(), 20);
  await t.rejects(left, { name: 'AbortError' });
  t.equal(maxDifference(await drawn('a red fox<lora:style:0.5>'), styled), 0, 'after one that was given up');
  writeAdapter(style, { size: 2 });
  const anew = await drawn('a red fox<lora:style:0.5>');
  t.ok(maxDifference(anew, styled) > 0, 'a file that has changed');
  t.equal(maxDifference(anew, await wanted('a red fox<lora:style:0.5>', ...asA1111)), 0);
  t.same(drawers(), [process], 'all by one process');

  const named = async () => (await server.get('/sdapi/v1/loras')).body;
  writeAdapter(style, { metadata });
  t.match(await named(), [
    { name: 'broken', alias: 'broken', path: join(loras, 'broken.safetensors'), metadata: {} },
    { name: 'style', alias: 'style', path: style, metadata },
    { name: 'deep', alias: 'deep', path: deep },
  ]);
  writeAdapter(join(loras, 'new.safetensors'));
  t.same(await server.post('/sdapi/v1/refresh-loras', {}), { status: 200, body: null });
  t.match(
    (await named()).map(({ name }: { name: string }) => name),
    ['broken', 'new', 'style', 'deep'],
  );
  await server.end();
});
