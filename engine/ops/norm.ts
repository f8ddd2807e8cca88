// Normalizations over channels-last tensors: group norm (Wu & He 2018) with SiLU folded in, layer norm, and softmax over
// the last axis. Statistics are float32 whatever the storage, and are saved for backward.
import { apply, defineOp, type RefTensor, type RefTensors, sameFloat } from '../op.ts';
import { empty, ShapeError, sizeOf, type Tensor } from '../tensor.ts';
import * as scalar from './math.ts';
import { rowsOf } from './reduce.ts';
import { awkwardShapes, awkwardSizes } from './samples.ts';
import { joinedReference, launchGradients, launchJoined, shapeBeside } from './skip.ts';

interface GroupNormAttrs {
  groups: number;
  eps: number;
  silu: boolean;
}

/** [n, hw, c] of a tensor [n, ..., c]. */
function imageDims(shape: readonly number[]): [number, number, number] {
  return [shape[0], sizeOf(shape.slice(1, -1)), shape.at(-1) as number];
}

function checkAffine(op: string, shape: readonly number[], weight: Tensor, bias: Tensor): void {
  const c = shape.at(-1);
  if (weight.size !== c || bias.size !== c) {
    throw new ShapeError(
      `${op}: x [${shape}] has ${c} channels, weight [${weight.shape}] and bias [${bias.shape}] do not`,
    );
  }
}

const groupNormOp = defineOp<GroupNormAttrs>({
  name: 'group_norm',
  outputs(t, { groups }) {
    const shape = shapeBeside('group_norm', t.x, t.skip);
    checkAffine('group_norm', shape, t.weight, t.bias);
    if ((shape.at(-1) as number) % groups) {
      throw new ShapeError(
        `group_norm: ${shape.at(-1)} channels of x [${shape}] do not divide into ${groups} groups`,
      );
    }
    const statistics = { shape: [shape[0], groups], dtype: 'float32' } as const;
    const dtype = sameFloat('group_norm', t, 'x', 'skip', 'weight', 'bias');
    return { y: { shape, dtype }, mean: statistics, rstd: statistics };
  },
  saves: ['x', 'skip', 'weight', 'bias', 'mean', 'rstd'],
  forward(t, { groups, eps, silu }, launch) {
    const outcome = [t.y, t.mean, t.rstd];
    const sizes = [...imageDims(t.y.shape), t.x.shape.at(-1) as number, groups, Number(silu), eps];
    launch('group_norm_forward', [...outcome, t.x, t.skip, t.weight, t.bias, ...sizes]);
  },
  backward(t, { groups, silu }, launch) {
    const x = t.skip ? launchJoined(launch, t.x, t.skip) : t.x;
    const { shape, device, dtype } = x;
    const dx = t.skip && (t.dx || t.dskip) ? empty(shape, { device, dtype }) : t.dx;
    const inputs = [t.dy, x, t.weight, t.bias, t.mean, t.rstd];
    const sizes = [...imageDims(shape), groups, Number(silu)];
    launch('group_norm_backward', [dx, t.dweight, t.dbias, ...inputs, ...sizes]);
    if (t.skip && dx) launchGradients(launch, t, dx);
  },
  reference: {
    forward: (tensors, { groups, eps, silu }) =>
      joinedReference(tensors, (t) =>
        eachGroup(t.x, groups, (group, indices, c) => {
          const { mean, rstd } = statistics(t.x, indices, eps);
          t.mean.data[group] = mean;
          t.rstd.data[group] = rstd;
          for (const i of indices) {
            const z = (t.x.data[i] - mean) * rstd * t.weight.data[i % c] + t.bias.data[i % c];
            t.y.data[i] = silu ? scalar.silu.f(z) : z;
          }
        }),
      ),
    backward: (tensors, { groups, silu }) =>
      joinedReference(tensors, (t) => {
        clearAffine(t);
        eachGroup(t.x, groups, (group, indices, c) => {
          const [mean, rstd] = [t.mean.data[group], t.rstd.data[group]];
          const outer = (i: number, h: number) =>
            silu
              ? t.dy.data[i] * scalar.silu.df(h * t.weight.data[i % c] + t.bias.data[i % c])
              : t.dy.data[i];
          normBackward(t, { indices, c, mean, rstd }, outer);
        });
      }),
  },
  samples: [
    groupSample([1, 4, 4, 8], 4, false),
    groupSample([2, 3, 5, 6], 2, true),
    groupSample([2, 7, 32], 32, true),
    groupSample([1, 9, 9, 40], 4, true),
    groupSample([1, 16, 16, 96], 32, false),
    groupSample([2, 3, 5, 6], 3, true, 9),
    groupSample([1, 6, 7, 8], 2, false, 12),
    groupSample([2, 70, 40], 32, true, 24),
    // Of fewer than three numbers, any become ±1, and the gradient is what rounding leaves of zero.
    ...awkwardSizes.map(([pixels], i) => {
      const [groups, width] = [[32, 1, 8, 4][i % 4], pixels < 3 ? 10 : [1, 2, 10, 3, 20][i % 5]];
      return groupSample([1 + (i % 2), pixels, groups * width], groups, i % 3 > 0);
    }),
  ],
});

