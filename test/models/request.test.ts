// A request as JavaScript may write it, where no compiler tells of a key or a kind: each mistake is one sentence, and nothing is drawn.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { preprocess, preprocessControl, preprocessMask } from '../../io/image.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { decode, denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { encodePrompt } from '../../models/prompts.ts';
import { CudaGenerator } from '../../models/random/cuda_random.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { type Asked, complete } from '../../models/request.ts';
import { feedForwardToFp8 } from '../../models/unet/fp8.ts';
import { goldenFolder } from '../support/golden.ts';
import { says } from '../support/mistake.ts';

const sizes = { ratio: 8, sampleSize: 8 };
/** As JavaScript calls it. */
const untyped = <T>(value: unknown): T => value as T;
const numbers = (...shape: number[]) => ({
  shape,
  data: new Float32Array(shape.reduce((product, n) => product * n, 1)),
});

test('keys and values that no request has', (t) => {
  const picture = { width: 8, height: 8, channels: 3, data: new Uint8Array(192) };
  for (const [given, message] of [
    [{ prompt: 5 }, /^prompt is 5: give a text, or a list of texts$/],
    [{ prompt: [] }, /^prompt is \[\]: give/],
    [{ prompt: ['a', 5] }, /^prompt is \["a", 5\]: give/],
    [{ prompt: null }, /^there is no prompt to draw/],
    [{ generator: new TorchGenerator(1) }, /^a request has no generator; did you mean "generators"\?/],
    [{ seed: 1 }, /^a request has no seed; here it is generators: \[new TorchGenerator\(SEED\)\]/],
    [{ steps: 9 }, /has no steps; here it is num_inference_steps/],
    [{ generators: new TorchGenerator(1) }, /^generators is a TorchGenerator: give a list of TorchGenerator/],
    [{ generators: [1] }, /^generators is \[1\]/],
    [{ num_inference_steps: '20' }, /^num_inference_steps is "20": give a number/],
    [{ guidance_scale: '7' }, /^guidance_scale is "7": give a number/],
    [{ guidance_scale: Number.NaN }, /^guidance_scale is NaN/],
    [{ guidance_rescale: 3 }, /^guidance_rescale is 3: give a number from 0 to 1/],
    [{ width: '64' }, /^width is "64": give a number/],
    [{ clip_skip: -1 }, /^clip_skip is -1: give a whole number from 0/],
    [{ emphasis: 'A1111' }, /^emphasis is "A1111": give one of none, ignore, original, no-norm/],
    [{ original_size: 64 }, /^original_size is 64: give \[height, width\]/],
    [{ original_size: [Number.NaN, 1] }, /^original_size is \[NaN, 1\]/],
    [{ crops_coords_top_left: [1] }, /^crops_coords_top_left is \[1\]: give \[top, left\]/],
    [{ timesteps: '999,500' }, /^timesteps is "999,500": give a list of numbers/],
    [{ scheduler: 'euler' }, /^scheduler is "euler": give \{ name, config \}/],
    [{ image: 'photo.png' }, /^image is "photo\.png": give \{ data, shape \} as preprocess gives it/],
    [{ image: picture }, /^image is \{ width, height, channels, data \}: give/],
    [{ mask: numbers(1, 1, 8, 8) }, /^mask needs image/],
    [{ masked_content: 'latent-noise' }, /^masked_content needs mask/],
    [
      { masked_content: 'fill' as 'latent-noise' },
      /^masked_content is "fill": give one of latent-noise, latent-nothing/,
    ],
    [{ latents: new Float32Array(9) }, /^latents is a Float32Array: give/],
    [{ control_image: numbers(1, 3, 8, 8) }, /^control_image is \{ shape, data \}: give a list/],
    [{ ip_adapter_image: picture }, /^ip_adapter_image is .*: give a list of pictures/],
    [{ vae_tiling: 'yes' }, /^vae_tiling is "yes": give true or false/],
  ] as const)
    t.throws(() => complete(sizes, untyped(Object.assign({ prompt: 'a fox' }, given))), says(message));
  t.throws(() => complete(sizes, untyped(null)), says(/^the request is null: give an object/));
  t.end();
});

test('null is what is left out, as None is in Python', (t) => {
  const none = Object.fromEntries(
    ['negative_prompt', 'image', 'mask', 'latents', 'strength', 'timesteps', 'clip_skip', 'eta', 'width'].map(
      (key) => [key, null],
    ),
  );
  const generators = [new TorchGenerator(1)];
  const prompt = 'a fox';
  t.same(complete(sizes, untyped({ prompt, generators, ...none })), complete(sizes, { prompt, generators }));
  t.end();
});

