// How a run's steps are laid out, apart from diffusers' recorded ones: by a caller, and at counts where diffusers itself goes wrong.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { combine } from '../../engine/ops/combine.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import type { SchedulerConfig } from '../../models/samplers/config.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import type { PlanOptions } from '../../models/samplers/sampler.ts';
import { goldenFolder } from '../support/golden.ts';

const sdxl = parseSchedulerConfig(
  JSON.parse(readFileSync(join(goldenFolder, 'tiny-sdxl', 'scheduler', 'scheduler_config.json'), 'utf8')),
);

test('sums of latents', (t) => {
  const device = openDevice('auto');
  const x = (...values: number[]) => tensor(values, [values.length], { device });
  scope(() => {
    const many = Array.from({ length: 9 }, (_, k) => [k + 1, x(k, -k)] as const);
    t.same([...combine(...many).floats()], [240, -240], 'of more terms than a launch takes');
    const wild = x(Number.POSITIVE_INFINITY, Number.NaN);
    t.same([...combine([0, wild], [2, x(1, 2)]).floats()], [2, 4], 'what has no weight is left out');
    t.same([...combine([0, wild], [0, wild]).floats()], [0, 0], 'all of it');
    // 1e8 is even in float32: summed there the ones would be lost.
    t.same([...combine([1, x(1e8)], [1, x(3)], [-1, x(1e8)]).floats()], [3], 'in float64');
    t.throws(() => combine([1, x(1, 2)], [1, x(1)]), { message: /combine: \[2\] and \[1\] differ/ });
  });
  t.end();
});

test("a caller's own steps", (t) => {
  const [euler, solver] = ['euler', 'dpm++2m'].map((name) => createSampler(name, sdxl));
  t.same([...solver.plan(3, { timesteps: [999, 500, 10] }).timesteps], [999, 500, 10]);
  for (const [sampler, options, says] of [
    [euler, { timesteps: [500, 999] }, /timesteps are 500, 999: give whole numbers below 1000, each smaller/],
    [euler, { timesteps: [1000] }, /give whole numbers below 1000/],
    [euler, { timesteps: [9.5] }, /give whole numbers/],
    [euler, { sigmas: [14, 14, 0] }, /sigmas are 14, 14, 0: give the noise levels/],
    [euler, { sigmas: [14] }, /and the one to end at/],
    [euler, { sigmas: [14, 0], timesteps: [999] }, /^timesteps and sigmas both lay out the steps: give one/],
    [solver, { sigmas: [14, 0] }, /DPMSolverMultistepScheduler takes no sigmas of yours; Euler does/],
    // These two step by an even share of the range, whatever timestep is next: a picture by others would be wrong.
    [
      createSampler('ddim', sdxl),
      { timesteps: [999, 500] },
      /DDIMScheduler takes no timesteps of yours; Euler/,
    ],
    [createSampler('plms', sdxl), { timesteps: [999, 500] }, /PNDMScheduler takes no timesteps of yours/],
    [
      createSampler('dpm++2m_karras', sdxl),
      { timesteps: [999, 500] },
      /^Karras, .* lay out the steps themselves/,
    ],
  ] as const)
    t.throws(() => sampler.plan(1, options), { name: 'UserError', message: says });
  t.end();
});

test('a part without steps, and what has chosen it', (t) => {
  const euler = createSampler('euler', sdxl);
  for (const [options, mend] of [
    [{ strength: 0.05 }, 'raise strength (--strength), or give more steps'],
    [{ denoisingEnd: 0.001 }, 'raise denoising_end, or give more steps'],
    [{ strength: 1, denoisingEnd: 0.001 }, 'raise denoising_end, or give more steps'],
    [
      { strength: 0.5, denoisingEnd: 0.4 },
      'raise strength (--strength), or raise denoising_end, or give more steps',
    ],
    [{ denoisingStart: 0.999 }, 'lower denoising_start, or give more steps'],
    [
      { denoisingStart: 0.42, denoisingEnd: 0.48 },
      'lower denoising_start, or raise denoising_end, or give more steps',
    ],
  ] as const)
    t.throws(() => euler.plan(10, options), {
      name: 'UserError',
      message: `these settings leave none of the 10 steps to run: ${mend}`,
    });
  t.end();
});

test('trailing timesteps are as many as steps, and none lies past the training range', (t) => {
  for (const name of ['euler', 'ddim', 'ddpm', 'dpm++2m']) {
    const { plan } = createSampler(name, { ...sdxl, timestep_spacing: 'trailing' });
    // numpy's arange, which diffusers has here, gives one more for each of these, at -1.
    for (const steps of [61, 103, 121, 206, 999]) {
      const { timesteps } = plan(steps);
      t.equal(timesteps.length, steps, `${name}, ${steps} steps`);
      t.ok(timesteps[0] === 999 && timesteps[steps - 1] >= 0);
    }
  }
  const { plan } = createSampler('ddim', { ...sdxl, timestep_spacing: 'leading', steps_offset: 1 });
  t.throws(() => plan(1000), {
    message: /^1000 steps with this spacing begin past the last training timestep/,
  });
  t.same([...plan(999).timesteps.subarray(0, 2)], [999, 998]);
  t.end();
});

