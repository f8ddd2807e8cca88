// The pseudo-Huber loss and kohya's two of it against their formulas in float64, with gradients: c by timestep and schedule, weights of
// images, masks. A run under one resumes bit for bit.
import { test } from 'tap';
import { backward, gradOf, requireGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { sdxlScheduler } from '../../models/formats/presets.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import { addNoise, diffusionLoss, noisedInputs, objectiveOf } from '../../train/objective/objective.ts';
import { pseudoHuber, weighedMean } from '../../train/objective/pseudo_huber.ts';
import { place } from '../../train/passes/pass.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { numbers } from '../support/controlnet_golden.ts';
import { allClose } from '../support/golden.ts';
import { device, resumes } from '../support/small_runs.ts';

test('the loss and its gradient, with c small and large', (t) => {
  const shape = [2, 3, 5, 4];
  const values = numbers('r', shape).map((x, i) => (i % 7 ? x : 0) * 10 ** -(i % 5));
  for (const [c, weights] of [
    [0.01, undefined],
    [0.01, [0.5, 2]],
    // Of sqrt(r^2 + 1e4) - 100 float32 would leave nothing.
    [100, [0.5, 2]],
  ] as const) {
    const weight = (i: number) => (weights?.[Math.floor(i / 60)] ?? 1) / 120;
    const want = values.reduce((total, r, i) => total + (weight(i) * r * r) / (Math.hypot(r, c) + c), 0);
    const slopes = values.map((r, i) => (weight(i) * r) / Math.hypot(r, c));
    scope(() => {
      const r = requireGrad(tensor(values, shape, { device }));
      const loss = weighedMean(pseudoHuber(r, c), weights && tensor(weights, [2], { device }));
      t.same(loss.shape, [1]);
      allClose(t, `loss, c ${c}`, loss.floats(), [want], { atol: 0, rtol: 1e-6 });
      backward(loss);
      allClose(t, 'gradient', gradOf(r)?.floats() ?? [], slopes, { atol: 1e-9, rtol: 2e-6 });
    });
  }
  t.end();
});

/** c of a timestep by kohya's formulas: snr takes no scale. */
const thresholds = {
  constant: (_: number, __: number, c: number, scale: number) => c * scale,
  exponential: (_: number, t: number, c: number, scale: number) => Math.exp((Math.log(c) * t) / 1000) * scale,
  snr: (abar: number, _: number, c: number) => (1 - c) / (1 + Math.sqrt((1 - abar) / abar)) ** 2 + c,
};

const shape = [3, 2, 4, 4];
const timesteps = Float32Array.of(0, 500, 999);
const [latents, noise, said] = ['latents', 'noise', 'said'].map((name) => numbers(name, shape));
const mask = numbers('mask', [3, 2, 4, 1]).map((x) => Math.min(1, Math.abs(x)));
const settings = resolveRun({}, 'defaults', 'test').objective;

for (const loss of ['pseudo_huber', 'smooth_l1'] as const)
  for (const huber_schedule of ['constant', 'exponential', 'snr'] as const)
    test(`${loss} with c by the schedule "${huber_schedule}"`, (t) => {
      const own = { loss, huber_c: 0.3, huber_scale: 1.7, huber_schedule, snr_gamma: 5 };
      const objective = objectiveOf({ ...settings, ...own }, sdxlScheduler);
      const inputs = noisedInputs(addNoise(objective, { shape, latents, timesteps, noise }), 'float32');
      const size = latents.length / 3;
      for (const masked of [false, true]) {
        let want = 0;
        const slopes = Array.from(said, (x, i) => {
          const at = timesteps[Math.floor(i / size)];
          const abar = objective.alphasCumprod[at];
          const c = thresholds[huber_schedule](abar, at, 0.3, 1.7);
          const counts = masked ? mask[Math.floor(i / 4)] : 1;
          const weight =
            (Math.min(1, (5 * (1 - abar)) / abar) * counts * (loss === 'smooth_l1' ? 2 : 2 * c)) /
            said.length;
          const r = x - noise[i];
          want += weight * (Math.sqrt(r * r + c * c) - c);
          return (weight * r) / Math.sqrt(r * r + c * c);
        });
        scope(() => {
          const given = requireGrad(tensor(said, shape, { device }));
          const placed = place(inputs, device);
          const root = tensor(mask.map(Math.sqrt), [3, 2, 4, 1], { device });
          const tensors = masked ? { ...placed, mask: root } : placed;
          const got = diffusionLoss(() => given, objective, tensors, {} as Conditioning);
          allClose(t, `loss, masked ${masked}`, got.floats(), [want], { atol: 0, rtol: 3e-6 });
          backward(got);
          allClose(t, 'gradient', gradOf(given)?.floats() ?? [], slopes, { atol: 1e-9, rtol: 3e-6 });
        });
      }
      t.end();
    });

test('pure noise has the least c, and a run resumes bit for bit', async (t) => {
  const v = { prediction_type: 'v_prediction', zero_terminal_snr: true } as const;
  const own = { loss: 'smooth_l1', huber_schedule: 'snr' } as const;
  const objective = objectiveOf({ ...settings, ...v, ...own }, sdxlScheduler);
  const { huber_c } = addNoise(objective, { shape, latents, timesteps, noise });
  t.equal(huber_c?.[2], Math.fround(0.1));
  await resumes(t, 'smooth-l1', {
    train: { target: 'lora' },
    lora: { rank: 2 },
    objective: { ...own, snr_gamma: 5 },
    validation: { samples: 2 },
  });
});
