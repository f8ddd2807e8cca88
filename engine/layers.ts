// The modules that own weights: linear, convolution, the norms and lookup tables, with the children names (`weight`,
// `bias`) that every checkpoint format uses.
import { wrapped } from './circular.ts';
import { conv2dDoubled } from './doubled.ts';
import { type Module, module, type Parameter, parameter } from './module.ts';
import { conv2d as conv2dOp, type Padding } from './ops/conv2d.ts';
import { linearFp8 } from './ops/fp8.ts';
import { type Activation, linear as linearOp } from './ops/linear.ts';
import { embedding as embeddingOp } from './ops/move.ts';
import { groupNorm as groupNormOp, layerNorm as layerNormOp } from './ops/norm.ts';
import type { Tensor } from './tensor.ts';

type Weights = { weight: Parameter; bias: Parameter | undefined };
type Affine = { weight: Parameter; bias: Parameter };

export type Linear = Module<
  [x: Tensor, options?: { residual?: Tensor; activation?: Activation }],
  Tensor,
  Weights
>;

/** y = x W^T + b. For activation `geglu`, `outputs` counts both halves. */
export const linear = (inputs: number, outputs: number, { bias = true }: { bias?: boolean } = {}): Linear =>
  module(
    { weight: parameter([outputs, inputs]), bias: bias ? parameter([outputs]) : undefined },
    (m, x: Tensor, options?: { residual?: Tensor; activation?: Activation }) =>
      m.weight.fp8
        ? linearFp8(x, m.weight.fp8, m.bias?.tensor, options)
        : linearOp(x, m.weight.tensor, m.bias?.tensor, options),
  );

/** With `doubled`, a 3x3 kernel's doubledTaps(), the layer convolves x doubled by nearest neighbour and takes no other option. */
export type ConvOptions =
  | { shift?: Tensor; residual?: Tensor; skip?: Tensor; doubled?: undefined }
  | { doubled: readonly Tensor[]; shift?: undefined; residual?: undefined; skip?: undefined };

export type Conv2d = Module<[x: Tensor, options?: ConvOptions], Tensor, Weights> & {
  readonly stride: number;
  readonly padding: Padding;
};

/**
 * A square kernel over [n, h, w, c]. Padding is one number for all sides, or [top, left, bottom, right]: zeros, or within withoutSeams()
 * what lies on the other side.
 */
export function conv2d(
  inputs: number,
  outputs: number,
  kernel: number,
  options: { stride?: number; padding?: number | Padding; bias?: boolean } = {},
): Conv2d {
  const { stride = 1, padding = 0, bias = true } = options;
  const sides: Padding = typeof padding === 'number' ? [padding, padding, padding, padding] : padding;
  const even = sides[0] === sides[2] && sides[1] === sides[3];
  const layer = module(
    {
      weight: parameter([outputs, inputs, kernel, kernel], 'conv'),
      bias: bias ? parameter([outputs]) : undefined,
    },
    (m, image: Tensor, { doubled, skip, ...options }: ConvOptions = {}) => {
      if (doubled) return conv2dDoubled(image, doubled, m.bias?.tensor);
      const padded = (t: Tensor) => (even ? wrapped(t, sides) : { x: t, padding: sides });
      const { x, padding } = padded(image);
      const beside = { stride, padding, skip: skip && padded(skip).x };
      return conv2dOp(x, m.weight.tensor, m.bias?.tensor, { ...beside, ...options });
    },
  );
  return Object.assign(layer, { stride, padding: sides });
}

/** `channels` counts x's and those of a skip connection beside it. */
export const groupNorm = (
  groups: number,
  channels: number,
  { eps, silu = false }: { eps: number; silu?: boolean },
): Module<[x: Tensor, options?: { skip?: Tensor }], Tensor, Affine> =>
  module(
    { weight: parameter([channels]), bias: parameter([channels]) },
    (m, x: Tensor, { skip }: { skip?: Tensor } = {}) =>
      groupNormOp(x, m.weight.tensor, m.bias.tensor, { groups, eps, silu, skip }),
  );

export const layerNorm = (
  channels: number,
  { eps = 1e-5 }: { eps?: number } = {},
): Module<[x: Tensor], Tensor, Affine> =>
  module({ weight: parameter([channels]), bias: parameter([channels]) }, (m, x: Tensor) =>
    layerNormOp(x, m.weight.tensor, m.bias.tensor, { eps }),
  );

export const embedding = (
  vocabulary: number,
  channels: number,
): Module<[ids: Tensor], Tensor, { weight: Parameter }> =>
  module({ weight: parameter([vocabulary, channels]) }, (m, ids: Tensor) =>
    embeddingOp(ids, m.weight.tensor),
  );
