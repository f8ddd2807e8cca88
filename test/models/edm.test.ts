// Models that were trained under EDM's noise, against diffusers (golden/edm.jsonl): its two schedulers step by step, and whole calls as
// Playground v2.5's and CosXL's. That folders and single files are told, and draw and export the same; what is refused.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openPreviews } from '../../cli/sample/preview.ts';
import { openDevice } from '../../engine/device.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import { preprocess, preprocessControl, preprocessMask, writePng } from '../../io/image.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { inspect } from '../../models/inspect.ts';
import { decode, denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { samplerFor } from '../../models/plan.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Request } from '../../models/request.ts';
import type { SchedulerConfig } from '../../models/samplers/config.ts';
import { completeConfig, parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import { vaeFor } from '../../models/vae/autoencoder.ts';
import { scaleLatents } from '../../models/vae/latents.ts';
import { parseVaeConfig } from '../../models/vae/vae.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents, savedLatents } from '../support/contents.ts';
import { disc, picture, writeControlNet } from '../support/controlnet_golden.ts';
import { change, type edmSchedulers, spread, writeEDM } from '../support/edm_golden.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { writeInstructPix2Pix } from '../support/inpainting_golden.ts';

interface Stepped {
  scheduler: string;
  config: Partial<SchedulerConfig>;
  steps: number;
  begin: number;
  /** What `step` is told beside: churn, which ours has not. */
  more: object;
  timesteps: string;
  sigmas: string;
  trajectory: string;
  draws: number;
}
interface Call {
  model: 'playground' | 'cosxl';
  kind: 'text2img' | 'img2img' | 'inpaint' | 'controlled' | 'instruct_pix2pix';
  scheduler: string | null;
  config: Partial<SchedulerConfig>;
  settings: Partial<Request> & { prompt: string };
  seed: number;
  atol: number;
  values: string;
}
const lines = goldenLines<Stepped | Call | { pixels: true; atol: number; values: string }>('edm');
const calls = lines.filter((line): line is Call => 'kind' in line);
const unpacked = (text: string): Float32Array => decodeFloats(Buffer.from(text, 'base64'), 'float32');

const folder = mkdtempSync(join(tmpdir(), 'sdxl-edm-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const base = join(goldenFolder, 'tiny-sdxl');
const device = openDevice('cpu');

const written = (name: string, like: keyof typeof edmSchedulers, from?: string): string =>
  writeEDM(at(name), like, from);
const [playground, cosxl] = [written('playground', 'playground'), written('cosxl', 'cosxl')];
const edit = written('edit', 'cosxl', writeInstructPix2Pix(at('instruct_pix2pix')));
const net = openComponent(writeControlNet(at('full'), 'full'));

test('the schedulers, step by step', (t) => {
  const onDevice = (values: Float32Array) => tensor(values, [values.length], { device });
  const stepped = lines.filter(
    (line): line is Stepped => 'steps' in line && Object.keys(line.more).length === 0,
  );
  t.equal(stepped.length, 12);
  for (const { scheduler, config, steps, begin, draws, ...want } of stepped) {
    const sampler = createSampler(scheduler, config);
    const plan = sampler.plan(steps, { strength: begin > 0 ? (steps - begin + 0.5) / steps : undefined });
    const four = (value: (i: number) => number) => Float32Array.from({ length: 4 }, (_, i) => value(i));
    const noise = onDevice(four((i) => (i - 1.5) / 2));
    const x = begin
      ? sampler.addNoise(plan, onDevice(four((i) => 0.3 * i)), noise)
      : onDevice(noise.floats().map((value) => value * plan.initNoiseSigma));
    const said = (x: Tensor, time: number) =>
      onDevice(x.floats().map((value, i) => 0.4 * value + 0.3 * time + 0.2 * i));
    let drawn = 0;
    const draw = () => {
      const k = drawn++;
      return onDevice(four((i) => (((5 * k + 3 * i) % 11) - 5) / 4));
    };
    const trajectory = [...x.floats()];
    for (const step of sampler.run(plan, () => x, said, draw)) trajectory.push(...step.x.floats());
    const label = `${scheduler} ${JSON.stringify({ config, begin })}`;
    const atol = 2e-5;
    allClose(t, `${label} timesteps`, plan.timesteps, unpacked(want.timesteps), { atol: 2e-6, rtol: 0 });
    allClose(t, `${label} sigmas`, plan.sigmas, unpacked(want.sigmas), { atol: 0, rtol: 5e-6 });
    allClose(t, label, trajectory, unpacked(want.trajectory), { atol, rtol: 1e-5 });
    t.equal(drawn, draws, `${label} draws`);
    if (config.final_sigmas_type === 'sigma_min') continue; // none falls to the last
    // A caller's own levels, the scheduler's: the same run.
    const own = sampler.plan(steps, { sigmas: [...unpacked(want.sigmas)] });
    allClose(t, `${label} own sigmas`, own.timesteps, unpacked(want.timesteps), { atol: 1e-6, rtol: 0 });
  }
  // The last step to sigma_min has no length, by which diffusers divides where a run is not short.
  const sampler = createSampler('edm_dpm++2m', { final_sigmas_type: 'sigma_min' });
  const x = onDevice(Float32Array.of(-1, 0, 1));
  const run = sampler.run(
    sampler.plan(16),
    () => x,
    (x) => x,
    () => x,
  );
  const [before, last] = Array.from(run, (step) => step.x.floats()).slice(-2);
  t.same(last, before);
  t.ok(last.every(Number.isFinite));
  t.end();
});

const pipelineFor = ({ model, kind }: Pick<Call, 'model' | 'kind'>) =>
  loadPipeline(openModel(kind === 'instruct_pix2pix' ? edit : model === 'cosxl' ? cosxl : playground), {
    ...{ device, dtype: 'float32' },
    controlnet: kind === 'controlled' ? [net] : [],
  });

test('whole calls', { timeout: 300_000 }, async (t) => {
  t.equal(calls.length, 8);
  for (const call of calls) {
    const { kind, scheduler, config, settings, seed, atol, values } = call;
    const pipeline = pipelineFor(call);
    const { latents } = await denoiseToEnd(pipeline, {
      ...{ width: 64, height: 64, ...settings },
      scheduler: { name: scheduler ?? undefined, config },
      image: ['img2img', 'inpaint', 'instruct_pix2pix'].includes(kind)
        ? preprocess(picture(4, 64, 64))
        : undefined,
      mask: kind === 'inpaint' ? preprocessMask(disc()) : undefined,
      control_image: kind === 'controlled' ? [preprocessControl(picture(1, 64, 64))] : undefined,
      generators: [new TorchGenerator(seed)],
    });
    const some = latents.data.filter((_, i) => i % 5 === 0);
    allClose(t, `${call.model} ${kind} ${scheduler}`, some, unpacked(values), { atol, rtol: 0 });
    if (call === calls[0]) {
      const [drawn] = decode(pipeline, latents);
      const pixels = lines.find((line) => 'pixels' in line) as { values: string };
      const bytes = Float32Array.from(drawn.data, (value) => value / 255).filter((_, i) => i % 50 === 0);
      allClose(t, 'pixels', bytes, unpacked(pixels.values), { atol: 0.51 / 255, rtol: 0 });
    }
    pipeline.release();
  }
});

const sample = (...argv: string[]) =>
  sdxl(
    ...['sample', '--prompt', 'a red fox in the snow', '--negative-prompt', 'rain'],
    ...(argv.includes('--timesteps') ? [] : ['--steps', '5']),
    ...[
      '--guidance-scale',
      '3',
      '--width',
      '64',
      '--height',
      '64',
      '--quiet',
      '--output',
      at('x.png'),
      ...argv,
    ],
  );
const drawnBy = async (...argv: string[]) => {
  const { status, err } = await sample('--save-latents', at('saved'), ...argv);
  if (status !== 0) throw new Error(err);
  return contents(at('saved'));
};

test('sdxl sample draws with folders and with single files, which inspect and export tell', {
  timeout: 120_000,
}, async (t) => {
  writePng(at('image.png'), picture(4, 64, 64));
  for (const [model, number, told, more, index] of [
    [playground, 0, "SDXL base, trained under EDM's noise (EDMDPMSolverMultistepScheduler)", [], {}],
    [
      ...[edit, 7, "SDXL InstructPix2Pix model, trained under EDM's noise (EDMEulerScheduler)"],
      ...[['--image', at('image.png')], { is_cosxl_edit: true }],
    ],
  ] as [string, number, string, string[], object][]) {
    const [single, back] = [at(`${number}.safetensors`), at(`${number}`)];
    t.equal((await sdxl('export', model, single, '--format', 'single-file', '--quiet')).status, 0);
    t.equal(inspect(single).kind, `original single file: ${told}`);
    const { err } = await sdxl('export', single, back, '--configs', base, '--quiet');
    t.equal(err, '');
    t.match(inspect(back).kind, /^diffusers folder: .*, trained under EDM's noise/);
    const own = parseSchedulerConfig(openModel(model).config('scheduler'));
    const kept = parseSchedulerConfig(openModel(back).config('scheduler'));
    const name = kept._class_name as 'EDMEulerScheduler';
    t.same(completeConfig(name, kept), completeConfig(name, own), 'the scheduler');
    t.match(openModel(back).modelIndex, { scheduler: ['diffusers', name], ...index });
    if (model === playground) t.match(openModel(back).config('vae'), spread, 'to the digit');
    const seed = ['--seed', String(number), ...more];
    const want = await drawnBy('--model', model, ...seed);
    t.same(await drawnBy('--model', single, '--configs', base, ...seed), want);
    if (model === edit) t.same(await drawnBy('--model', back, ...seed), want);
  }
  const seed = ['--model', playground, '--seed', '0'];
  const want = await drawnBy(...seed);
  const latents = savedLatents(at('saved'));
  const some = latents.filter((_, i) => i % 5 === 0);
  allClose(t, 'latents', some, unpacked(calls[0].values), { atol: calls[0].atol, rtol: 0 });
  const first = readFileSync(at('x.png'));
  t.equal((await sdxl('sample', '--from', at('x.png'), '--output', at('y.png'), '--quiet')).status, 0);
  t.ok(readFileSync(at('y.png')).equals(first), 'and again by its settings');
  t.notSame(await drawnBy(...seed, '--scheduler', 'edm_euler'), want);
  t.notSame(await drawnBy(...seed, '--scheduler', 'EDM DPM++ 2M Exponential'), want);
});

test("another's VAE and previews go by the model's mean and spread", async (t) => {
  const own = openModel(playground);
  const lent = vaeFor(own, openModel(base));
  t.match(lent, spread);
  const { latents_mean, scaling_factor } = vaeFor(openModel(base), own);
  t.same([latents_mean, scaling_factor], [undefined, 0.13025], 'and by none where it has none');
  const z = Float32Array.from({ length: 16 }, (_, i) => i - 7.5);
  const scaled = scaleLatents(parseVaeConfig(lent), z, 4);
  const mean = (i: number) => spread.latents_mean[i >> 2];
  const want = z.map((value, i) => ((value - mean(i)) * 0.5) / spread.latents_std[i >> 2]);
  allClose(t, 'scaled', scaled, want, { atol: 1e-6, rtol: 0 });
  // A tiny autoencoder's own latents are 0.13025 z.
  const tiny = vaeFor(own, { ...openModel(base), config: () => ({ _class_name: 'AutoencoderTiny' }) });
  const seen = scaleLatents(
    tiny as typeof spread,
    z.map((value) => value * 0.13025),
    4,
  );
  allClose(t, 'tiny', seen, want, { atol: 1e-6, rtol: 0 });
  const argv = ['--model', playground, '--seed', '0', '--steps', '2'];
  t.same(await drawnBy(...argv, '--vae', join(base, 'vae')), await drawnBy(...argv));
  const shown = await sample(...argv, '--preview', 'proj', '--preview-path', at('preview.png'));
  t.same([shown.status, shown.err], [0, ''], 'which needs no warning');
  const previewed = async (vae: object, data: Float32Array) => {
    const latents = { shape: [1, 4, 2, 2], data };
    const options = { preview: 'proj', previewPath: at('proj.png') } as const;
    const previews = openPreviews(options, undefined, { device, dtype: 'float32' }, () => {});
    const progress = { step: 1, steps: 2, timestep: 0, truncated: [], latents };
    previews.show({ vae } as never, { ...progress, predOriginalSample: () => latents });
    await previews.close();
    return readFileSync(at('proj.png'));
  };
  const usual = z.map((value) => value * 0.13025);
  const plain = await previewed({ config: {}, posterior: true }, usual);
  t.ok((await previewed({ config: spread, posterior: true }, scaled)).equals(plain), "SDXL's colours");
  t.ok((await previewed({ config: tiny, posterior: false }, scaled)).equals(plain), 'under a tiny one, too');
  t.notOk((await previewed({ config: {}, posterior: true }, scaled)).equals(plain));
});

/** Tensors of a single file over those of another. */
function marked(name: string, marks: Record<string, readonly number[]>): string {
  const file = openSafetensors(at('7.safetensors'));
  const kept = [...file.tensors.values()]
    .filter((tensor) => !tensor.name.startsWith('edm_'))
    .map(({ name, dtype, shape }): TensorEntry => ({ name, dtype, shape, bytes: file.read(name) }));
  file.close();
  const more = Object.entries(marks).map(
    ([name, values]): TensorEntry => ({
      ...{ name, dtype: 'float32', shape: [1, values.length, 1, 1] },
      bytes: encodeNumbers(Float32Array.from(values), 'float32'),
    }),
  );
  writeSafetensors(at(name), [...kept, ...more]);
  return at(name);
}

test('marks as other programs write them, and damaged ones', (t) => {
  const vae = openSingleFile(
    marked('mean.safetensors', { edm_mean: spread.latents_mean, edm_std: spread.latents_std }),
    { configs: base },
  );
  t.match(vae.config('vae'), spread);
  const alone = openSingleFile(marked('max.safetensors', { 'edm_vpred.sigma_max': [100] }), {
    configs: base,
  });
  t.match(alone.config('scheduler'), { sigma_max: 100, sigma_min: 0.002, sigma_data: 1 });
  for (const [marks, says] of [
    [{ edm_mean: [0, 0, 0, 0] }, /edm_std, which tells of the model's noise, must be there too/],
    [{ edm_mean: [0, 0], edm_std: [1, 1] }, /edm_mean, .* must be 4 numbers, finite; download/],
    [{ edm_mean: [0, 0, 0, 0], edm_std: [1, 1, 0, 1] }, /edm_std, .* must be numbers above 0/],
    [{ 'edm_vpred.sigma_max': [Number.NaN] }, /sigma_max, .* must be one number, finite/],
    [{ 'edm_vpred.sigma_max': [1], 'edm_vpred.sigma_min': [2] }, /must be a number above sigma_min/],
  ] as const)
    t.throws(() => openSingleFile(marked('bad.safetensors', marks as never), { configs: base }), {
      name: 'UserError',
      message: says,
    });
  t.end();
});

test('mistakes', async (t) => {
  const of = (name: string, like: keyof typeof edmSchedulers, more: object) => {
    const model = written(name, like);
    change(join(model, 'scheduler', 'scheduler_config.json'), more);
    return model;
  };
  const flow = of('flow', 'cosxl', { _class_name: 'FlowMatchEulerDiscreteScheduler' });
  const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
  await refusesEach(t, sample, [
    [
      ['--model', playground, '--scheduler', 'dpm++2m_karras'],
      /^error: the model was trained under EDM's noise \(EDMDPMSolverMultistepScheduler\), from which DPMSolverMultistepScheduler draws nothing but noise: leave the scheduler out, or take edm_euler/,
    ],
    [
      ['--model', base, '--scheduler', 'edm_euler'],
      /and this is none: leave the scheduler out, or take another/,
    ],
    [
      ['--model', cosxl, '--denoising-end', '0.8', '--save-latents', at('none')],
      /parts of the timesteps of training, of which EDMEuler/,
    ],
    [
      ['--model', cosxl, '--timesteps', '999,500'],
      /EDMEulerScheduler takes no timesteps of yours, .*: give sigmas/,
    ],
    [
      ['--model', playground, '--refiner', refiner],
      /goes on from SDXL's latents, and those of .* leave --refiner out/,
    ],
    [['--model', flow], /_class_name is FlowMatch.*: the model was trained under another noise/],
    [
      ['--model', of('sample', 'cosxl', { prediction_type: 'sample' })],
      /must be "epsilon" or "v_prediction" for EDM/,
    ],
    [
      ['--model', of('ends', 'cosxl', { sigma_max: 0.001 })],
      /sigma_min is 0\.002, but must be above 0 and below/,
    ],
    [['--model', of('data', 'cosxl', { sigma_data: 0 })], /sigma_data is 0, but must be a number above 0/],
    [['--model', of('layout', 'cosxl', { sigma_schedule: 'beta' })], /sigma_schedule is "beta"/],
    [
      ['--model', of('first', 'playground', { algorithm_type: 'dpmsolver', final_sigmas_type: 'sigma_min' })],
      /must be "dpmsolver\+\+" or "sde-dpmsolver\+\+" for EDM/,
    ],
  ]);
  await refusesEach(
    t,
    (...argv) => sdxl('export', ...argv, at('none.safetensors'), '--format', 'single-file', '--quiet'),
    [
      [[of('wide', 'cosxl', { sigma_data: 0.5 })], /and this model has others: export a folder/],
      [[of('high', 'playground', { sigma_max: 100 })], /and this model has others: export a folder/],
    ],
  );
  const scheduler = openModel(cosxl).config('scheduler');
  t.throws(() => samplerFor({ scheduler: parseSchedulerConfig(scheduler) }, { scheduler: { name: 'lcm' } }), {
    message: /LCMScheduler draws nothing but noise/,
  });
});
