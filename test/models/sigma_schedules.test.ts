// Noise levels as A1111, Forge, ComfyUI and stable-diffusion.cpp lay them out, by their own functions (golden/sigma_schedules.jsonl), under
// every scheduler that has levels; and pictures by them against diffusers' Euler given the same levels.
import { join } from 'node:path';
import { test } from 'tap';
import { tensor } from '../../engine/tensor.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { type SigmaSchedule, sigmaSchedules } from '../../models/samplers/config.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { createSampler, isSamplerName } from '../../models/samplers/registry.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { says } from '../support/mistake.ts';
import { devices } from '../support/models_golden.ts';

interface Line {
  schedule: SigmaSchedule;
  steps: number;
  sigmas: string;
  /** What each program calls it. */
  names: Partial<Record<'A1111' | 'ComfyUI' | 'stable-diffusion.cpp', string[]>>;
}
interface Call {
  call: SigmaSchedule;
  steps: number;
  atol: number;
  values: string;
}

interface Run {
  run: string;
  steps: number;
  last: string;
}

const recorded = goldenLines<Line | Run | Call>('sigma_schedules');
const lines = recorded.filter((line): line is Line => 'sigmas' in line);
const runs = recorded.filter((line): line is Run => 'run' in line);
const calls = recorded.filter((line): line is Call => 'call' in line);
const unpacked = (text: string) => decodeFloats(Buffer.from(text, 'base64'), 'float32');

const sdxl = {
  ...{ beta_start: 0.00085, beta_end: 0.012, beta_schedule: 'scaled_linear' as const },
  ...{ timestep_spacing: 'linspace' as const, steps_offset: 1 },
};

/** Where a timestep stands in the training table, by k-diffusion's formula over a table in float64. */
function timestepOf(sigma: number): number {
  let product = 1;
  const logs = Array.from({ length: 1000 }, (_, i) => {
    const root = Math.sqrt(0.00085) + (i / 999) * (Math.sqrt(0.012) - Math.sqrt(0.00085));
    product *= 1 - root * root;
    return Math.log(Math.sqrt((1 - product) / product));
  });
  const above = logs.findIndex((each) => each > Math.log(sigma));
  if (above === 0) return 0;
  if (above < 0) return 999;
  return above - 1 + (Math.log(sigma) - logs[above - 1]) / (logs[above] - logs[above - 1]);
}

test('levels are those of each program', (t) => {
  t.same(new Set(lines.map((line) => line.schedule)), new Set(sigmaSchedules), 'every schedule');
  for (const { schedule, steps, sigmas, names } of lines) {
    const want = unpacked(sigmas);
    const label = `${schedule} ${steps}, ${JSON.stringify(names)}`;
    const plan = createSampler(`euler_${schedule}`, sdxl).plan(steps);
    // float32's tangent and power, which some of them take, are that much off.
    allClose(t, label, plan.sigmas, want, { atol: 0, rtol: 1e-6 });
    const timesteps = want.subarray(0, -1).map(timestepOf);
    allClose(t, `${label}: timesteps`, plan.timesteps, timesteps, { atol: 2e-3, rtol: 0 });
  }
  t.equal(createSampler('euler_ddim_uniform', sdxl).plan(30).steps, 31, 'one more, as there');
  t.equal(createSampler('euler_lcm', sdxl).plan(100).steps, 50, 'none comes twice');
  const lower = ['karras', 'exponential', 'beta', 'ddim_uniform']; // as diffusers' linspace and ComfyUI have it
  for (const each of sigmaSchedules.filter((schedule) => !lower.includes(schedule)))
    t.ok(createSampler(`euler_${each}`, sdxl).plan(1).sigmas[0] > 14.2, `${each} begins at the top`);
  t.end();
});

test('every scheduler that has levels takes them', (t) => {
  for (const schedule of ['sgm_uniform', 'kl_optimal', 'ays'] as const) {
    const euler = createSampler(`euler_${schedule}`, sdxl).plan(6);
    for (const name of [
      'euler_a',
      'lms',
      'dpm++3m_sde',
      'dpm++2m',
      'dpm++2m_sde',
      'dpm++2s',
      'unipc',
      'deis',
    ]) {
      const plan = createSampler(`${name}_${schedule}`, { ...sdxl, use_karras_sigmas: true }).plan(6);
      const label = `${name} ${schedule}`;
      t.same(plan.timesteps, euler.timesteps, label);
      t.same(plan.sigmas.subarray(0, 6), euler.sigmas.subarray(0, 6), label);
      // DEIS in diffusers has no step to 0.
      if (name !== 'deis') t.equal(plan.sigmas[6], euler.sigmas[6], label);
    }
    for (const name of ['heun', 'dpm2', 'dpm2_a', 'dpm++2s_a', 'dpm++sde']) {
      const plan = createSampler(`${name}_${schedule}`, sdxl).plan(6);
      t.same(
        plan.timesteps.filter((_, i) => i % 2 === 0),
        euler.timesteps,
        `${name} ${schedule}`,
      );
    }
  }
  const again = createSampler('euler_karras', { ...sdxl, sigma_schedule: 'simple' });
  t.same(
    [again.config.use_karras_sigmas, again.config.sigma_schedule],
    [true, undefined],
    'a name overrides',
  );
  const same = createSampler('euler', { ...sdxl, sigma_schedule: 'karras' }).config;
  t.strictSame(same, createSampler('euler_karras', sdxl).config, "diffusers' word and EDM's");
  const kept = createSampler('dpm++2m', { ...sdxl, sigma_schedule: 'ays' }).plan(6);
  t.same(kept.sigmas, createSampler('dpm++2m_ays', sdxl).plan(6).sigmas, "a model's config has it too");
  const least = createSampler('euler_ays', { ...sdxl, final_sigmas_type: 'sigma_min' }).plan(6).sigmas;
  t.equal(least[6], least[5], 'where the config lets it not end at 0');
  t.end();
});