function groupSample(x: number[], groups: number, silu: boolean, beside = 0) {
  const c = (x.at(-1) as number) + beside;
  const skip: Record<string, number[]> = beside ? { skip: [...x.slice(0, -1), beside] } : {};
  return { inputs: { x, ...skip, weight: [c], bias: [c] }, attrs: { groups, eps: 1e-5, silu } };
}

function eachGroup(
  x: RefTensor,
  groups: number,
  visit: (group: number, indices: number[], c: number) => void,
): void {
  const [n, hw, c] = imageDims(x.shape);
  const width = c / groups;
  for (let image = 0; image < n; image++)
    for (let g = 0; g < groups; g++) {
      const indices: number[] = [];
      for (let p = 0; p < hw; p++)
        for (let k = 0; k < width; k++) indices.push((image * hw + p) * c + g * width + k);
      visit(image * groups + g, indices, c);
    }
}

function statistics(x: RefTensor, indices: readonly number[], eps: number): { mean: number; rstd: number } {
  let mean = 0;
  for (const i of indices) mean += x.data[i] / indices.length;
  let variance = 0;
  for (const i of indices) variance += (x.data[i] - mean) ** 2 / indices.length;
  return { mean, rstd: 1 / Math.sqrt(variance + eps) };
}

function clearAffine(t: RefTensors): void {
  t.dweight?.data.fill(0);
  t.dbias?.data.fill(0);
}

/** Adds one normalized set's share to dweight and dbias, and writes its dx. `outer` is dL/d(affine output). */
function normBackward(
  t: RefTensors,
  { indices, c, mean, rstd }: { indices: readonly number[]; c: number; mean: number; rstd: number },
  outer: (i: number, h: number) => number,
): void {
  const normalized = indices.map((i) => (t.x.data[i] - mean) * rstd);
  const dz = indices.map((i, j) => outer(i, normalized[j]));
  let [meanG, meanGH] = [0, 0];
  indices.forEach((i, j) => {
    if (t.dweight) t.dweight.data[i % c] += dz[j] * normalized[j];
    if (t.dbias) t.dbias.data[i % c] += dz[j];
    const g = dz[j] * t.weight.data[i % c];
    meanG += g / indices.length;
    meanGH += (g * normalized[j]) / indices.length;
  });
  if (!t.dx) return;
  indices.forEach((i, j) => {
    t.dx.data[i] = rstd * (dz[j] * t.weight.data[i % c] - meanG - normalized[j] * meanGH);
  });
}

/**
 * x [n, ..., c], weight and bias [c]; groups of consecutive channels; `silu` applies x σ(x) to the result. With `skip`
 * [n, ..., cs] beside x, as skip.ts says, weight and bias are [c + cs].
 */
export const groupNorm = (
  x: Tensor,
  weight: Tensor,
  bias: Tensor,
  { groups, eps, silu = false, skip }: { groups: number; eps: number; silu?: boolean; skip?: Tensor },
): Tensor => apply(groupNormOp, { x, skip, weight, bias }, { groups, eps, silu });

