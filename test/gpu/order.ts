// Whether work keeps its order where a kernel begins before the one before it has ended (docs/gpu.md): a step of the base UNet at
// 1024x1024, launched and then replayed, and the gradients of passes at 512x512, must have the very bits that they have when every
// launch waits for all before it. Smaller models leave the GPU idle between their kernels, so that nothing overlaps there.
import { type BenchGpu, withoutPdl } from '../../bench/gpu/gpu.ts';
import { fillRandom, uniforms } from '../../bench/pool_weights.ts';
import { unetInputs } from '../../bench/subjects.ts';
import type { Device } from '../../engine/device.ts';
import { noGrad, requireGrad } from '../../engine/grad.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { mse } from '../../engine/ops/loss.ts';
import { cast } from '../../engine/ops/unary.ts';
import { unscoped } from '../../engine/scope.ts';
import { sizeOf, tensor } from '../../engine/tensor.ts';
import { presets } from '../../models/formats/presets.ts';
import { unet } from '../../models/unet/unet.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { openPasses } from '../../train/passes/pass.ts';

const DTYPE = 'bfloat16';

const preset = presets['sdxl-base'];
/** Pixels: of the step, and of the passes, which keep all that backward reads. */
const SIDE = 1024;
const TRAINED_SIDE = 512;
const TURNS = 12;

/** What each of some turns gives. */
export type Turns = (device: Device, turns: number) => number[][];

const inputs = (side: number, batch: number, device: Device) =>
  unetInputs(preset, { width: side, height: side, batch }, device, DTYPE);

/** Outputs of one step; a device records the second and replays it from then on. */
const steps: Turns = (device, turns) => {
  const model = unet(preset.unet);
  fillRandom(model, device, DTYPE);
  const { sample, times, conditioning, release } = inputs(SIDE, 2, device);
  const step = device.step(() => noGrad(() => model(sample, times, conditioning)));
  const outputs = Array.from({ length: turns }, () => step.run((y) => [...y.floats()]));
  step.release();
  release();
  unload(model);
  return outputs;
};

/** Loss and norm of the gradients of passes over the same inputs. */
const gradients: Turns = (device, turns) => {
  const model = unet(preset.unet);
  fillRandom(model, device, DTYPE);
  const parameters = namedParameters(model);
  for (const { tensor } of parameters.values()) requireGrad(tensor);
  const { sample, times, conditioning, release } = inputs(TRAINED_SIDE, 1, device);
  const target = unscoped(() => tensor(uniforms(sizeOf(sample.shape), 2), sample.shape, { device }));
  const loss = () => mse(cast(model(sample, times, conditioning), 'float32'), target);
  const passes = openPasses({ loss }, parameters, device);
  const outputs = Array.from({ length: turns }, () => {
    const value = passes.queue({}, 1);
    const { norm } = clipGradients(parameters, 1);
    const [lost] = value.floats();
    value.release();
    passes.clear();
    return [lost, norm];
  });
  passes.release();
  target.release();
  release();
  unload(model);
  return outputs;
};

export const orderWorks = { steps, gradients } satisfies Record<string, Turns>;

export interface OrderError {
  name: string;
  /** Numbers that have other bits, and how many may. */
  error: number;
  bound: 0;
}

/** Each turn of `work` where launches overlap, against one where they do not. */
export function orderErrors(gpu: BenchGpu, work: Turns): OrderError[] {
  const plain = withoutPdl(gpu).device;
  const [want] = work(plain, 1);
  plain.memory.trim();
  if (!want.every(Number.isFinite)) throw new Error('numbers that are not finite say nothing of order');
  const got = work(gpu.device, TURNS);
  gpu.device.memory.trim();
  return got.map((numbers, turn) => {
    const error = numbers.reduce((count, x, i) => count + Number(x !== want[i]), 0);
    return { name: `turn ${turn} of ${got.length}`, error, bound: 0 };
  });
}