test("steps over them are k-diffusion's", (t) => {
  const [device] = devices;
  const onDevice = (values: Float32Array) => tensor(values, [1, 4], { device });
  const noise = Float32Array.from({ length: 4 }, (_, i) => i - 1.5);
  const said = (x: Float32Array, timestep: number) =>
    x.map((value, i) => 0.1 * value + timestep / 100_000 + noise[i] / 4);
  t.equal(runs.length, 4);
  for (const { run, steps, last } of runs) {
    const sampler = createSampler(run, sdxl);
    const plan = sampler.plan(steps);
    // Latents of DPM-Solver are those of k-diffusion at unit variance.
    const start = plan.inputSigmas ? plan.sigmas[0] : plan.marginal(0).noise;
    const loop = sampler.run(
      plan,
      () => onDevice(noise.map((value) => value * start)),
      (x, timestep) => onDevice(said(x.floats(), timestep)),
      () => onDevice(noise.map((_, i) => i / 2)),
    );
    let result: Float32Array = noise;
    for (const { x } of loop) result = x.floats();
    allClose(t, run, result, unpacked(last), { atol: 2e-5, rtol: 1e-5 });
  }
  t.end();
});

test('names', (t) => {
  for (const [spelling, name] of [
    ['DPM++ 2M Align Your Steps', 'dpm++2m_align_your_steps'],
    ['DPM++ 2M SDE SGM Uniform', 'dpm++2m_sde_sgm_uniform'],
    ['dpmpp_2m_sgm_uniform', 'dpm++2m_sgm_uniform'],
    ['euler_ancestral_simple', 'euler_a_simple'],
    ['EulerAncestralDiscreteScheduler ays', 'euler_a_ays'],
    ['Euler Uniform', 'euler_normal'],
    ['Euler DDIM', 'euler_ddim_uniform'],
    ['Euler Polyexponential', 'euler_exponential'],
    ['euler_ays', 'euler_ays'], // and not Euler a with "ys"
  ]) {
    const [got, want] = [createSampler(spelling, sdxl), createSampler(name, sdxl)];
    t.equal(got.name, want.name, spelling);
    t.strictSame(got.config, want.config, spelling);
  }
  for (const [name, message] of [
    [
      'ddim_simple',
      /^scheduler "ddim_simple": DDIMScheduler goes by timesteps and has no noise levels to lay/,
    ],
    ['LCM SGM Uniform', /LCMScheduler goes by timesteps .* take another, such as euler_sgm_uniform$/],
    ['edm_euler_ays', /models under EDM's noise have no timesteps, .*: take karras or exponential$/],
    ['ays', /unknown scheduler "ays", but a layout .* as in dpm\+\+2m_ays/],
    ['euler_aya', /unknown scheduler "euler_aya"; did you mean "euler_ays"/],
  ] as const) {
    t.throws(() => createSampler(name), says(message), name);
    t.notOk(isSamplerName(name), name);
  }
  t.throws(
    () => createSampler('euler', { use_karras_sigmas: true, sigma_schedule: 'ays' }),
    says(/several of .* and sigma_schedule: keep one/),
  );
  t.throws(() => parseSchedulerConfig({ sigma_schedule: 'aya' }), says(/sigma_schedule is "aya".*"ays"/));
  t.throws(
    () => createSampler('euler_ays', sdxl).plan(3, { timesteps: [9, 5, 1] }),
    says(/lay out the steps/),
  );
  t.equal(createSampler('ddim', { sigma_schedule: 'ays' }).config.sigma_schedule, undefined, 'passed over');
  t.end();
});

test('a part of levels that are fewer than the steps is a part of them', (t) => {
  for (const name of ['euler_lcm', 'heun_lcm', 'dpm++2m_lcm']) {
    const { begin, timesteps } = createSampler(name, sdxl).plan(100, { strength: 0.3 });
    t.equal(timesteps[begin], 299, name);
  }
  t.end();
});

test("pictures by diffusers' Euler, given the levels", async (t) => {
  const [device] = devices;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  for (const { call, steps, atol, values } of calls) {
    const { latents } = await denoiseToEnd(pipeline, {
      ...{ prompt: 'a red fox', num_inference_steps: steps, guidance_scale: 3, width: 64, height: 64 },
      scheduler: { name: `euler_${call}`, config: { timestep_spacing: 'linspace' } },
      generators: [new TorchGenerator(7)],
    });
    const every = latents.data.filter((_, i) => i % 5 === 0);
    allClose(t, `${call} ${steps}`, every, unpacked(values), { atol, rtol: 0 });
  }
  t.equal(calls.length, 2);
  pipeline.release();
});
