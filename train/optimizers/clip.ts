// Global-norm gradient clipping (Pascanu et al. 2013), as torch's clip_grad_norm_: all gradients are multiplied by
// max_norm / (norm + 1e-6) where that is below 1. The factor is returned and applied by the optimizer as it reads them.
import type { Device } from '../../engine/device.ts';
import { gradOf } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { update } from '../../engine/op.ts';
import { sumSquares } from '../../engine/ops/optimizer.ts';
import { built, scope, unscoped } from '../../engine/scope.ts';
import { type Tensor, zeros } from '../../engine/tensor.ts';

export interface Clipping {
  /** The norm over all gradients, before clipping. */
  norm: number;
  /** What to multiply gradients by; at most 1. */
  scale: number;
  /** The first parameter whose gradient holds NaN or infinity (or squares that overflow float32); then skip the step. */
  nonfinite?: string;
}

/** Gradients by parameter. */
export type Gradients = ReadonlyMap<string, Tensor>;

/** Those that parameters have collected. */
export const gradientsOf = (parameters: ReadonlyMap<string, Parameter>): Gradients =>
  new Map(
    [...parameters].flatMap(([name, { tensor }]) => {
      const gradient = gradOf(tensor);
      return gradient ? [[name, gradient] as const] : [];
    }),
  );

/** The squares of gradients, on their way. */
export interface GradientNorms {
  /** Begins to measure these, each on its device. */
  add(gradients: Gradients): void;
  /** Waits for them. `maxNorm` 0 measures and does not clip. */
  read(maxNorm: number): Clipping;
  release(): void;
}

/** `count` sums, of which each grows on one device or another. */
export function openSums(count: number) {
  const sums = new Map<Device, Tensor>();
  return {
    /** All of them [count], as far as they grow there. */
    on(device: Device): Tensor {
      const sum = sums.get(device) ?? unscoped(() => zeros([count], { device }));
      sums.set(device, sum);
      return sum;
    },
    /** Waits for them. */
    read(): number[] {
      // What grows on one device is zero on the others.
      const parts = [...sums.values()].map((sum) => sum.floats());
      return Array.from({ length: count }, (_, i) => parts.reduce((sum, part) => sum + part[i], 0));
    },
    release() {
      for (const sum of sums.values()) sum.release();
    },
  };
}

/** Measures gradients of the parameters. */
export function openNorms(parameters: ReadonlyMap<string, Parameter>): GradientNorms {
  const places = new Map([...parameters.keys()].map((name, i) => [name, i]));
  const sums = openSums(parameters.size);
  return {
    add(gradients) {
      update(
        [...gradients].map(([name, gradient]) =>
          sumSquares(gradient, sums.on(gradient.device), places.get(name) as number),
        ),
      );
    },
    read(maxNorm) {
      const values = sums.read();
      const bad = values.findIndex((value) => !Number.isFinite(value));
      const norm = Math.sqrt(values.reduce((total, value) => total + value, 0));
      const scale = maxNorm > 0 ? Math.min(1, maxNorm / (norm + 1e-6)) : 1;
      return { norm, scale, nonfinite: bad < 0 ? undefined : [...parameters.keys()][bad] };
    },
    release: sums.release,
  };
}

/** Begins to measure the gradients that the parameters have now. */
export const queueNorms = (parameters: ReadonlyMap<string, Parameter>): GradientNorms =>
  built(() => {
    const norms = openNorms(parameters);
    scope(() => norms.add(gradientsOf(parameters)));
    return norms;
  });

/** The norm of the gradients that the parameters have now, and the factor that brings it to `maxNorm`. */
export function clipGradients(parameters: ReadonlyMap<string, Parameter>, maxNorm: number): Clipping {
  const norms = queueNorms(parameters);
  try {
    return norms.read(maxNorm);
  } finally {
    norms.release();
  }
}
