// The parts of the objective that golden data lacks, against their formulas: weights by signal-to-noise ratio, the spread of
// timesteps, kinds of noise, and that a batch's split changes no draw. The VAE's loss against float64.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { sdxlScheduler } from '../../models/formats/presets.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import type { UNet } from '../../models/unet/unet.ts';
import { draws } from '../../train/data/draws.ts';
import { drawNoise } from '../../train/objective/noise.ts';
import {
  diffusionLoss,
  drawTimestep,
  lossWeight,
  noiseBatch,
  noisedInputs,
  type ObjectiveSettings,
  objectiveOf,
} from '../../train/objective/objective.ts';
import { vaeLoss } from '../../train/objective/vae_objective.ts';
import { place } from '../../train/passes/pass.ts';
import { fill } from '../../train/run/fields.ts';
import { fields } from '../../train/run/run_fields.ts';
import { allClose } from '../support/golden.ts';

const device = openDevice('auto');
const scheduler = parseSchedulerConfig(sdxlScheduler);
/** What a run has that says nothing: epsilon, mean squared error, no weights. */
const plain = fill(fields, {}, 'defaults').objective;
const v = { ...plain, prediction_type: 'v_prediction' } as const;
const exact = { atol: 1e-6, rtol: 1e-6 };

test('weights by signal-to-noise ratio', (t) => {
  const abars = [0.9, 0.5, 0.1]; // ratios 9, 1 and 1/9
  const weights = (settings: ObjectiveSettings) => abars.map((abar) => lossWeight(settings, abar));
  allClose(t, 'none', weights(plain), [1, 1, 1], exact);
  allClose(t, 'min-SNR', weights({ ...plain, snr_gamma: 5 }), [5 / 9, 1, 1], exact);
  allClose(t, 'min-SNR, v', weights({ ...v, snr_gamma: 5 }), [5 / 10, 1 / 2, 1 / 10], exact);
  allClose(t, 'debiased', weights({ ...plain, debiased: true }), [1 / 3, 1, 3], exact);
  allClose(t, 'debiased, v', weights({ ...v, debiased: true }), [3 / 10, 1 / 2, 3 / 10], exact);
  // The error of v is that of epsilon times (s + 1) / s, so either way an error of x_0 must weigh the same.
  const shares = abars.map((abar, i) => {
    const s = abar / (1 - abar);
    const [e, w] = [weights({ ...plain, debiased: true }), weights({ ...v, debiased: true })];
    return (w[i] * (s + 1)) / (e[i] * s);
  });
  allClose(t, 'debiased weighs x_0 alike', shares, [1, 1, 1], exact);
  t.equal(lossWeight({ ...v, snr_gamma: 5 }, 0), 0, 'pure noise');
  // kohya's two: by s / (s + 1), s being 1000 at the most, alone and over another weight.
  const [like, scaled] = [
    { ...plain, v_pred_like_loss: 0.3 },
    { ...v, scale_v_pred_loss_like_noise_pred: true },
  ];
  allClose(t, 'v_pred_like_loss', weights(like), [1 + 0.3 / 0.9, 1 + 0.3 / 0.5, 1 + 0.3 / 0.1], exact);
  allClose(t, 'with min-SNR', weights({ ...like, snr_gamma: 5 }), [(5 / 9) * (1 + 1 / 3), 1.6, 4], exact);
  allClose(t, 'scaled like noise', weights(scaled), [0.9, 0.5, 0.1], exact);
  allClose(t, 'and debiased', weights({ ...scaled, debiased: true }), [0.27, 0.25, 0.03], exact);
  allClose(t, 'least noise', [lossWeight(scaled, 0.9999)], [1000 / 1001], exact);
  t.throws(
    () => objectiveOf({ ...like, prediction_type: 'v_prediction' }, scheduler),
    /which the model predicts/,
  );
  t.throws(() => objectiveOf({ ...scaled, prediction_type: '' }, scheduler), /the model predicts noise/);
  t.end();
});

test('zero-terminal SNR', (t) => {
  const { alphasCumprod } = objectiveOf({ ...v, zero_terminal_snr: true }, scheduler);
  t.equal(alphasCumprod[999], 0);
  const usual = objectiveOf(v, scheduler).alphasCumprod;
  t.ok(usual[999] > 0.004 && alphasCumprod[0] === usual[0]);
  t.throws(() => objectiveOf({ ...plain, zero_terminal_snr: true }, scheduler), /v_prediction/);
  t.throws(() => objectiveOf({ ...plain, debiased: true, snr_gamma: 5 }, scheduler), /choose one/);
  t.end();
});

