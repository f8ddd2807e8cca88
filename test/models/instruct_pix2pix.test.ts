// InstructPix2Pix models, whose UNets take eight channels, against diffusers' pipeline (golden/instruct_pix2pix.jsonl): whole calls. That
// `sdxl sample` and other forms of the model draw the same, what is told of it, and what is refused.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { preprocess, preprocessMask, writePng } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { inspect } from '../../models/inspect.ts';
import { encodeMode, stacked } from '../../models/vae/latents.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents, savedLatents } from '../support/contents.ts';
import { disc, picture } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { at, type Call, instructed, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';

const golden = goldenLines<Call>('instruct_pix2pix');
testCalls(golden, 7, 0);

const image = at('image.png');
writePng(image, picture(4, 64, 64));
const base = join(goldenFolder, 'tiny-sdxl');
const sample = (...argv: string[]) =>
  sdxl(
    ...['sample', '--prompt', 'a red fox in the snow', '--negative-prompt', 'rain', '--steps', '5'],
    ...['--seed', '0', '--width', '64', '--height', '64', '--quiet', '--output', at('x.png'), ...argv],
  );

test("sdxl sample edits a picture as diffusers does; a file and a UNet in a base model do the folder's", async (t) => {
  const [single, lone, folder, saved] = ['single.safetensors', 'unet.gguf', 'exported', 'saved'].map(at);
  for (const argv of [
    [instructed, single, '--format', 'single-file'],
    [instructed, lone, '--format', 'gguf', '--save-keys', 'unet'],
    [base, folder, '--unet', lone],
  ]) {
    const { status, err } = await sdxl('export', ...argv, '--quiet');
    t.equal(status, 0, err);
  }
  t.equal(inspect(instructed).kind, 'diffusers folder: SDXL InstructPix2Pix model');
  t.equal(inspect(single).kind, 'original single file: SDXL InstructPix2Pix model');
  t.match(inspect(lone).kind, /^UNet of an InstructPix2Pix model in one file/);
  t.equal(openModel(folder).modelIndex._class_name, 'StableDiffusionXLInstructPix2PixPipeline');
  const drawn: Map<string, string>[] = [];
  for (const model of [[instructed], [single, '--configs', base], [folder]]) {
    const { status, err } = await sample('--model', ...model, '--image', image, '--save-latents', saved);
    t.equal(status, 0, err);
    drawn.push(contents(saved));
  }
  for (const each of drawn.slice(1)) t.same(each, drawn[0]);
  const some = savedLatents(saved).filter((_, i) => i % 5 === 0);
  const { values, atol } = golden[0];
  allClose(t, 'latents', some, decodeFloats(Buffer.from(values, 'base64'), 'float32'), { atol, rtol: 0 });
  const guided = ['--image', image, '--image-guidance-scale', '3'];
  t.equal((await sample('--model', instructed, ...guided)).status, 0);
  t.equal((await sdxl('sample', '--from', at('x.png'), '--output', at('y.png'), '--quiet')).status, 0);
  t.ok(readFileSync(at('y.png')).equals(readFileSync(at('x.png'))), 'and again by its settings');
  const refiner = ['--refiner', join(goldenFolder, 'tiny-sdxl-refiner'), '--denoising-end', '0.6'];
  const refined = await sample('--model', instructed, ...guided, ...refiner);
  t.equal(refined.status, 0, refined.err);
});

test("latents in a picture's place, and DeepCache", async (t) => {
  const pipeline = pipelineOf('instruct_pix2pix', openDevice('cpu'));
  const asked = { prompt: 'x', width: 64, height: 64, num_inference_steps: 3 };
  const given = (image: ReturnType<typeof encodeMode>, more = {}) =>
    latentsOf(pipeline, { ...asked, image, latents, ...more });
  const latents = { shape: [1, 4, 8, 8], data: new Float32Array(256).fill(0.5) };
  const pixels = preprocess(picture(4, 64, 64));
  const want = await given(pixels);
  t.same(await given(encodeMode(pipeline.vae, pixels, {})), want);
  t.notSame(await given(pixels, { cache_interval: 2 }), want);
  const two = await given(pixels, {
    num_images_per_prompt: 2,
    latents: { shape: [2, 4, 8, 8], data: new Float32Array(512).fill(0.5) },
  });
  allClose(t, 'the first of two', two.slice(0, 256), want, { atol: 1e-4, rtol: 0 });
  const pair = [pixels, preprocess(picture(5, 64, 64))];
  const own = pair.map((each) => encodeMode(pipeline.vae, each, {}));
  const both = await given(stacked(own), {
    num_images_per_prompt: 2,
    latents: { shape: [2, 4, 8, 8], data: new Float32Array(512).fill(0.5) },
  });
  const alone = [want, await given(own[1])];
  t.notSame(alone[0], alone[1]);
  for (const [i, each] of alone.entries())
    allClose(t, `a picture's own latents, ${i}`, both.slice(256 * i, 256 * (i + 1)), each, {
      atol: 1e-4,
      rtol: 0,
    });
  pipeline.release();
});

test('mistakes', async (t) => {
  await refusesEach(t, (...argv) => sample(...argv), [
    [
      ['--model', instructed],
      /^error: this UNet takes 8 channels: it is an InstructPix2Pix model, .*; give image \(--image\), or take a base model/,
    ],
    [
      ['--model', instructed, '--image', image, '--strength', '0.5'],
      /takes no strength \(--strength\): leave it out/,
    ],
    [['--model', instructed, '--image', image, '--pag-scale', '3'], /takes no pag_scale \(--pag-scale\)/],
    [['--model', instructed, '--image', image, '--mask', image], /takes no mask \(--mask\)/],
    [
      ['--model', base, '--image', image, '--image-guidance-scale', '2'],
      /whose UNets take 8 channels, and this one takes 4: leave it out/,
    ],
    [['--model', instructed, '--image-guidance-scale', '2'], /--image-guidance-scale needs --image/],
    [['--model', instructed, '--image', image, '--hires'], /--hires draws from a prompt alone/],
  ]);
  const device = openDevice('cpu');
  const pipeline = pipelineOf('instruct_pix2pix', device);
  const loaded = device.memory.storages;
  const asked = { prompt: 'x', image: preprocess(picture(4, 64, 64)) };
  for (const [more, says] of [
    [{ image: undefined }, /it is an InstructPix2Pix model/],
    [{ mask: preprocessMask(disc()) }, /takes no mask/],
    [{ denoising_start: 0.5 }, /takes no denoising_start/],
    [{ image_guidance_scale: -1 }, /image_guidance_scale is -1: give a number from 0/],
  ] as const)
    await t.rejects(latentsOf(pipeline, { ...asked, ...more }), { message: says });
  t.equal(device.memory.storages, loaded, 'live tensors');
  pipeline.release();
});