function eachRow(x: RefTensor, visit: (row: number, indices: number[], c: number) => void): void {
  const [rows, c] = rowsOf(x.shape);
  for (let row = 0; row < rows; row++)
    visit(
      row,
      Array.from({ length: c }, (_, i) => row * c + i),
      c,
    );
}

const layerNormOp = defineOp<{ eps: number }>({
  name: 'layer_norm',
  outputs(t) {
    checkAffine('layer_norm', t.x.shape, t.weight, t.bias);
    const statistics = { shape: t.x.shape.slice(0, -1), dtype: 'float32' } as const;
    const dtype = sameFloat('layer_norm', t, 'x', 'weight', 'bias');
    return { y: { shape: t.x.shape, dtype }, mean: statistics, rstd: statistics };
  },
  saves: ['x', 'weight', 'mean', 'rstd'],
  forward: (t, { eps }, launch) =>
    launch('layer_norm_forward', [t.y, t.mean, t.rstd, t.x, t.weight, t.bias, ...rowsOf(t.x.shape), eps]),
  backward: (t, _, launch) =>
    launch('layer_norm_backward', [
      t.dx,
      t.dweight,
      t.dbias,
      t.dy,
      t.x,
      t.weight,
      t.mean,
      t.rstd,
      ...rowsOf(t.x.shape),
    ]),
  reference: {
    forward(t, { eps }) {
      eachRow(t.x, (row, indices, c) => {
        const { mean, rstd } = statistics(t.x, indices, eps);
        t.mean.data[row] = mean;
        t.rstd.data[row] = rstd;
        for (const i of indices)
          t.y.data[i] = (t.x.data[i] - mean) * rstd * t.weight.data[i % c] + t.bias.data[i % c];
      });
    },
    backward(t) {
      clearAffine(t);
      eachRow(t.x, (row, indices, c) =>
        normBackward(t, { indices, c, mean: t.mean.data[row], rstd: t.rstd.data[row] }, (i) => t.dy.data[i]),
      );
    },
  },
  // A GPU keeps rows of up to 1280 in registers, if they are whole pieces of 16 bytes.
  samples: [
    ...[
      [3, 7, 33],
      [2, 320],
      [3, 640],
      [5, 600],
      [2, 1280],
      [3, 644],
      [2, 1284],
      [1, 641],
    ],
    ...awkwardShapes.map(([rows, c]) => [rows, Math.max(3, c)]),
  ].map((x) => ({
    inputs: { x, weight: x.slice(-1), bias: x.slice(-1) },
    attrs: { eps: 1e-5 },
  })),
});

/** Normalizes the last axis of x [..., c]; weight and bias [c]. */
export const layerNorm = (x: Tensor, weight: Tensor, bias: Tensor, { eps }: { eps: number }): Tensor =>
  apply(layerNormOp, { x, weight, bias }, { eps });

const softmaxOp = defineOp<Record<string, never>>({
  name: 'softmax',
  outputs: (t) => ({ y: { shape: t.x.shape, dtype: sameFloat('softmax', t, 'x') } }),
  saves: ['y'],
  forward: (t, _, launch) => launch('softmax_forward', [t.y, t.x, ...rowsOf(t.x.shape)]),
  backward: (t, _, launch) => launch('softmax_backward', [t.dx, t.dy, t.y, ...rowsOf(t.y.shape)]),
  reference: {
    forward({ y, x }) {
      eachRow(x, (_, indices) => {
        const max = indices.reduce((m, i) => Math.max(m, x.data[i]), Number.NEGATIVE_INFINITY);
        const total = indices.reduce((s, i) => s + Math.exp(x.data[i] - max), 0);
        for (const i of indices) y.data[i] = Math.exp(x.data[i] - max) / total;
      });
    },
    backward({ dx, dy, y }) {
      eachRow(y, (_, indices) => {
        const dot = indices.reduce((s, i) => s + y.data[i] * dy.data[i], 0);
        for (const i of indices) dx.data[i] = y.data[i] * (dy.data[i] - dot);
      });
    },
  },
  samples: [[1, 1], [2, 1000], ...awkwardShapes].map((x) => ({ inputs: { x }, attrs: {} })),
});

/** exp(x) normalized to sum 1 over the last axis. */
export const softmax = (x: Tensor): Tensor => apply(softmaxOp, { x }, {});