test('a run that says nothing predicts what its model predicts', (t) => {
  const predicted = (settings: ObjectiveSettings, own: string) =>
    objectiveOf(settings, { ...scheduler, prediction_type: own }).settings.prediction_type;
  t.equal(predicted(plain, 'epsilon'), 'epsilon');
  t.equal(predicted(plain, 'v_prediction'), 'v_prediction');
  t.equal(predicted(v, 'epsilon'), 'v_prediction', 'or what it says');
  t.throws(() => predicted(plain, 'sample'), /teach it another with objective\.prediction_type/);
  t.throws(
    () => objectiveOf(plain, { ...scheduler, rescale_betas_zero_snr: true }),
    /the model's rescale_betas_zero_snr needs objective\.prediction_type/,
  );
  t.end();
});

test('timesteps: each policy has its own spread', (t) => {
  const count = 20_000;
  /** Shares of draws in the four quarters of the timesteps. */
  const quarters = (settings: Partial<ObjectiveSettings>) => {
    const objective = objectiveOf({ ...plain, ...settings }, scheduler);
    const shares = [0, 0, 0, 0];
    for (let i = 0; i < count; i++) {
      const drawn = drawTimestep(objective, 1, 0, i);
      if (!(Number.isInteger(drawn) && drawn >= 0 && drawn < 1000)) t.fail(`timestep ${drawn}`);
      shares[Math.floor(drawn / 250)] += 1 / count;
    }
    return shares;
  };
  const near = { atol: 0.012, rtol: 0 };
  allClose(t, 'uniform', quarters({}), [0.25, 0.25, 0.25, 0.25], near);
  allClose(t, 'earlier', quarters({ timesteps: 'earlier' }), [5 / 8, 1 / 8, 1 / 8, 1 / 8], near);
  allClose(t, 'later', quarters({ timesteps: 'later' }), [1 / 8, 1 / 8, 1 / 8, 5 / 8], near);
  allClose(t, 'range', quarters({ timesteps: 'range' }), [1 / 12, 5 / 12, 5 / 12, 1 / 12], near);
  const none = quarters({ timesteps: 'range', timestep_range: [0.5, 0.5] });
  allClose(t, 'a range that ends where it begins prefers none', none, [0.25, 0.25, 0.25, 0.25], near);
  // (1 - u^3) T lies below q T when u > cbrt(1 - q).
  const below = [0, 0.25, 0.5, 0.75, 1].map((q) => 1 - Math.cbrt(1 - q));
  const cubic = [0, 1, 2, 3].map((i) => below[i + 1] - below[i]);
  const backwards = { ...plain, timestep_range: [0.6, 0.2] };
  t.throws(() => objectiveOf(backwards, scheduler), /begins at 0\.6 and ends at 0\.2; write the smaller/);
  allClose(t, 'cubic', quarters({ timesteps: 'cubic' }), cubic, near);
  // Of a part of them each policy keeps its odds: the middle two quarters, and what each policy has there.
  const part = { min_timestep: 250, max_timestep: 750 };
  for (const [timesteps, second, third] of [
    ['uniform', 1, 1],
    ['earlier', 1, 1],
    ['range', 1, 1],
    ['cubic', cubic[1], cubic[2]],
  ] as const)
    allClose(
      t,
      `${timesteps} in the middle`,
      quarters({ timesteps, ...part }),
      [0, second, third, 0].map((x) => x / (second + third)),
      near,
    );
  const noisy = quarters({ timesteps: 'cubic', min_timestep: 500 });
  const upper = [0, 0, cubic[2], cubic[3]].map((x) => x / (cubic[2] + cubic[3]));
  allClose(t, 'cubic from the half on', noisy, upper, near);
  const late = quarters({ timesteps: 'later', timestep_bias: 0.5, min_timestep: 250 });
  allClose(t, 'later from 250 on', late, [0, 1 / 11, 5 / 11, 5 / 11], near);
  const only = objectiveOf({ ...plain, min_timestep: 700, max_timestep: 701 }, scheduler);
  t.ok([1, 2, 3, 4].every((i) => drawTimestep(only, 1, 0, i) === 700));
  for (const [min_timestep, max_timestep] of [
    [500, 500],
    [0, 1001],
    [1000, 0],
  ])
    t.throws(
      () => objectiveOf({ ...plain, min_timestep, max_timestep }, scheduler),
      /leave none of the schedule's 1000 timesteps/,
    );
  t.end();
});

