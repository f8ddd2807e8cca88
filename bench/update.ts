// One update of training, as the trainer makes it: loss, gradients with checkpointing, clipping and an Adafactor step, of
// the whole UNet (weights rounded at random where they are bfloat16) or of LoRA adapters on it. Random latents and text.
import type { Device } from '../engine/device.ts';
import { backward, clearGrad, requireGrad } from '../engine/grad.ts';
import { namedParameters, unload } from '../engine/module.ts';
import { mse } from '../engine/ops/loss.ts';
import { cast } from '../engine/ops/unary.ts';
import { scope } from '../engine/scope.ts';
import { sizeOf, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { addLora } from '../models/adapters.ts';
import type { ModelPreset } from '../models/presets.ts';
import { unet } from '../models/unet.ts';
import { clipGradients } from '../train/clip.ts';
import { createOptimizer } from '../train/optimizers/create.ts';
import { fillRandom, uniforms } from './pool_weights.ts';
import { type Sizes, type Subject, unetInputs } from './subjects.ts';

const adafactor = {
  name: 'adafactor',
  betas: [0.9, 0.999],
  eps: 1e-8,
  weight_decay: 1e-2,
  clip_threshold: 1,
  decay_rate: -0.8,
  stochastic_rounding: true,
} as const;

/** The layers that LoRA trains by default. */
const targets = ['to_q', 'to_k', 'to_v', 'to_out.0'];

/** `loraRank` trains adapters of that rank in place of the weights. `parameters` counts what is trained. */
export function buildUpdate(
  preset: ModelPreset,
  sizes: Sizes,
  device: Device,
  dtype: FloatDType,
  loraRank?: number,
): Subject {
  const module = unet(preset.unet, { gradientCheckpointing: true });
  fillRandom(module, device, dtype);
  const trained = loraRank
    ? addLora(module, { rank: loraRank, alpha: loraRank, targets }, (_, count) =>
        uniforms(count, 1).map((x) => (x + 1) / 2),
      )
    : namedParameters(module);
  for (const parameter of trained.values()) requireGrad(parameter.tensor);
  const optimizer = createOptimizer(trained, adafactor, 0);
  const { sample, times, conditioning, release } = unetInputs(preset, sizes, device, dtype);
  return {
    parameters: [...trained.values()].reduce((total, p) => total + p.size, 0),
    run() {
      scope(() => {
        const prediction = cast(module(sample, times, conditioning), 'float32');
        const target = tensor(uniforms(sizeOf(prediction.shape), 2), prediction.shape, { device });
        backward(mse(prediction, target));
      });
      optimizer.step(1e-5, clipGradients(trained, 1).scale);
      for (const parameter of trained.values()) clearGrad(parameter.tensor);
    },
    release() {
      optimizer.release();
      unload(module);
      release();
    },
  };
}
