// Whole pipeline calls against diffusers (golden area pipeline): latents after the recorded steps, time ids, and the
// 8-bit pictures within one level except for at most 0.1 % of the values.
import { join } from 'node:path';
import { test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import type { Conv2d } from '../../engine/layers.ts';
import { type Parameter, placeOf } from '../../engine/module.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { toPictures } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import { decode, loadPipeline, type Pipeline, sizesOf } from '../../models/pipeline.ts';
import { samplerFor } from '../../models/plan.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { complete, type Request } from '../../models/request.ts';
import { type MicroConditioning, timeIds } from '../../models/text/conditioning.ts';
import {
  decodeLatents,
  decodePictures,
  encodeImage,
  type Latents,
  previewPictures,
} from '../../models/vae/latents.ts';
import { type Assert, allClose, type GoldenCase, goldenFolder, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { area, requestOf, run } from '../support/pipeline_golden.ts';

/** What the reference loops can do in seconds. */
const few = ['t2i_clip_skip', 't2i_lcm', 't2i_no_guidance'];

/** Calls whose first draw is their noise, with its shape. */
const noises: Record<string, readonly number[]> = {
  t2i_cfg5: [1, 4, 16, 16],
  t2i_two_images: [2, 4, 10, 14],
  t2i_dpmpp_2m_sde_karras: [1, 4, 10, 14],
  t2i_v_zero_snr: [1, 4, 10, 14],
};

for (const device of devices) {
  const cases = area.cases.filter(({ id }) => device.name !== 'reference' || few.includes(id));
  test(`pipelines on ${device.name}`, { timeout: 300_000 }, (t) => {
    const before = device.memory.storages;
    checkPipelines(t, cases, device);
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

function checkPipelines(t: Assert, cases: readonly GoldenCase[], device: Device): void {
  const load = (name: string) =>
    loadPipeline(openModel(join(goldenFolder, name)), { device, dtype: 'float32' });
  const refiner = load('tiny-sdxl-refiner');
  const pipelines: Record<string, Pipeline> = {
    'tiny-sdxl': load('tiny-sdxl'),
    'tiny-sdxl-refiner': refiner,
  };
  for (const c of cases) {
    const request = requestOf(c, c.settings as Record<string, unknown>);
    const result = run(pipelines[c.pipeline as string], request);
    if (c.id in noises) checkNoiseGiven(t, c, pipelines[c.pipeline as string], result.history);
    let { latents, history } = result;
    if (c.refiner_settings) {
      const next = requestOf(c, c.refiner_settings as Record<string, unknown>);
      const refined = run(refiner, { ...next, generators: request.generators, image: latents });
      const { refiner_time_ids: ids } = c.expect;
      allClose(t, `${c.id} refiner time ids`, refined.timeIds.flat(), area.floats(ids.tensor), ids);
      latents = refined.latents;
      history = [...history, ...refined.history];
    }
    const stacked = Float32Array.from((c.latents_steps as number[]).flatMap((i) => [...history[i]]));
    allClose(t, `${c.id} latents`, stacked, area.floats(c.expect.latents.tensor), c.expect.latents);
    allClose(
      t,
      `${c.id} time ids`,
      result.timeIds.flat(),
      area.floats(c.expect.time_ids.tensor),
      c.expect.time_ids,
    );
    const pipeline = pipelines[c.pipeline as string];
    const decoded = decodeLatents(pipeline.vae, latents);
    const shown = decoded.data.map((x) => Math.min(1, Math.max(0, x / 2 + 0.5)));
    const { image, scheduler_timesteps: times } = c.expect;
    if (image) allClose(t, `${c.id} image`, shown, area.floats(image.tensor), image);
    const whole = samplerFor(pipeline, request).plan(request.num_inference_steps);
    allClose(t, `${c.id} timesteps`, whole.timesteps, area.floats(times.tensor), times);
    // The reference takes its time to decode again.
    const again = device.name !== 'reference';
    checkPixels(t, c, again ? decode(pipeline, latents) : toPictures(decoded.data, decoded.shape));
  }
  for (const pipeline of Object.values(pipelines)) pipeline.release();
}

/** The noise that a seed gives, given: what the generator draws after it stays, and so do the golden's latents. */
function checkNoiseGiven(t: Assert, c: GoldenCase, pipeline: Pipeline, history: Float32Array[]): void {
  const { width, height, ...request } = requestOf(c, c.settings as Record<string, unknown>);
  const shape = noises[c.id];
  const data = request.generators[0].randn(shape.reduce((a, b) => a * b, 1));
  const given = run(pipeline, { ...request, latents: { shape, data } });
  given.history.forEach((x, i) => {
    t.ok(maxDifference(x, history[i]) === 0, `${c.id} from its noise as latents, step ${i}`);
  });
}

test('a VAE runs in the type of the model, but in float32 where that is float16 and it says that it overflows', (t) => {
  const device = openDevice('auto');
  const before = device.memory.storages;
  const plain = openModel(join(goldenFolder, 'tiny-sdxl'));
  const json = plain.config('vae');
  const mended = {
    ...plain,
    config: (name: string) => (name === 'vae' ? { ...json, force_upcast: false } : plain.config(name)),
  };
  const opened = (source: ModelSource, dtype: FloatDType, vaeDtype?: FloatDType) =>
    loadPipeline(source, { device, dtype, vaeDtype });
  const typeOf = ({ vae }: Pipeline) => placeOf(vae.module).dtype;
  const data = new TorchGenerator(2).randn(4 * 16 * 16) as Float32Array;
  const latents = { shape: [1, 4, 16, 16], data: data.map((x) => 0.2 * x) };
  const drawn = (pipeline: Pipeline) => {
    const { data } = decodeLatents(pipeline.vae, latents);
    const type = typeOf(pipeline);
    pipeline.release();
    return { data, type };
  };
  const exact = drawn(opened(plain, 'float16'));
  t.equal(exact.type, 'float32');
  t.equal(drawn(opened(plain, 'bfloat16')).type, 'bfloat16');
  // A few roundings of the largest number: how many, a device's order of sums decides.
  for (const [dtype, rounding] of [
    ['bfloat16', 2 ** -8],
    ['float16', 2 ** -11],
  ] as const) {
    const { data, type } = drawn(opened(mended, dtype));
    t.equal(type, dtype);
    const apart = maxDifference(data, exact.data) / (rounding * Math.max(...exact.data));
    t.ok(apart > 0 && apart < 5, `${dtype}: ${apart} roundings`);
  }
  t.equal(drawn(opened(mended, 'float32')).type, 'float32');
  t.equal(drawn(opened(mended, 'bfloat16', 'float32')).type, 'float32', 'what is asked for');
  t.equal(drawn(opened(plain, 'float32', 'float16')).type, 'float16');

  // Weights that leave float16's range after the first convolution; the norm after it takes their factor out.
  const strained = () => {
    const pipeline = opened(plain, 'float32', 'float16');
    const { weight, bias } = (
      pipeline.vae.module.children as unknown as { decoder: { children: { conv_in: Conv2d } } }
    ).decoder.children.conv_in.children;
    for (const parameter of [weight, bias as Parameter]) {
      const values = parameter.tensor.floats().map((x) => Math.min(6e4, Math.max(-6e4, 1e5 * x)));
      parameter.tensor.set(values);
    }
    return pipeline;
  };
  const { data: saved, type } = drawn(strained());
  t.ok(saved.every(Number.isFinite), 'a VAE that overflows runs in float32');
  t.equal(type, 'float16', 'and has its own type for the next picture');

  const { vae, release } = strained();
  const wide = { shape: [1, 4, 16, 64], data: new Float32Array(4 * 16 * 64) };
  const tiled = { vae_tiling: true };
  decodeLatents(vae, wide, tiled);
  t.equal(placeOf(vae.module).dtype, 'float16', 'what is nothing does not overflow');
  for (let row = 0; row < 4 * 16; row++) wide.data.fill(1, row * 64 + 56, row * 64 + 64);
  const [seen] = previewPictures(vae, wide, tiled);
  t.notOk(seen.finite, 'a look on the way overflows');
  t.equal(placeOf(vae.module).dtype, 'float16', 'and changes nothing');
  const fits = () => decodeLatents(vae, { ...wide, data: new Float32Array(wide.data.length) }, tiled).data;
  const alone = fits();
  const tiles = decodeLatents(vae, wide, tiled).data;
  t.ok(tiles.every(Number.isFinite), 'nor does one in its last tile go unseen');
  t.equal(maxDifference(fits(), alone), 0, 'and the next picture is as it would be alone');
  t.ok(decodePictures(vae, wide, tiled)[0].finite);
  release();
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('time ids that no golden shows, read from diffusers', (t) => {
  const micro = { original_size: [9, 8], crops_coords_top_left: [1, 2], target_size: [7, 6] } as const;
  const rows = (more: MicroConditioning, aesthetic: boolean, interleaved: boolean) =>
    timeIds({ ...micro, ...more }, [5, 4], { guided: true, images: 1, aesthetic, interleaved });
  t.same(rows({}, false, true)[0], [9, 8, 1, 2, 7, 6], 'text to image without negative sizes');
  const sizes = { negative_original_size: [3, 3], negative_target_size: [2, 2] } as const;
  t.same(rows(sizes, false, true)[0], [3, 3, 0, 0, 2, 2], 'with both');
  t.same(
    rows({ negative_original_size: [3, 3] }, false, true)[0],
    [9, 8, 1, 2, 7, 6],
    'with one: not heeded',
  );
  t.same(rows({ negative_original_size: [3, 3] }, false, false)[0], [3, 3, 1, 2, 7, 6], 'over a picture');
  t.same(rows({ negative_crops_coords_top_left: [4, 4] }, false, false)[0], [9, 8, 4, 4, 7, 6], 'asked for');
  t.same(rows({}, true, false)[0], [9, 8, 0, 0, 2.5], 'refiner');
  t.end();
});

const zeros = (...shape: number[]): Latents => ({
  shape,
  data: new Float32Array(shape.reduce((a, b) => a * b, 1)),
});

/** What no golden call shows; the expectations are read from diffusers' pipelines. */
test('draws and defaults of calls that no golden covers', (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  const seeded = (...seeds: number[]) => ({ generators: seeds.map((seed) => new TorchGenerator(seed)) });
  const base = { prompt: ['a fox'], height: 64, width: 64, num_inference_steps: 4, guidance_scale: 1 };
  const latents = (more: Partial<Request>) => run(pipeline, { ...base, ...seeded(1), ...more }).latents.data;

  for (const [more, message] of [
    [{ negative_prompt: ['a', 'b'] }, /prompt has 1 texts and negative_prompt 2/],
    [{ num_images_per_prompt: 3, ...seeded(1, 2) }, /2 generators for 3 images/],
    [{ height: 60 }, /64x60 pixels are not whole latents: give sides divisible by 8/],
    [{ width: 0 }, /0x64 pixels are not whole latents/],
    [{ num_images_per_prompt: 0 }, /num_images_per_prompt is 0: give a whole number from 1/],
    [{ num_images_per_prompt: 1.5 }, /give a whole number from 1/],
    [{ latents: zeros(2, 4, 8, 8) }, /^latents: 512 numbers of shape \[2, 4, 8, 8\].* takes \[1, 4, 8, 8\]/],
    [{ latents: zeros(1, 3, 8, 8) }, /takes \[1, 4, 8, 8\]/],
    [{ latents: { ...zeros(1, 4, 8, 8), shape: [1, 4, 4, 4] } }, /256 numbers of shape \[1, 4, 4, 4\]/],
    [{ image: zeros(1, 3, 64, 64), latents: zeros(1, 4, 4, 4) }, /where the request takes \[1, 4, 8, 8\]/],
    [{ image: zeros(1, 3, 60, 60) }, /^image: .* takes \[1, 3, 56, 56\]/],
    [{ image: zeros(2, 4, 8, 8) }, /^image: 512 numbers of shape \[2, 4, 8, 8\].* takes \[1, 4, 8, 8\]/],
    [{ denoising_start: 0.5 }, /^denoising_start goes on from .* give latents, or an image/],
  ] as const)
    t.throws(() => latents(more), { name: 'UserError', message });

  const tcd = { scheduler: { name: 'TCDScheduler' } };
  const [plain, still, noisy] = [{}, { eta: 0 }, { eta: 0.3 }].map((more) => latents({ ...tcd, ...more }));
  t.equal(maxDifference(plain, still), 0, 'a pipeline hands TCD eta 0');
  t.ok(maxDifference(plain, noisy) > 0.1, 'and not its own 0.3');

  const c = area.cases.find(({ id }) => id === 'img2img_0.7') as GoldenCase;
  const image = requestOf(c, c.settings as Record<string, unknown>).image as Latents;
  const half = { image, strength: 0.5 };
  const [together, first, second] = [
    latents({ ...half, num_images_per_prompt: 2, ...seeded(1, 2) }),
    latents({ ...half, ...seeded(1) }),
    latents({ ...half, ...seeded(2) }),
  ];
  const apart = Float32Array.of(...first, ...second);
  t.ok(maxDifference(together, apart) < 1e-5, 'each generator draws its image as if it were alone');

  const known = encodeImage(pipeline.vae, image, (n) => new TorchGenerator(1).randn(n) as Float32Array, {});
  const start = { denoising_start: 0.5 };
  const sides = { height: undefined, width: undefined };
  const went = maxDifference(latents({ image, ...start }), latents({ ...sides, latents: known, ...start }));
  t.equal(went, 0, 'with denoising_start a picture is taken to have its noise already');

  const again = run(pipeline, { ...base, ...seeded(3), image: known, strength: 0.5 });
  t.equal(again.timesteps.length, 2, 'finished latents are worked over at the strength');
  const noised = latents({ image: known, strength: 0.5 });
  t.ok(maxDifference(noised, known.data) > 0.1, 'under noise of their own');

  // All black: everything is kept, so the result is the picture's encoding, whatever came before.
  const mask = { shape: [1, 1, ...image.shape.slice(2)], data: new Float32Array(image.data.length / 3) };
  const whole = run(pipeline, { ...base, ...seeded(1), image, mask });
  t.equal(whole.timesteps.length, 3, 'inpainting does 0.9999 of the steps');
  t.equal(maxDifference(whole.latents.data, known.data), 0, 'what the mask keeps');
  const handed = { latents: { ...known, data: known.data.map((x) => x + 1) }, denoising_start: 0.5 };
  t.equal(maxDifference(latents({ image, mask, ...handed }), known.data), 0, 'and keeps in the refiner');

  // Noise of a caller's own over a picture, as diffusers takes it.
  const own = { latents: { shape: known.shape, data: new TorchGenerator(7).randn(known.data.length) } };
  const { initNoiseSigma } = samplerFor(pipeline, {}).plan(4);
  const white = { ...mask, data: mask.data.map(() => 1) };
  const pure = { ...own.latents, data: own.latents.data.map((x) => x * initNoiseSigma) };
  const painted = latents({ image, mask: white, ...own, strength: 0.5 });
  t.same(painted, latents({ ...half, latents: pure }), 'is all that painting everything anew begins with');
  t.same(painted, latents({ image: known, mask: white, ...own, strength: 0.5 }), 'which reads no picture');
  t.same(latents({ ...half, ...own }), latents({ image: own.latents, denoising_start: 0.5 }), 'noisy');

  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

function checkPixels(t: Assert, c: GoldenCase, pictures: readonly Picture[]): void {
  const got = Buffer.concat(pictures.map((picture) => picture.data));
  const want = area.bytes(c.expect.image_uint8.tensor);
  let [off, far] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    const difference = Math.abs(got[i] - want[i]);
    if (difference > 0) off++;
    if (difference > 1) far++;
  }
  const good = got.length === want.length && far <= want.length / 1000;
  t.ok(good, `${c.id} pixels: ${off} differ, ${far} by more than one, of ${want.length}`);
}

test("what a request leaves out is diffusers' default", (t) => {
  const prompt = ['a fox'];
  const { generators, ...rest } = complete({ ratio: 8, sampleSize: 128 }, { prompt });
  t.match(rest, { prompt, num_inference_steps: 50, guidance_scale: 5, width: 128, height: 128 });
  t.equal(generators.length, 1);
  const asked = { prompt, timesteps: [999, 500], width: 64, guidance_scale: 0, height: undefined };
  t.match(complete({ ratio: 8, sampleSize: 128 }, asked), {
    num_inference_steps: 2,
    width: 64,
    guidance_scale: 0,
    height: 128,
  });
  t.equal(complete({ ratio: 8, sampleSize: 8 }, { prompt, sigmas: [14, 1, 0] }).num_inference_steps, 2);
  const tiny = openModel(join(goldenFolder, 'tiny-sdxl'));
  const trainedAt = (sample_size: unknown) => {
    const config = (name: string) => ({ ...tiny.config(name), ...(name === 'unet' && { sample_size }) });
    return complete(sizesOf({ ...tiny, config }), { prompt });
  };
  for (const [sample_size, height, width] of [
    [24, 192, 192],
    [[16, 16], 128, 128],
    [[16, 24], 128, 192],
    [null, 1024, 1024],
  ] as const)
    t.match(trainedAt(sample_size), { height, width }, JSON.stringify(sample_size));
  t.throws(() => trainedAt('16'), { name: 'UserError', message: /"sample_size" is "16", not a whole/ });
  t.match(complete({ ratio: 8, sampleSize: 8 }, { prompt: 'a fox', negative_prompt: 'rain' }), {
    prompt,
    negative_prompt: ['rain'],
  });
  const both = complete(
    { ratio: 8, sampleSize: 8 },
    { prompt: ['a fox', 'a hen'], negative_prompt: '', prompt_2: ['x', 'y'], negative_prompt_2: '' },
  );
  t.match(both, { negative_prompt: ['', ''], prompt_2: ['x', 'y'], negative_prompt_2: undefined });
  t.end();
});
