// The gradients of a network that trains beside tiny-sdxl's frozen UNet, held to what golden/*_gradients.py recorded of diffusers' for one
// pass: questions and pictures by the formulas of controlnet_golden.ts.
import type { Test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import { toDevice } from '../../models/vae/latents.ts';
import type { Control } from '../../train/controls/control.ts';
import { diffusionLoss, objectiveOf } from '../../train/objective/objective.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { numbers, picture } from './controlnet_golden.ts';
import { permuted } from './golden.ts';
import { basic, device, model } from './small_runs.ts';

/** A line of a golden file: a parameter's gradient. */
export type Gradient = [of: string, key: string, norm: number, sum: number];

/** A network by its golden lines' name. */
export interface Beside {
  name: string;
  loss: number;
  /** How far torch's float32 is from its float64 in the worst of the gradients, where that is much. */
  noise?: number;
  net: AnyModule;
  /** What passes of it are told, and what a pipeline has of it beside the UNet. */
  control: Control;
  pipeline(unet: UNet): Partial<Pipeline>;
  /** What else they read. */
  inputs(made: (key: string, ...shape: number[]) => Tensor, pictures: Float32Array): Record<string, Tensor>;
}

const source = openModel(model);
const [n, h, w] = [2, 8, 12];
export const pixelShape: readonly number[] = [n, 8 * h, 8 * w, 3];

/** How far float32's gradients may be from float64's, as a part of their norm: torch's are up to 1e-5, and here is another order of sums. */
const NEAR = 3e-5;

/** Both, and that the UNet gets no gradient. `golden` has its lines among others. */
export function holdGradients(
  t: Test,
  golden: readonly Gradient[],
  beside: Beside,
  frozen: UNet = frozenUNet(),
): void {
  const { name, loss: wanted, noise = 0, net, control } = beside;
  const parameters = namedParameters(net);
  for (const { tensor: weight } of parameters.values()) requireGrad(weight);
  scope(() => {
    const loss = lossBeside(beside, frozen, control);
    const [got] = loss.floats();
    t.ok(Math.abs(got / wanted - 1) < 3e-6, `${name}: the loss ${got}, diffusers' ${wanted}`);
    backward(loss);
  });
  let worst = { key: '', error: 0 };
  const own = golden.filter(([of]) => of === name);
  const largest = Math.max(...own.map(([, , norm]) => norm));
  for (const [, key, norm, sum] of own) {
    const parameter = parameters.get(key);
    const values = scope(() => parameter && gradOf(parameter.tensor)?.floats());
    if (!parameter || !values) {
      t.fail(`${name}: ${key} has no gradient`);
      continue;
    }
    const laid = parameter.layout === 'conv' ? permuted(values, parameter.memoryShape, [0, 3, 1, 2]) : values;
    const factors = numbers(key, [laid.length]);
    const [ownNorm, ownSum] = [
      Math.sqrt(laid.reduce((total, x) => total + x * x, 0)),
      laid.reduce((total, x, i) => total + x * factors[i], 0),
    ];
    // Errors of elements that are independent add up in the sum as its factors' root mean square, which is 1.15.
    const error = Math.max(Math.abs(ownNorm - norm), Math.abs(ownSum - sum) / 1.15) / (norm || largest);
    if (!(error <= worst.error)) worst = { key, error };
  }
  t.ok(worst.error < Math.max(NEAR, 2 * noise), `${name}: ${worst.key} is ${worst.error} off`);
  t.equal(own.length, parameters.size, `${name}: all its parameters`);
  const reached = [...namedParameters(frozen)].filter(([, p]) => gradOf(p.tensor));
  t.same(reached, [], `${name}: the UNet has no gradient`);
  for (const { tensor: weight } of parameters.values()) clearGrad(weight);
  for (const each of [net, frozen]) unload(each);
}

/** tiny-sdxl's, loaded. */
export function frozenUNet(options: { gradientCheckpointing?: boolean } = {}): UNet {
  const frozen = unet(parseUNetConfig(source.config('unet')), options);
  source.load('unet', frozen, device, 'float32');
  return frozen;
}

function lossBeside({ name, pipeline, inputs: more }: Beside, frozen: UNet, control: Control): Tensor {
  const made = (key: string, ...shape: number[]) =>
    tensor(numbers(`${name}.${key}`, shape), shape, { device });
  const latents = (key: string) =>
    toDevice({ shape: [n, 4, h, w], data: numbers(`${name}.${key}`, [n, 4, h, w]) }, device, 'float32');
  const images = [1, 2].flatMap((seed) => [...picture(seed, 8 * w, 8 * h).data]);
  const inputs = {
    ...{ sample: latents('sample'), target: latents('target') },
    timesteps: tensor([7, 803], [n], { device }),
    ...more(
      made,
      Float32Array.from(images, (x) => x / 255),
    ),
  };
  const ids = [64, 96, 0, 0, 64, 96, 80, 100, 8, 2, 64, 96];
  const conditioning = {
    context: made('encoder_hidden_states', n, 77, 80),
    textEmbeds: made('text_embeds', n, 40),
    timeIds: tensor(ids, [n, 6], { device }),
  };
  const { objective: settings } = resolveRun(basic('gradients'), 'test', 'test');
  const objective = objectiveOf(settings, source.config('scheduler'));
  const network = control.network({ unet: frozen, ...pipeline(frozen) } as Pipeline, inputs);
  return diffusionLoss(network, objective, inputs, conditioning);
}
