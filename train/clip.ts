// Global-norm gradient clipping (Pascanu et al. 2013), as torch's clip_grad_norm_: all gradients are multiplied by
// max_norm / (norm + 1e-6) where that is below 1. The factor is returned and applied by the optimizer as it reads them.
import type { Device } from '../engine/device.ts';
import { gradOf } from '../engine/grad.ts';
import type { Parameter } from '../engine/module.ts';
import { update } from '../engine/op.ts';
import { sumSquares } from '../engine/ops/optimizer.ts';
import { scope } from '../engine/scope.ts';
import { type Tensor, zeros } from '../engine/tensor.ts';

export interface Clipping {
  /** The norm over all gradients, before clipping. */
  norm: number;
  /** What to multiply gradients by; at most 1. */
  scale: number;
  /** The first parameter whose gradient holds NaN or infinity (or squares that overflow float32); then skip the step. */
  nonfinite?: string;
}

/** The squares of gradients, on their way. */
export interface GradientNorms {
  /** Waits for them. `maxNorm` 0 measures and does not clip. */
  read(maxNorm: number): Clipping;
  release(): void;
}

/** Begins to measure the gradients that the parameters have now, each on its device. */
export function queueNorms(parameters: ReadonlyMap<string, Parameter>): GradientNorms {
  const sums = scope(() => {
    const made = new Map<Device, Tensor>();
    const measures = [...parameters.values()].map(({ tensor }, i) => {
      const { device } = tensor;
      const gradient = gradOf(tensor);
      if (!gradient) return [];
      const sum = made.get(device) ?? zeros([parameters.size], { device });
      made.set(device, sum);
      return sumSquares(gradient, sum, i);
    });
    update(measures.flat());
    return [...made.values()];
  });
  return {
    read(maxNorm) {
      const parts = sums.map((sum) => sum.floats());
      // On each device the others' are zero.
      const values = Array.from(parameters, (_, i) => parts.reduce((sum, part) => sum + part[i], 0));
      const bad = values.findIndex((value) => !Number.isFinite(value));
      const norm = Math.sqrt(values.reduce((total, value) => total + value, 0));
      const scale = maxNorm > 0 ? Math.min(1, maxNorm / (norm + 1e-6)) : 1;
      return { norm, scale, nonfinite: bad < 0 ? undefined : [...parameters.keys()][bad] };
    },
    release() {
      for (const sum of sums) sum.release();
    },
  };
}

/** The norm of the gradients that the parameters have now, and the factor that brings it to `maxNorm`. */
export function clipGradients(parameters: ReadonlyMap<string, Parameter>, maxNorm: number): Clipping {
  const norms = queueNorms(parameters);
  try {
    return norms.read(maxNorm);
  } finally {
    norms.release();
  }
}