test('noise: offset, pyramid and perturbation', (t) => {
  const shape = [16, 16, 4] as const;
  const white = drawNoise(plain, shape, 3, 1, 7);
  const offset = draws(3, 1, 7, 'offset').normals(4);
  allClose(t, 'white', white, draws(3, 1, 7, 'noise').normals(1024), { atol: 0, rtol: 0 });
  allClose(
    t,
    'offset is one number a channel',
    drawNoise({ ...plain, noise_offset: 0.1 }, shape, 3, 1, 7),
    white.map((x, i) => x + 0.1 * offset[i % 4]),
    exact,
  );
  const strength = draws(3, 1, 7, 'offset_strength').uniform();
  allClose(
    t,
    'or of a strength that is drawn',
    drawNoise({ ...plain, noise_offset: 0.1, noise_offset_random_strength: true }, shape, 3, 1, 7),
    white.map((x, i) => x + strength * 0.1 * offset[i % 4]),
    exact,
  );
  const pyramid = drawNoise({ ...plain, pyramid_noise: 0.9 }, [64, 64, 4], 3, 1, 7);
  const mean = pyramid.reduce((sum, x) => sum + x, 0) / pyramid.length;
  const variance = pyramid.reduce((sum, x) => sum + (x - mean) ** 2, 0) / pyramid.length;
  t.ok(Math.abs(variance - 1) < 1e-3, `variance ${variance}`);
  let neighbours = 0;
  for (let i = 4; i < pyramid.length; i++)
    neighbours += ((pyramid[i] - mean) * (pyramid[i - 4] - mean)) / pyramid.length;
  t.ok(neighbours > 0.3, `neighbours agree: ${neighbours.toFixed(2)}`);

  const latents = { ids: [7], epoch: 1, latents: new Float32Array(1024), height: 16, width: 16 };
  const objective = objectiveOf({ ...plain, input_perturbation: 0.1 }, scheduler);
  const { sample, target, timesteps } = noiseBatch(objective, latents, 3);
  const more = draws(3, 1, 7, 'perturbation').normals(1024);
  const sigma = Math.sqrt(1 - objective.alphasCumprod[timesteps[0]]);
  allClose(t, 'the target is the noise alone', target, white, exact);
  const seen = (gamma: number) => white.map((x, i) => sigma * (x + gamma * more[i]));
  allClose(t, 'the network sees more', sample, seen(0.1), exact);
  const drawn = objectiveOf({ ...objective.settings, input_perturbation_random_strength: true }, scheduler);
  const share = draws(3, 1, 7, 'perturbation_strength').uniform();
  allClose(t, 'or as much as is drawn', noiseBatch(drawn, latents, 3).sample, seen(share * 0.1), exact);
  t.end();
});

test('pyramid noise by its formula, in float64', (t) => {
  const [h, w, c] = [40, 24, 2];
  const source = draws(3, 1, 7, 'pyramid');
  const sum = Float64Array.from(draws(3, 1, 7, 'noise').normals(h * w * c));
  const sizes: number[][] = [];
  /** What x's row k has of row i once it is enlarged bilinearly: a hat around its place, without corners aligned. */
  const share = (i: number, big: number, k: number, small: number) => {
    const at = Math.min(small - 1, Math.max(0, ((i + 0.5) * small) / big - 0.5));
    return Math.max(0, 1 - Math.abs(at - k));
  };
  for (let level = 1, [rows, columns] = [h, w]; rows > 1 && columns > 1; level++) {
    const ratio = (2 + 2 * source.uniform()) ** level;
    [rows, columns] = [h, w].map((side) => Math.max(1, Math.floor(side / ratio)));
    sizes.push([rows, columns]);
    const x = source.normals(rows * columns * c);
    for (let at = 0; at < sum.length; at++) {
      const [i, j, k] = [Math.floor(at / (w * c)), Math.floor(at / c) % w, at % c];
      for (let row = 0; row < rows; row++)
        for (let column = 0; column < columns; column++)
          sum[at] +=
            0.7 ** level *
            share(i, h, row, rows) *
            share(j, w, column, columns) *
            x[(row * columns + column) * c + k];
    }
  }
  t.ok(sizes.length > 1 && sizes[0][1] > 4, `levels of ${sizes.join(' and ')}`);
  const mean = sum.reduce((total, x) => total + x, 0) / sum.length;
  const variance = sum.reduce((total, x) => total + (x - mean) ** 2, 0) / (sum.length - 1);
  const want = sum.map((x) => x / Math.sqrt(variance));
  allClose(t, 'noise', drawNoise({ ...plain, pyramid_noise: 0.7 }, [h, w, c], 3, 1, 7), want, {
    atol: 3e-6,
    rtol: 0,
  });
  t.end();
});