test("timesteps that students were distilled on, by numpy's rounding", (t) => {
  for (const name of ['lcm', 'tcd']) {
    const { timesteps } = createSampler(name, { ...sdxl, original_inference_steps: 1000 }).plan(76);
    t.same(
      [18, 19, 20, 38, 75].map((i) => timesteps[i]),
      [763, 750, 736, 500, 13],
      `${name}, as in diffusers`,
    );
  }
  t.end();
});

/** Latents before and after the last step, and x_0 then, of a run whose network says something of its input and timestep. */
function lastStep(
  name: string,
  config: Partial<SchedulerConfig>,
  steps: number,
  options: PlanOptions = {},
): Float32Array[] {
  const device = openDevice('auto');
  const x = (values: ArrayLike<number>) => tensor(Float32Array.from(values), [1, 2], { device });
  const sampler = createSampler(name, { ...sdxl, ...config });
  const loop = sampler.run(
    sampler.plan(steps, options),
    () => x([1, -0.5]),
    (input, timestep) => x([...input.floats()].map((value, i) => 0.3 * value + 0.1 * i + timestep / 1e4)),
    () => x([0.3, -0.2]),
  );
  let seen: Float32Array[] = [];
  for (const result of loop) seen = [seen[1], result.x.floats(), result.predOriginalSample().floats()];
  return seen;
}

test('a last step that goes nowhere leaves the latents, and one to 0 ends at x_0', (t) => {
  // diffusers has NaN for each of these, or the infinite: the step's length is a divisor there.
  const toLeast = { final_sigmas_type: 'sigma_min', lower_order_final: false } as const;
  for (const [name, config] of [
    ['dpm++2m_sde', { solver_type: 'heun' }],
    ['dpm++2m', { solver_type: 'heun' }],
    ['dpm++2m', { solver_order: 3 }],
    ['unipc', { solver_order: 3 }],
    ['unipc', { solver_order: 3, predict_x0: false }],
  ] as const)
    for (const schedule of ['karras', 'exponential', 'normal', 'simple', 'ays', 'beta'] as const) {
      const given = { ...toLeast, ...config, sigma_schedule: schedule };
      // UniPC corrects the step before with the last output, so its last latents differ by that.
      const corrector = name === 'unipc' ? { disable_corrector: [0, 1, 2, 3, 4] } : {};
      const [before, last] = lastStep(name, { ...given, ...corrector }, 6);
      t.same(last, before, `${name} ${JSON.stringify(config)} ${schedule}`);
    }
  const lowers = { ...toLeast, solver_order: 3, lower_order_final: true, sigma_schedule: 'karras' } as const;
  const [before, last] = lastStep('dpm++2m', lowers, 16);
  t.same(last, before, 'from 15 steps on no order is lowered');
  for (const solver_order of [2, 3]) {
    const [, end, x0] = lastStep('unipc', { solver_order, lower_order_final: false }, 6);
    t.same(end, x0, `unipc of order ${solver_order}`);
  }
  t.throws(() => createSampler('unipc', { predict_x0: false }), {
    name: 'UserError',
    message:
      /^the scheduler config's predict_x0 false cannot step to sigma 0: set final_sigmas_type to "sigma_/,
  });
  t.end();
});