test('a pipeline is loaded with what it takes, and draws until it is released', async (t) => {
  const model = openModel(join(goldenFolder, 'tiny-sdxl'));
  const device = openDevice('auto');
  for (const [source, options, message] of [
    ['tiny-sdxl', { device, dtype: 'float32' }, /takes an opened model first: what await locateModel/],
    [Promise.resolve(model), { device, dtype: 'float32' }, /takes an opened model first/],
    [model, undefined, /device is undefined: give what openDevice\('auto'\) gives/],
    [model, { device: 'cpu', dtype: 'float32' }, /device is "cpu": give what openDevice/],
    [model, { device }, /dtype is undefined: give float32/],
    [model, { device, dtype: 'fp16' }, /dtype is "fp16": give float32, bfloat16 or float16/],
    [model, { device, dtype: 'float32', vaeDtype: 'auto' }, /vaeDtype is "auto"/],
    [
      model,
      { device, dtype: 'float32', lora: 'a.safetensors' },
      /lora is "a\.safetensors": give a list of { path/,
    ],
    [
      model,
      { device, dtype: 'float32', lora: ['a.safetensors'] },
      /lora is \["a\.safetensors"\]: give a list/,
    ],
    [model, { device, dtype: 'float32', controlnet: ['net'] }, /controlnet is \["net"\]: .*locateControlNet/],
    [model, { device, dtype: 'float32', controlnet: model }, /controlnet is .*: give a list/],
    [model, { device, dtype: 'float32', ipAdapter: ['a'] }, /ipAdapter is \["a"\]: .*locateIPAdapter/],
    [model, { device, dtype: 'float32', vaeSource: 'vae' }, /vaeSource is "vae": give what await locateVae/],
    [model, { device, dtype: 'float32', q8: 'yes' }, /q8 is "yes": give true or false/],
    [model, { device, dtype: 'float32', fp8: 1 }, /fp8 is 1: give true or false/],
    [model, { device, dtype: 'float32', loras: [] }, /takes no loras; did you mean "lora"\?/],
    [model, { device, dtype: 'float32', vae: model }, /takes no vae; here it is vaeSource/],
  ] as const)
    t.throws(() => loadPipeline(untyped(source), untyped(options)), says(message));
  t.throws(() => openDevice(untyped(undefined)), says(/unknown device "undefined"/));
  for (const Generator of [TorchGenerator, CudaGenerator])
    for (const seed of ['a', undefined, 1.5])
      t.throws(() => new Generator(untyped(seed)), says(/seed is .*: give a whole number/), `seed ${seed}`);

  const none = untyped<undefined>(null);
  const left = { vaeSource: none, vaeDtype: none, controlnet: [], ipAdapter: none, lora: none, q8: none };
  const pipeline = loadPipeline(model, { device, dtype: 'float32', ...left });
  const ask = (more: object): Promise<unknown> =>
    denoiseToEnd(pipeline, untyped<Asked>({ prompt: 'a fox', width: 64, height: 64, ...more }));
  const config = { timestep_spacing: 'traling' };
  await t.rejects(
    ask({ scheduler: { config } }),
    says(/^the request's scheduler\.config: timestep_spacing is "traling".* did you mean "trailing"/),
  );
  for (const scale of [Number.NaN, '1'])
    t.throws(() => mergeLora(pipeline, 'any', untyped(scale)), says(/scale of any is .*: give a number/));
  const denoised = await denoiseToEnd(pipeline, {
    prompt: 'a fox',
    width: 64,
    height: 64,
    num_inference_steps: 1,
  });
  for (const wrong of [denoised, undefined, { ...denoised.latents, data: [1] }])
    t.throws(
      () => decode(pipeline, untyped(wrong)),
      says(/no latents: of what denoiseToEnd gives take \.latents/),
    );
  for (const prepare of [preprocess, preprocessControl, preprocessMask])
    for (const wrong of ['photo.png', Promise.resolve(), undefined])
      t.throws(() => prepare(untyped(wrong)), says(/is no picture: give what await readPicture/));
  pipeline.release();
  await t.rejects(ask({ num_inference_steps: 1 }), says(/the pipeline was released/));
  t.throws(() => decode(pipeline, numbers(1, 4, 8, 8)), says(/the pipeline was released/));
  t.throws(() => encodePrompt(pipeline, { prompt: 'a fox' }), says(/the pipeline was released/));
});

test('what is called at each step is waited for, and ends the work where it fails', async (t) => {
  const device = openDevice('auto');
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  const asked = { prompt: 'a fox', width: 64, height: 64, num_inference_steps: 2 };
  const steps: number[] = [];
  const later = () => new Promise((resolve) => setTimeout(resolve, 20));
  await denoiseToEnd(pipeline, asked, async ({ step }) => {
    await later();
    steps.push(step);
  });
  t.same(steps, [1, 2]);
  const { live } = device.memory;
  const stop = async () => {
    await later();
    throw new Error('enough');
  };
  await t.rejects(denoiseToEnd(pipeline, asked, stop), { message: 'enough' });
  t.equal(device.memory.live, live, 'nothing is left behind');
  pipeline.release();
});

test('after the last call nothing of the UNet is kept from others', async (t) => {
  const device = openDevice('auto');
  const { memory } = device;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  const { live } = memory;
  const asked = { prompt: 'a fox', width: 64, height: 64, num_inference_steps: 2, last: true };
  await denoiseToEnd(pipeline, asked);
  t.ok(memory.live < live / 2, `${memory.live} of ${live} bytes live`);
  const idle = memory.held - memory.live;
  t.ok(idle < 2 ** 16, `${idle} bytes idle`);
  pipeline.release();
});

test('an adapter comes before 8-bit floats, or not at all', (t) => {
  const device = openDevice('auto');
  const load = { device, dtype: 'float32', fp8: true } as const;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), load);
  const layers = [...namedParameters(pipeline.unet)].filter(([name]) =>
    /^mid_block.*(attn1\.to_q|ff\.net\.2)\.weight$/.test(name),
  );
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-request-'));
  const path = join(folder, 'adapter.safetensors');
  writeSafetensors(
    path,
    layers.map(([name, { shape, size }]) => {
      const bytes = encodeNumbers(new Float32Array(size).fill(1), 'float32');
      return { name: name.replace(/weight$/, 'diff'), dtype: 'float32', shape, bytes };
    }),
  );
  const [[, attention]] = layers;
  const before = attention.tensor.floats();
  feedForwardToFp8(pipeline.unet); // once more changes nothing
  t.throws(
    () => mergeLora(pipeline, path),
    says(/changes weights that are in 8-bit floats: give it to loadPipeline as lora/),
  );
  t.same(attention.tensor.floats(), before, 'nothing of it is merged');
  pipeline.release();
  rmSync(folder, { recursive: true });
  t.end();
});
