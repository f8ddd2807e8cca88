// Latent consistency distillation: the solver, losses and gradients against diffusers' script over peft's adapters (golden/lcm.py),
// runs that resume bit for bit, what they make, and mistakes. A pass on a GPU: gpu_training.test.ts.
import { join } from 'node:path';
import { test } from 'tap';
import { backward, gradOf } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { readPicture } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { openMaterials } from '../../train/materials.ts';
import { consistency, distilled, solverSteps } from '../../train/methods/lcm.ts';
import { objectiveOf } from '../../train/objective/objective.ts';
import { place } from '../../train/passes/pass.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { requireAverages } from '../../train/run/rules/methods.ts';
import type { Run, RunInput } from '../../train/run/run.ts';
import type { Session } from '../../train/session.ts';
import { sdxl } from '../support/command_line.ts';
import { numbers } from '../support/controlnet_golden.ts';
import { allClose, goldenLines, permuted } from '../support/golden.ts';
import {
  basic,
  device,
  digest,
  folder,
  locate,
  losses,
  model,
  pictures,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';
import { writeTold } from '../support/told_golden.ts';

interface Tables {
  ddim_timesteps: number[];
  ddim_alpha_cumprods_prev: number[];
}
interface Case {
  name: string;
  prediction_type: 'epsilon' | 'v_prediction';
  loss_type: Run['lcm']['loss_type'];
  huber_c: number;
  scaling: number;
  index: number[];
  w: number[];
  loss: number;
  noise: number;
  /** Of the UNet's weights, those that train; adapters where absent. */
  part?: string;
  gradients: [key: string, norm: number, sum: number][];
}
const golden = goldenLines<Tables | Case | object>('lcm');
const tables = golden.filter((each): each is Tables => 'ddim_timesteps' in each);
const cases = golden.filter((each): each is Case => 'name' in each);

const defaults = resolveRun({}, 'test', 'test');
const scheduler = openModel(model).config('scheduler');
const epsilon = objectiveOf(defaults.objective, scheduler);

test("the solver's steps are those of diffusers' DDIMSolver", (t) => {
  for (const { ddim_timesteps, ddim_alpha_cumprods_prev } of tables) {
    const steps = solverSteps(epsilon.alphasCumprod, ddim_timesteps.length);
    t.same(
      steps.map(({ from }) => from),
      ddim_timesteps,
    );
    const abars = steps.map(({ abar }) => abar);
    allClose(t, `${steps.length} steps`, abars, ddim_alpha_cumprods_prev, { atol: 0, rtol: 1e-7 });
    const ends = ddim_timesteps.map((at) => Math.max(0, at - ddim_timesteps[0] - 1));
    t.same(
      steps.map(({ to }) => to),
      ends,
    );
  }
  t.same(consistency(epsilon, 0, 10), [1, 0], 'at timestep 0 there is nothing to do');
  t.end();
});

const told = writeTold(join(folder, 'told'));

/** What a run of a case has beside what `basic` has. */
const runOf = (
  { name, prediction_type, loss_type, huber_c, scaling, part }: Case,
  gradient_checkpointing: boolean,
): RunInput => ({
  ...(name === 'told' && { model: told }),
  ...(part
    ? { train: { method: 'lcm', parts: [part], gradient_checkpointing } }
    : {
        train: { target: 'lora', method: 'lcm', gradient_checkpointing },
        lora: { rank: 2, alpha: 2, targets: ['to_k', 'to_out.0'] },
      }),
  objective: { prediction_type },
  lcm: {
    ...{ loss_type, huber_c, timestep_scaling_factor: scaling },
    ...(part && { unet_time_cond_proj_dim: 0 }),
  },
});

/** The trained weights of a case, and its target's, as the script has them. */
function setWeights({ parameters, ema }: Session): void {
  for (const [name, { tensor: own, shape }] of parameters) {
    const key = name.replace(/^(lora\.)?unet\./, '');
    if (name.startsWith('lora.')) own.set(numbers(key, shape).map((x) => x / 16));
    else {
      const begun = own.floats();
      const moved = (of: string) => numbers(`${of}.${key}`, shape).map((x, i) => begun[i] + x / 32);
      own.set(moved('student'));
      ema?.weights.get(name)?.set(moved('target'));
    }
  }
}

/** The script's pass. */
function passOf({ index, w }: Case, { run, source }: Session) {
  const objective = objectiveOf(run.objective, source.config('scheduler'));
  const steps = solverSteps(objective.alphasCumprod, 50);
  const [n, c, side] = [2, 4, 8];
  const batch = {
    ids: [1, 2],
    epoch: 0,
    latents: new Float32Array(n * side * side * c),
    height: side,
    width: side,
  };
  const drawn = index.map((at, i) => ({ step: steps[at], w: w[i] }));
  const { sample, ...inputs } = distilled(objective, batch, drawn, run);
  const input = (values: Float32Array, ...shape: number[]) => ({ shape, values, dtype: 'float32' as const });
  const nchw = [n, c, side, side];
  return {
    ...inputs,
    sample: { ...sample, values: permuted(numbers('sample', nchw), nchw, [0, 2, 3, 1]) },
    context: input(numbers('context', [n, 77, 80]), n, 77, 80),
    pooled: input(numbers('pooled', [n, 40]), n, 40),
    unconditional_context: input(new Float32Array(n * 77 * 80), n, 77, 80),
    unconditional_pooled: input(new Float32Array(n * 40), n, 40),
    timeIds: input(Float32Array.of(64, 96, 0, 0, 64, 64, 80, 100, 8, 2, 64, 64), n, 6),
  };
}

const opened = (input: RunInput) => openMaterials(resolveRun(input, 'test', 'test'), locate, silent);

for (const [i, one] of cases.entries())
  test(`${one.name}: the loss and its gradients are the script's`, async (t) => {
    const before = device.memory.storages;
    const session = await sessionOf(await opened({ ...basic(one.name), ...runOf(one, i === 0) }));
    setWeights(session);
    const inputs = passOf(one, session);
    scope(() => {
      const loss = session.task.loss(place(inputs, device));
      const [got] = loss.floats();
      t.ok(Math.abs(got / one.loss - 1) < 1e-5, `the loss ${got}, the script's ${one.loss}`);
      backward(loss);
    });
    let worst = { key: '', error: 0 };
    for (const [key, norm, sum] of one.gradients) {
      const name = key.includes('lora_') ? `lora.unet.${key}` : `unet.${key}`;
      const { tensor: own } = session.parameters.get(name) as Parameter;
      const values = scope(() => gradOf(own)?.floats() ?? new Float32Array());
      const factors = numbers(key, [values.length]);
      const ownNorm = Math.sqrt(values.reduce((total, x) => total + x * x, 0));
      const ownSum = values.reduce((total, x, k) => total + x * factors[k], 0);
      // Errors of elements that are independent add up in the sum as its factors' root mean square, which is 1.15.
      const error = Math.max(Math.abs(ownNorm - norm), Math.abs(ownSum - sum) / 1.15) / norm;
      if (error > worst.error) worst = { key, error };
    }
    t.ok(worst.error < 20 * one.noise, `${worst.key} is ${worst.error} off, float32 ${one.noise}`);
    t.equal(session.parameters.size, one.gradients.length, 'nothing else is trained');
    session.release();
    t.equal(device.memory.storages, before, 'live tensors');
  });

test('runs resume bit for bit, fused or not, and a LoRA draws in few steps without guidance', async (t) => {
  const before = device.memory.storages;
  const few = { prompts: ['stripes'], num_inference_steps: 2, guidance_scale: 1, scheduler: 'lcm' };
  const final = await resumes(t, 'lcm', {
    train: { target: 'lora', method: 'lcm', gradient_checkpointing: true },
    lora: { rank: 2, network_dropout: 0.2 },
    lcm: { loss_type: 'huber' },
    previews: few,
    validation: { samples: 2 },
  });
  const noted = losses(join(folder, 'lcm-whole')).flatMap(([, ...each]) =>
    each.filter((x) => x !== undefined),
  );
  t.ok(noted.length === 5 && noted.every((loss) => loss > 0), `losses, of validation too: ${noted}`);
  const all: RunInput = {
    train: { method: 'lcm', parts: ['attn2'] },
    dataset: { ...basic('').dataset, path: pictures, shuffle_caption: true },
  };
  const whole = await resumes(t, 'lcm-unet', all);
  const made = openModel(whole);
  t.equal(made.config('unet').time_cond_proj_dim, 256, 'the UNet is told w');
  const layer = made.weights('unet').floats('time_embedding.cond_proj.weight');
  const most = Math.max(...layer.map(Math.abs));
  t.ok(layer.length === 16 * 256 && most < 1 / 16 && most > 0.99 / 16, 'by a layer as it begins');
  const once = (name: string, fused_backward_pass: boolean): RunInput => ({
    ...basic(name),
    ...all,
    ...{ steps: 2, gradient_accumulation_steps: 1, train: { ...all.train, fused_backward_pass } },
  });
  for (const fused of [false, true]) await run(once(`lcm-fused-${fused}`, fused));
  const [kept, fused] = [false, true].map(
    (how) => listCheckpoints(join(folder, `lcm-fused-${how}`)).at(-1) as string,
  );
  t.equal(digest(fused), digest(kept), 'fused');
  t.equal(device.memory.storages, before, 'live tensors');

  const output = join(folder, 'lcm.png');
  const { status, err } = await sdxl(
    ...[
      'sample',
      '--model',
      model,
      '--lora',
      final,
      '--prompt',
      'stripes',
      '--scheduler',
      'lcm',
      '--steps',
      '4',
    ],
    ...[
      '--guidance-scale',
      '1',
      '--width',
      '64',
      '--height',
      '64',
      '--seed',
      '1',
      '--output',
      output,
      '--quiet',
    ],
  );
  t.equal(status, 0, err);
  t.equal((await readPicture(output)).width, 64);
});

test('what a run is told, and mistakes', async (t) => {
  const lora = { target: 'lora', method: 'lcm' } as const;
  const plan = planOf(await opened({ ...basic('plan'), train: lora, lcm: { w_max: 8 } }));
  t.match(describe(plan).join('\n'), /objective {3}epsilon, lcm, l2, w 3 to 8, 50 DDIM timesteps/);
  const mistakes: [RunInput, RegExp][] = [
    [
      { lcm: { w_max: 8 } },
      /"lcm\.w_max" is of latent .*"train\.method" is "diffusion"; leave it out, or set "train\.method" to "lcm"/,
    ],
    [
      { train: { target: 'vae', method: 'lcm' } },
      /"train\.method" "lcm" is for the targets "unet" and "lora", and "train\.target" is "vae"/,
    ],
    [{ train: { target: 'controlnet', method: 'lcm' } }, /"train\.target" is "controlnet"; leave it out/],
    [
      {
        train: { target: 'textual_inversion', method: 'lcm' },
        textual_inversion: { placeholder_token: '<x>', initializer_token: 'x' },
      },
      /"train\.target" is "textual_inversion"; leave it out/,
    ],
    [{ train: { ...lora, text_encoders: true } }, /"train\.text_encoders" is of the method "diffusion"/],
    [{ train: lora, objective: { snr_gamma: 5 } }, /"objective\.snr_gamma" is of the method "diffusion"/],
    [
      { train: lora, objective: { masked_loss: true } },
      /"objective\.masked_loss" is of the method "diffusion"/,
    ],
    [{ train: lora, lcm: { w_min: 20 } }, /"lcm\.w_min" is 20 and "lcm\.w_max" 15; write the smaller first/],
    [
      { train: lora, lcm: { unet_time_cond_proj_dim: 0 } },
      /"lcm\.unet_time_cond_proj_dim" is of a UNet that is distilled whole/,
    ],
    [
      { train: { method: 'lcm' }, lcm: { unet_time_cond_proj_dim: 7 } },
      /is 7, and sines and cosines come in pairs/,
    ],
    [{ train: lora, lcm: { huber_c: 0 } }, /"lcm\.huber_c" is 0; it takes a number from 0\.000001/],
  ];
  for (const [input, sentence] of mistakes)
    t.throws(() => resolveRun(input, 'test', 'test'), { message: sentence, name: 'UserError' });
  const averaged = resolveRun({ train: { method: 'lcm' }, ema: { decay: 0.95 } }, 'test', 'test');
  t.throws(() => requireAverages(averaged, 2), {
    message: /asks the moving averages of ema\.decay 0\.95, which several GPUs/,
  });
  t.doesNotThrow(() => requireAverages({ ...averaged, ema: { decay: 0 } }, 2));
  const late: [RunInput, RegExp][] = [
    [
      { lcm: { num_ddim_timesteps: 2000 } },
      /lcm\.num_ddim_timesteps is 2000, and the model's schedule has 1000 timesteps/,
    ],
    [{ objective: { zero_terminal_snr: true } }, /needs objective\.prediction_type "v_prediction"/],
  ];
  for (const [more, sentence] of late)
    await t.rejects(opened({ ...basic('late'), train: lora, ...more }).then(planOf), {
      message: sentence,
      name: 'UserError',
    });
});