test("Karras' levels over squared cosines: timesteps cut to whole numbers, as diffusers, and of other betas rounded", (t) => {
  const bar = (x: number) => Math.cos((((x + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  let product = 1;
  const sigmas = Array.from({ length: 1000 }, (_, i) => {
    product *= 1 - Math.min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999);
    return Math.sqrt((1 - product) / product);
  });
  const [low, high] = [sigmas[0], sigmas[999]].map((sigma) => sigma ** (1 / 7));
  const wanted = Array.from({ length: 8 }, (_, i) => {
    const level = (high + (i / 7) * (low - high)) ** 7;
    const above = Math.max(
      1,
      sigmas.findIndex((sigma, k) => sigma >= level || k === 999),
    );
    const [a, b, x] = [sigmas[above - 1], sigmas[above], level].map(Math.log);
    return above - 1 + (x - a) / (b - a);
  });
  const config = { ...sdxl, use_karras_sigmas: true, beta_schedule: 'squaredcos_cap_v2' } as const;
  const { timesteps } = createSampler('DPMSolverMultistepScheduler', config).plan(8);
  const inner = (list: Iterable<number>) => [...list].slice(1, -1); // the ends are whole, but for rounding
  t.same(inner(timesteps), inner(wanted).map(Math.trunc));
  t.notSame(inner(timesteps), inner(wanted).map(Math.round), 'of which some would go up');
  t.end();
});

test('lu lambdas come before beta sigmas, as in diffusers', (t) => {
  const config = { ...sdxl, use_lu_lambdas: true, use_beta_sigmas: true };
  const { timesteps, sigmas } = createSampler('DPMSolverMultistepScheduler', config).plan(5);
  t.same([...timesteps], [999, 681, 233, 20, 0]);
  const theirs = [14.6146, 3.089, 0.6529, 0.138, 0.0292, 0];
  t.ok(theirs.every((sigma, i) => Math.abs(sigma - sigmas[i]) < 1e-4));
  t.end();
});

test('x_0 is told within the range that the config sets, as in diffusers', (t) => {
  const [, x, x0] = lastStep('ddim', { clip_sample: true, clip_sample_range: 0.5 }, 4);
  for (const [got, theirs] of [
    [x, [0.5042, -0.4552]],
    [x0, [0.5, -0.4543]],
  ] as const)
    t.ok(theirs.every((value, i) => Math.abs(value - got[i]) < 1e-4));
  t.end();
});

test("TCD's way to 0.7 of a timestep, which is whole in float32 alone, as in diffusers", (t) => {
  const [first, last] = lastStep('tcd', {}, 2, { timesteps: [999, 700], eta: 0.3 });
  for (const [got, theirs] of [
    [first, [2.96274, -2.46025]],
    [last, [7.14147, -6.68395]],
  ] as const)
    t.ok(theirs.every((value, i) => Math.abs(value - got[i]) < 2e-5));
  t.end();
});

/** The noise that a run draws. */
const noise = (k: number) => Math.sin(3 * k + 1);

/** A run over a network that always says half of what it is shown, with the noise that its steps drew. */
function runOf(name: string, etaAncestral?: number) {
  const device = openDevice('auto');
  const sampler = createSampler(name, sdxl);
  const plan = sampler.plan(6, { etaAncestral });
  let draws = 0;
  return scope(() => {
    const begin = () => tensor([plan.initNoiseSigma, -plan.initNoiseSigma / 2], [2], { device });
    const draw = () => tensor([noise(++draws), noise(-draws)], [2], { device });
    const run = sampler.run(plan, begin, (x) => combine([0.5, x]), draw);
    let result = run.next();
    while (!result.done) result = run.next();
    return [...result.value.floats()];
  });
}

test("what is left of a step's noise by k-diffusion's eta", (t) => {
  const near = (got: number[], want: number[], what: string) =>
    got.forEach((each, i) => {
      t.ok(Math.abs(each - want[i]) <= 2e-5 * Math.max(1, Math.abs(want[i])), `${what}: ${each}, ${want[i]}`);
    });
  // Without noise they are the methods that they come from, which are held against diffusers.
  for (const [noisy, plain] of [
    ['euler_a', 'euler'],
    ['dpm2_a', 'dpm2'],
    ['dpm++2m_sde', 'dpm++2m'],
  ])
    near(runOf(noisy, 0), runOf(plain), noisy);
  const others = ['dpm++2m_sde_heun', 'dpm++2s_a', 'dpm++3m_sde'];
  for (const name of ['euler_a', 'dpm2_a', 'dpm++sde', 'dpm++2m_sde', ...others]) {
    t.same(runOf(name, 1), runOf(name), `${name}: all of it by itself`);
    t.notSame(runOf(name, 0.5), runOf(name));
  }
  t.throws(() => runOf('euler_a', 2), /^eta_ancestral is 2: give a number from 0 to 1/);
  t.end();
});

/** get_ancestral_step of k-diffusion. */
function ancestralStep(from: number, to: number, eta: number) {
  const up = Math.min(to, eta * Math.sqrt((to ** 2 * (from ** 2 - to ** 2)) / from ** 2));
  return { up, down: Math.sqrt(to ** 2 - up ** 2) };
}

/** x_0 where the network says half of what it is shown. */
const clean = (x: number, sigma: number) => x - (0.5 * sigma * x) / Math.sqrt(sigma ** 2 + 1);

test('steps of DPM++ SDE and Euler a with half of their noise, in float64', (t) => {
  const [sde, euler] = ['dpm++sde', 'euler_a'].map((name) => createSampler(name, sdxl).plan(6));
  let [x, draws] = [euler.initNoiseSigma, 0];
  for (let i = 0; i < 6; i++) {
    const [sigma, next] = [euler.sigmas[i], euler.sigmas[i + 1]];
    const { up, down } = ancestralStep(sigma, next, 0.5);
    x = x + ((x - clean(x, sigma)) / sigma) * (down - sigma) + up * noise(++draws);
  }
  const [drawn] = runOf('euler_a', 0.5);
  t.ok(Math.abs(drawn - x) < 2e-5 * Math.abs(x), `${drawn}, ${x}`);

  [x, draws] = [sde.initNoiseSigma, 0];
  const sigmas = [...Array.from({ length: 6 }, (_, i) => sde.sigmas[2 * i]), 0];
  for (let i = 0; i < 6; i++) {
    const [sigma, next] = [sigmas[i], sigmas[i + 1]];
    if (next === 0) {
      x = clean(x, sigma);
      break;
    }
    const middle = Math.sqrt(sigma * next);
    const go = (to: number, x0: number) => {
      const { up, down } = ancestralStep(sigma, to, 0.5);
      return (down / sigma) * x + (1 - down / sigma) * x0 + up * noise(++draws);
    };
    x = go(next, clean(go(middle, clean(x, sigma)), middle));
  }
  const [half] = runOf('dpm++sde', 0.5);
  t.ok(Math.abs(half - x) < 1e-4 * Math.max(1, Math.abs(x)), `${half}, ${x}`);
  t.end();
});

test("steps of DPM++ 2S a and DPM++ 3M SDE are k-diffusion's, in float64", (t) => {
  for (const [eta, layout] of [
    [1, ''],
    [0.5, '_karras'],
    [0, '_exponential'],
  ] as const) {
    const { sigmas, initNoiseSigma } = createSampler(`euler${layout}`, sdxl).plan(6);
    const want = { 'dpm++2s_a': ancestral2s, 'dpm++3m_sde': sde3m };
    for (const [name, steps] of Object.entries(want)) {
      const x = steps(initNoiseSigma, [...sigmas], eta);
      const [got] = runOf(`${name}${layout}`, eta);
      t.ok(Math.abs(got - x) < 2e-5 * Math.max(1, Math.abs(x)), `${name}${layout} ${eta}: ${got}, ${x}`);
    }
  }
  const [once, twice] = ['euler_karras', 'dpm++2s_a_karras'].map((name) => createSampler(name, sdxl).plan(6));
  const [begins, middles] = [0, 1].map((part) => twice.timesteps.filter((_, i) => i % 2 === part));
  t.same(begins, once.timesteps, "between whole timesteps, unlike diffusers' DPM2 a");
  t.ok(middles.every((time, i) => time < begins[i] && time > 0));
  t.end();
});

/** sample_dpmpp_2s_ancestral */
function ancestral2s(start: number, sigmas: readonly number[], eta: number): number {
  let [x, draws] = [start, 0];
  for (let i = 0; i < sigmas.length - 1; i++) {
    const [sigma, next] = [sigmas[i], sigmas[i + 1]];
    const { up, down } = ancestralStep(sigma, next, eta);
    if (down === 0) {
      x += ((x - clean(x, sigma)) / sigma) * (down - sigma);
      continue;
    }
    const [t, h] = [-Math.log(sigma), Math.log(sigma) - Math.log(down)];
    const middle = Math.exp(-(t + h / 2));
    const halfway = (middle / sigma) * x - Math.expm1(-h / 2) * clean(x, sigma);
    x = (down / sigma) * x - Math.expm1(-h) * clean(halfway, middle) + up * noise(++draws);
  }
  return x;
}

/** sample_dpmpp_3m_sde */
function sde3m(start: number, sigmas: readonly number[], eta: number): number {
  let [x, draws] = [start, 0];
  let before: { x0: number; h: number }[] = [];
  for (let i = 0; i < sigmas.length - 1; i++) {
    const x0 = clean(x, sigmas[i]);
    if (sigmas[i + 1] === 0) return x0;
    const h = Math.log(sigmas[i] / sigmas[i + 1]);
    const far = h * (eta + 1);
    x = Math.exp(-far) * x - Math.expm1(-far) * x0;
    const phi2 = Math.expm1(-far) / far + 1;
    const [one, two] = before;
    if (two) {
      const [r0, r1] = [one.h / h, two.h / h];
      const [near, older] = [(x0 - one.x0) / r0, (one.x0 - two.x0) / r1];
      const first = near + ((near - older) * r0) / (r0 + r1);
      x += phi2 * first - ((phi2 / far - 0.5) * (near - older)) / (r0 + r1);
    } else if (one) x += (phi2 * (x0 - one.x0)) / (one.h / h);
    x += noise(++draws) * sigmas[i + 1] * Math.sqrt(-Math.expm1(-2 * h * eta));
    before = [{ x0, h }, ...before];
  }
  return x;
}
