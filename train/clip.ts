// Global-norm gradient clipping (Pascanu et al. 2013), as torch's clip_grad_norm_: all gradients are multiplied by
// max_norm / (norm + 1e-6) where that is below 1. The factor is returned and applied by the optimizer as it reads them.
import { gradOf } from '../engine/grad.ts';
import type { Parameter } from '../engine/module.ts';
import { update } from '../engine/op.ts';
import { sumSquares } from '../engine/ops/optimizer.ts';
import { scope } from '../engine/scope.ts';
import { zeros } from '../engine/tensor.ts';

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

/** Begins to measure the gradients that the parameters have now. */
export function queueNorms(parameters: ReadonlyMap<string, Parameter>): GradientNorms {
  const sums = scope(() => {
    const [{ tensor }] = parameters.values();
    const made = zeros([parameters.size], { device: tensor.device });
    const measures = [...parameters.values()].map((parameter, i) => {
      const gradient = gradOf(parameter.tensor);
      return gradient ? sumSquares(gradient, made, i) : [];
    });
    update(measures.flat());
    return made;
  });
  return {
    read(maxNorm) {
      const values = sums.floats();
      const bad = values.findIndex((value) => !Number.isFinite(value));
      const norm = Math.sqrt(values.reduce((total, value) => total + value, 0));
      const scale = maxNorm > 0 ? Math.min(1, maxNorm / (norm + 1e-6)) : 1;
      return { norm, scale, nonfinite: bad < 0 ? undefined : [...parameters.keys()][bad] };
    },
    release: () => sums.release(),
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
