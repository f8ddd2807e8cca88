// One update of training, as the trainer makes it: loss, gradients with checkpointing, clipping and a step of an optimizer, of
// the whole UNet (weights rounded at random where they are bfloat16) or of LoRA adapters on it. Random latents and text.
import type { Device } from '../engine/device.ts';
import { requireGrad } from '../engine/grad.ts';
import { namedParameters, unload } from '../engine/module.ts';
import { mse } from '../engine/ops/loss.ts';
import { cast } from '../engine/ops/unary.ts';
import { unscoped } from '../engine/scope.ts';
import { sizeOf, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { addAdapters, parametersOf } from '../models/adapters/adapters.ts';
import type { ModelPreset } from '../models/formats/presets.ts';
import { unet } from '../models/unet/unet.ts';
import { clipGradients } from '../train/optimizers/clip.ts';
import { createOptimizer, type OptimizerSettings } from '../train/optimizers/create.ts';
import { openPasses } from '../train/passes/pass.ts';
import { fill } from '../train/run/fields.ts';
import { fields } from '../train/run/run_fields.ts';
import { casesOf, type OpCase } from './ops.ts';
import { fillRandom, uniforms } from './pool_weights.ts';
import { type Sizes, type Subject, unetInputs } from './subjects.ts';

const settings = { ...fill(fields, {}, 'the defaults').optimizer, stochastic_rounding: true };

/** The layers that LoRA trains by default. */
const targets = ['to_q', 'to_k', 'to_v', 'to_out.0'];

export interface UpdateOptions {
  /** Trains adapters of this rank in place of the weights. */
  loraRank?: number;
  optimizer?: OptimizerSettings['name'];
  checkpointing?: boolean;
}

/** `parameters` of the result counts what is trained. */
export function buildUpdate(
  preset: ModelPreset,
  sizes: Sizes,
  device: Device,
  dtype: FloatDType,
  { loraRank, optimizer: name = 'adafactor', checkpointing = true }: UpdateOptions = {},
): Subject {
  const module = unet(preset.unet, { gradientCheckpointing: checkpointing });
  fillRandom(module, device, dtype);
  const trained = loraRank
    ? parametersOf(
        addAdapters(module, { rank: loraRank, alpha: loraRank, targets }, (_, count) =>
          uniforms(count, 1).map((x) => (x + 1) / 2),
        ),
      )
    : namedParameters(module);
  for (const parameter of trained.values()) requireGrad(parameter.tensor);
  const optimizer = createOptimizer(trained, { ...settings, name }, 0);
  const { sample, times, conditioning, release } = unetInputs(preset, sizes, device, dtype);
  const { shape } = sample;
  const target = unscoped(() => tensor(uniforms(sizeOf(shape), 2), shape, { device }));
  const loss = () => mse(cast(module(sample, times, conditioning), 'float32'), target);
  const passes = openPasses({ loss }, trained, device);
  return {
    parameters: [...trained.values()].reduce((total, p) => total + p.size, 0),
    run() {
      passes.queue({}, 1).release();
      optimizer.step(1e-5, clipGradients(trained, 1).scale);
      passes.clear();
    },
    release() {
      passes.release();
      optimizer.release();
      unload(module);
      target.release();
      release();
    },
  };
}

/** Every distinct op call of an update's forward; a layer's activation is an op of its own there. */
export const updateCases = (preset: ModelPreset, sizes: Sizes, dtype: FloatDType): OpCase[] =>
  casesOf((device) => {
    const update = buildUpdate(preset, sizes, device, dtype, { checkpointing: false });
    update.run();
    update.release();
  });
