// Inpainting models, whose UNets take nine channels, against diffusers' pipelines (golden/inpainting.jsonl): whole calls, one of them by
// `sdxl sample`. That other forms of the model draw the same, what is told of it, and what is refused. Recorded steps:
// cuda_recorded.test.ts.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { preprocess, preprocessMask, writePng } from '../../io/image.ts';
import { openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { inspect } from '../../models/inspect.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents, savedLatents } from '../support/contents.ts';
import { configOf, disc, picture, writeComponent } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { at, type Call, inpainting, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';

type Golden = Omit<Call, 'kind'> & { kind: Call['kind'] | 'cropped' };
const golden = goldenLines<Golden>('inpainting');
const isWhole = (call: Golden): call is Call => call.kind !== 'cropped';
const numbers = (text: string): Float32Array => decodeFloats(Buffer.from(text, 'base64'), 'float32');
testCalls(golden.filter(isWhole), 13, 0);

const [image, mask] = [at('image.png'), at('mask.png')];
writePng(image, picture(4, 80, 72));
writePng(mask, disc(80, 72));
const over = ['--image', image, '--mask', mask];
const sample = (...argv: string[]) =>
  sdxl(
    ...['sample', '--prompt', 'a red fox in the snow', '--negative-prompt', 'rain', '--steps', '5'],
    ...['--seed', '13', '--width', '64', '--height', '64', '--quiet', '--output', at('x.png'), ...argv],
  );

test('sdxl sample paints in a part that is cut out, as diffusers', async (t) => {
  const { values, atol } = golden.find((call) => !isWhole(call)) as Golden;
  const saved = at('cropped.safetensors');
  const cut = ['--padding-mask-crop', '5', '--strength', '0.7', '--save-latents', saved];
  const preview = ['--preview', 'proj', '--preview-path', at('preview.png')];
  const { status, err } = await sample('--model', inpainting, ...over, ...cut, ...preview);
  t.equal(status, 0, err);
  const some = savedLatents(saved).filter((_, i) => i % 5 === 0);
  allClose(t, 'latents', some, numbers(values), { atol, rtol: 0 });
  t.equal((await sdxl('sample', '--from', at('x.png'), '--output', at('y.png'), '--quiet')).status, 0);
  t.ok(readFileSync(at('y.png')).equals(readFileSync(at('x.png'))), 'and again by its settings');
});

test('a file, and a UNet in a base model, draw what the folder draws', async (t) => {
  const base = join(goldenFolder, 'tiny-sdxl');
  const [single, lone, folder] = ['single.safetensors', 'unet.gguf', 'exported'].map(at);
  const kind = (path: string): string => inspect(path).kind;
  for (const argv of [
    [inpainting, single, '--format', 'single-file'],
    [inpainting, lone, '--format', 'gguf', '--save-keys', 'unet'],
    [base, folder, '--unet', lone],
  ]) {
    const { status, err } = await sdxl('export', ...argv, '--quiet');
    t.equal(status, 0, err);
  }
  t.equal(kind(inpainting), 'diffusers folder: SDXL inpainting model');
  t.equal(kind(single), 'original single file: SDXL inpainting model');
  t.match(kind(lone), /^UNet of an inpainting model in one file/);
  t.equal(kind(join(inpainting, 'unet')), 'diffusers component: UNet2DConditionModel of an inpainting model');
  t.equal(openModel(folder).modelIndex._class_name, 'StableDiffusionXLInpaintPipeline');
  const drawn: Map<string, string>[] = [];
  for (const model of [[inpainting], [single, '--configs', base], [base, '--unet', lone], [folder]]) {
    const saved = at('drawn.safetensors');
    const { status, err } = await sample(
      '--model',
      ...model,
      ...over,
      '--steps',
      '2',
      '--save-latents',
      saved,
    );
    t.equal(status, 0, err);
    drawn.push(contents(saved));
  }
  for (const each of drawn.slice(1)) t.same(each, drawn[0]);
  const plain = await sample(
    '--model',
    base,
    ...over,
    '--steps',
    '2',
    '--save-latents',
    at('plain.safetensors'),
  );
  t.equal(plain.status, 0, plain.err);
  t.notSame(contents(at('plain.safetensors')), drawn[0]);
  const refiner = ['--refiner', join(goldenFolder, 'tiny-sdxl-refiner'), '--denoising-end', '0.6'];
  const refined = await sample('--model', inpainting, ...over, ...refiner);
  t.equal(refined.status, 0, refined.err);
});

test('mistakes', async (t) => {
  const alone =
    /^error: this UNet takes 9 channels: it is an inpainting model, .* give image and mask \(--image, --mask\)/;
  await refusesEach(t, (...argv) => sample('--model', inpainting, ...argv), [
    [[], alone],
    [['--image', image], alone],
    [['--hires'], alone],
    [['--hires', ...over], /--hires draws from a prompt alone/],
  ]);
  const device = openDevice('cpu');
  const pipeline = pipelineOf('inpainting', device);
  const loaded = device.memory.storages;
  const asked = { prompt: 'x', image: preprocess(picture(4, 64, 64)), mask: preprocessMask(disc()) };
  const latents = { shape: [1, 4, 8, 8], data: new Float32Array(256) };
  for (const [more, says] of [
    [{ mask: undefined }, /it is an inpainting model/],
    [{ image: latents }, /latents do not tell: give image as pixels, by preprocess/],
    [
      { mask: preprocessMask(disc(80, 72)) },
      /^mask: 5760 numbers of shape \[1, 1, 72, 80\], where .* \[1, 1, 64, 64\]/,
    ],
  ] as const)
    await t.rejects(latentsOf(pipeline, { ...asked, ...more }), { message: says });
  t.equal(device.memory.storages, loaded, 'live tensors');
  pipeline.release();
  const json = { ...configOf('full'), in_channels: 9 };
  const nine = openComponent(writeComponent(at('nine'), 'full', json, []));
  t.throws(() => loadPipeline(openModel(inpainting), { device, dtype: 'float32', controlnet: [nine] }), {
    message: /nine has "in_channels" 9 and the UNet 4 of latents: take one that was made for this model/,
  });
});
