// Training under EDM's noise: what a pass is made of against diffusers' scheduler (golden/edm_training.jsonl), and runs of a model as
// Playground v2.5's, whose finished LoRA and previews draw by its own scheduler.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { addNoise, noiseBatch, objectiveOf } from '../../train/objective/objective.ts';
import { fill } from '../../train/run/fields.ts';
import { fields } from '../../train/run/run_fields.ts';
import { sdxl } from '../support/command_line.ts';
import { edmSchedulers, writeEDM } from '../support/edm_golden.ts';
import { goldenLines } from '../support/golden.ts';
import { basic, folder, losses, resumes, run } from '../support/small_runs.ts';

interface Case {
  config: { sigma_data?: number; prediction_type?: string };
  level: number;
  sample: number[];
  told: number;
  errors: number[];
}

const usual = fill(fields, {}, 'defaults').objective;
const i = Array.from({ length: 8 }, (_, k) => k);
const noise = Float32Array.from(i, (k) => (((3 * k) % 8) - 3.5) / 2);
const output = i.map((k) => (((5 * k) % 8) - 3.5) / 3);

for (const { config, level, ...wanted } of goldenLines<Case>('edm_training'))
  test(`level ${level} of ${JSON.stringify(config)}, as diffusers' EDMEulerScheduler`, (t) => {
    const objective = objectiveOf(usual, { _class_name: 'EDMEulerScheduler', ...config });
    const latents = Float32Array.from(i, (k) => ((k - 3.5) / 4) * (config.sigma_data ?? 0.5));
    const made = addNoise(objective, {
      shape: [1, 2, 2, 2],
      latents,
      timesteps: Float32Array.of(level),
      noise,
    });
    const off = (a: ArrayLike<number>, b: ArrayLike<number>) =>
      Math.max(...i.map((k) => Math.abs(a[k] - b[k]) / (1 + Math.abs(b[k]))));
    t.ok(off(made.sample, wanted.sample) < 1e-6, 'what the network sees');
    t.ok(Math.abs(made.timesteps[0] - wanted.told) < 1e-6, 'what it is told');
    const errors = i.map((k) => (output[k] - made.target[k]) ** 2);
    t.ok(off(errors, wanted.errors) < 5e-7, `what its output is off: ${off(errors, wanted.errors)}`);
    t.equal(made.weights, undefined);
    t.end();
  });

test('levels are drawn as timesteps are', (t) => {
  const objective = objectiveOf({ ...usual, min_timestep: 990, snr_gamma: 5 }, edmSchedulers.cosxl);
  const ids = Array.from({ length: 40 }, (_, k) => k);
  const latents = new Float32Array(40 * 4);
  const { timesteps, weights } = noiseBatch(objective, { ids, epoch: 0, latents, height: 1, width: 1 }, 1);
  t.ok(
    timesteps.every((told) => told > Math.log(100) / 4 && told <= Math.fround(Math.log(120) / 4)),
    'among the ten noisiest levels',
  );
  t.ok(new Set(timesteps).size > 5);
  // Min-SNR of a velocity: min(s, 5) / (s + 1), s being (sigma_data / sigma)^2.
  timesteps.forEach((told, k) => {
    const s = Math.exp(-8 * told);
    t.ok(Math.abs((weights?.[k] ?? 0) / (s / (s + 1)) - 1) < 5e-6, `weight ${k}`);
  });
  t.end();
});

test("a model as Playground's is trained, and goes on to the bit", async (t) => {
  const model = writeEDM(join(folder, 'playground'), 'playground');
  const lora = { target: 'lora' } as const;
  const previews = { prompts: ['a fox'], num_inference_steps: 2, every_steps: 3 };
  const output = await resumes(t, 'edm', { model, train: lora, previews, steps: 3 });
  t.ok(existsSync(join(folder, 'edm-whole', 'previews')), `${output} has previews`);
  const all = losses(join(folder, 'edm-whole'));
  t.ok(all.length === 3 && all.every(([, loss]) => Number.isFinite(loss)));
  const drawn = await sdxl(
    ...['sample', '--model', model, '--lora', join(folder, 'edm-whole', 'final'), '--prompt', 'a fox'],
    ...['--steps', '2', '--width', '64', '--height', '64', '--quiet', '--output', join(folder, 'edm.png')],
  );
  t.equal(drawn.status, 0, drawn.err);
  for (const [more, sentence] of [
    [
      { objective: { prediction_type: 'epsilon' as const } },
      /leave objective\.prediction_type and objective\.zero/,
    ],
    [
      { objective: { zero_terminal_snr: true } },
      /EDM's noise \(EDMDPMSolverMultistepScheduler\), which says what/,
    ],
    [
      { train: { ...lora, method: 'lcm' as const }, ema: { decay: 0 } },
      /"lcm" is for DDPM's: give a model of SDXL's/,
    ],
  ] as const)
    await t.rejects(run({ ...basic('edm-no'), model, train: lora, ...more }), { message: sentence });
});
