// Losses of networks that are held against the model as it was loaded, or a larger one, and their gradients, as golden/dpo_esd.py and
// golden/distillation.py record them.
import { test } from 'tap';
import { gradOf } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { addNoise, noisedInputs, objectiveOf } from '../../train/objective/objective.ts';
import type { HostTensor, PassInputs } from '../../train/objective/pass_inputs.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { numbers } from './controlnet_golden.ts';
import { goldenLines, permuted } from './golden.ts';
import { basic, device, model, opened, sessionOf } from './small_runs.ts';

type Target = 'lora' | 'unet';
interface Told {
  method: string;
  target: Target;
  loss: number;
  count: number;
  noise: number;
}
type Gradient = [method: string, target: Target, key: string, norm: number, sum: number];

const toOurs = [0, 2, 3, 1];
const toTorch = [0, 3, 1, 2];

const twice = (values: Float32Array) => Float32Array.of(...values, ...values);

/** The script's pass, under a run's objective. */
function goldenPass(settings: RunInput['objective']): PassInputs {
  const [n, h, w] = [2, 8, 12];
  const made = (name: string, ...shape: number[]): HostTensor => ({
    shape: [2 * n, ...shape],
    values: twice(numbers(name, [n, ...shape])),
    dtype: 'float32',
  });
  const empty = (of: HostTensor): HostTensor => ({ ...of, values: new Float32Array(of.values.length) });
  const { objective } = resolveRun({ ...basic('golden'), objective: settings }, 'test', 'test');
  const noised = addNoise(objectiveOf(objective, openModel(model).config('scheduler')), {
    shape: [2 * n, h, w, 4],
    latents: permuted(numbers('latents', [2 * n, 4, h, w]), [2 * n, 4, h, w], toOurs),
    timesteps: Float32Array.of(107, 803, 107, 803),
    noise: twice(permuted(numbers('noise', [n, 4, h, w]), [n, 4, h, w], toOurs)),
  });
  const sizes = twice(Float32Array.of(64, 96, 0, 0, 64, 96, 80, 100, 8, 2, 64, 96));
  const [context, pooled] = [made('encoder_hidden_states', 77, 80), made('text_embeds', 40)];
  return {
    ...noisedInputs(noised, 'float32'),
    ...{ context, pooled, unconditional_context: empty(context), unconditional_pooled: empty(pooled) },
    timeIds: { shape: [2 * n, 6], values: sizes, dtype: 'float32' },
  };
}

/** Moves what a session trains to where the script has it. */
function move(
  { parameters }: Awaited<ReturnType<typeof sessionOf>>,
  target: Target,
  keyOf: (name: string) => string,
) {
  for (const [name, { tensor: own, shape, layout, memoryShape }] of parameters) {
    const key = keyOf(name);
    const factors = numbers(key, shape);
    const conv = layout === 'conv';
    const was = conv ? permuted(own.floats(), memoryShape, toTorch) : own.floats();
    const moved = factors.map((x, i) =>
      target === 'unet' ? was[i] * (1 + x / 32) : x / (key.includes('lora_A') ? 8 : 16),
    );
    own.set(conv ? permuted(moved, shape, toOurs) : moved);
  }
}

/** Tests a method's loss and gradients for its targets, in the run that is given. */
export function testGradients(
  method: string,
  runOf: (target: Target) => RunInput,
  script: 'dpo_esd' | 'distillation' = 'dpo_esd',
): void {
  const golden = goldenLines<Told | Gradient>(script);
  const cases = golden.filter((each): each is Told => !Array.isArray(each) && each.method === method);
  for (const { target, loss: wanted, count, noise } of cases)
    test(`the loss and its gradients are torch's, ${method} of ${target}`, async (t) => {
      const before = device.memory.storages;
      const input = runOf(target);
      const session = await sessionOf(await opened({ ...input, ema: { decay: 0 } }));
      const prefix = target === 'lora' ? 'lora.unet.' : 'unet.';
      t.equal(session.parameters.size, count);
      move(session, target, (name) => name.slice(prefix.length));
      const loss = session.passes.queue(goldenPass(input.objective), 1);
      const [got] = loss.floats();
      loss.release();
      t.ok(Math.abs(got / wanted - 1) < 1e-5, `the loss ${got}, torch's ${wanted}`);
      session.passes.gather();
      const gradients = golden.filter(
        (each): each is Gradient => Array.isArray(each) && each[0] === method && each[1] === target,
      );
      t.ok(gradients.length > 10);
      for (const [, , key, norm, sum] of gradients) {
        const parameter = session.parameters.get(prefix + key);
        const values = scope(() => parameter && gradOf(parameter.tensor)?.floats());
        if (!parameter || !values) {
          t.fail(`${key} has no gradient`);
          continue;
        }
        const laid = parameter.layout === 'conv' ? permuted(values, parameter.memoryShape, toTorch) : values;
        const factors = numbers(key, [laid.length]);
        const ownNorm = Math.sqrt(laid.reduce((total, x) => total + x * x, 0));
        const ownSum = laid.reduce((total, x, i) => total + x * factors[i], 0);
        // The errors of elements add up in the sum as its factors' root mean square, which is 1.15.
        const error = Math.max(Math.abs(ownNorm - norm), Math.abs(ownSum - sum) / 1.15) / norm;
        t.ok(error < 10 * noise, `${key} is ${error} off`);
      }
      session.release();
      t.equal(device.memory.storages, before, 'live tensors');
    });
}