test('splitting a batch changes no draw', (t) => {
  const settings = { ...v, noise_offset: 0.1, pyramid_noise: 0.5, input_perturbation: 0.1, snr_gamma: 5 };
  const objective = objectiveOf(settings, scheduler);
  const batch = (ids: number[]) => {
    const latents = new Float32Array(ids.flatMap((id) => [...draws(id, 0, 0, 'moments').normals(8 * 6 * 4)]));
    return noiseBatch(objective, { ids, epoch: 2, latents, height: 8, width: 6 }, 11);
  };
  const [whole, first, second] = [batch([5, 9, 2, 40]), batch([5, 9]), batch([2, 40])];
  for (const key of ['sample', 'target', 'timesteps', 'weights'] as const) {
    const parts = [...(first[key] as Float32Array), ...(second[key] as Float32Array)];
    allClose(t, key, parts, whole[key] as Float32Array, { atol: 0, rtol: 0 });
  }
  t.same(whole.shape, [4, 8, 6, 4]);
  t.end();
});

test('the loss of a prediction', (t) => {
  const shape = [2, 2, 2, 4];
  const values = (seed: number) => draws(seed, 0, 0, 'noise').normals(32);
  const [said, target, weights] = [values(1), values(2), [3, 0.5]];
  const unet = (x: Tensor) => x;
  const given = { context: undefined } as unknown as Conditioning;
  const loss = (settings: Partial<ObjectiveSettings>, inputs: object, roots?: number[]) =>
    scope(() => {
      const batch = { shape, sample: said, timesteps: Float32Array.of(1, 2), target, ...inputs };
      const placed = {
        ...place(noisedInputs(batch, 'float32'), device),
        ...(roots && { mask: tensor(roots, [2, 2, 2, 1], { device }) }),
      };
      const objective = objectiveOf({ ...plain, ...settings }, scheduler);
      return diffusionLoss(unet as unknown as UNet, objective, placed, given).floats()[0];
    });
  const mean = (each: (r: number) => number, weigh: (i: number) => number) =>
    said.reduce((sum, x, i) => sum + weigh(i >> 4) * each(x - target[i]), 0) / 32;
  const huber = (delta: number) => (r: number) =>
    Math.abs(r) <= delta ? 0.5 * r * r : delta * (Math.abs(r) - 0.5 * delta);
  const [one, own] = [() => 1, (i: number) => weights[i]];
  const weighed = { weights: Float32Array.from(weights) };
  for (const huber_delta of [0.3, 1.5]) {
    const settings = { loss: 'huber', huber_delta } as const;
    const want = [mean(huber(huber_delta), one), mean(huber(huber_delta), own)];
    const got = [loss(settings, {}), loss(settings, weighed)];
    allClose(t, `huber, delta ${huber_delta}`, got, want, exact);
  }
  const squares = [mean((r) => r * r, one), mean((r) => r * r, own)];
  allClose(t, 'mean squared error', [loss({}, {}), loss({}, weighed)], squares, exact);
  // A mask's roots lie beside the inputs, one for the four channels of a place.
  const mask = [1, 0, 0.25, 0.5, 0.75, 1, 0, 0.1];
  const seen =
    said.reduce((sum, x, i) => sum + weights[i >> 4] * mask[i >> 2] * (x - target[i]) ** 2, 0) / 32;
  allClose(t, 'under a mask', [loss({}, weighed, mask.map(Math.sqrt))], [seen], exact);
  t.end();
});

test("the VAE's loss", (t) => {
  const shape = [2, 4, 4, 3];
  const values = (seed: number, count: number) => draws(seed, 0, 0, 'noise').normals(count);
  const [y, x, mean, logvar] = [values(1, 96), values(2, 96), values(3, 32), values(4, 32)];
  const loss = (l1: number, mse: number, kl: number) =>
    scope(
      () =>
        vaeLoss({ l1, mse, kl }, tensor(y, shape, { device }), tensor(x, shape, { device }), {
          mean: tensor(mean, [2, 2, 2, 4], { device }),
          logvar: tensor(logvar, [2, 2, 2, 4], { device }),
        }).floats()[0],
    );
  const average = (terms: ArrayLike<number>) =>
    Array.from(terms).reduce((sum, term) => sum + term, 0) / terms.length;
  const absolute = average(y.map((value, i) => Math.abs(value - x[i])));
  const squared = average(y.map((value, i) => (value - x[i]) ** 2));
  const divergence = average(mean.map((m, i) => 0.5 * (m * m + Math.exp(logvar[i]) - 1 - logvar[i])));
  const close = { atol: 1e-5, rtol: 1e-5 };
  // Near zero |x| is rounded off within a quarter of an 8-bit level: less by 1/1024 at most.
  t.ok(Math.abs(loss(1, 0, 0) - absolute) < 1 / 1024, `L1 ${loss(1, 0, 0)}, want ${absolute}`);
  allClose(t, 'mean squared error', [loss(0, 2, 0)], [2 * squared], close);
  allClose(t, 'divergence', [loss(0, 0, 1)], [divergence], close);
  allClose(t, 'all three', [loss(1, 2, 0.5)], [loss(1, 0, 0) + 2 * squared + 0.5 * divergence], close);
  t.end();
});
