// What does not fit is refused before anything runs, in a sentence that names the op and both sides.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { attention } from '../../engine/ops/attention.ts';
import { add } from '../../engine/ops/binary.ts';
import { conv2d } from '../../engine/ops/conv2d.ts';
import { linear, matmul } from '../../engine/ops/linear.ts';
import { huber, mse } from '../../engine/ops/loss.ts';
import { concat, embedding, permute, slice, upsampleNearest } from '../../engine/ops/move.ts';
import { groupNorm, layerNorm } from '../../engine/ops/norm.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { timestepEmbedding } from '../../engine/ops/timestep_embedding.ts';
import { standInDevice } from '../../engine/profile.ts';
import { scope } from '../../engine/scope.ts';
import { empty, type Tensor, tensor } from '../../engine/tensor.ts';
import type { DType } from '../../io/dtype.ts';

const device = openDevice('reference');
const of = (...shape: number[]): Tensor => empty(shape, { device });
const typed = (dtype: DType, ...shape: number[]): Tensor => empty(shape, { device, dtype });

const refused: readonly (readonly [call: () => unknown, message: RegExp])[] = [
  [() => of(2, -1), /^a tensor cannot have the shape \[2,-1\]/],
  [() => of(2 ** 16, 2 ** 15), /^a tensor of shape \[65536,32768\] has more than 2\^31 - 1 elements; use a/],
  [() => tensor([1, 2, 3], [2], { device }), /^tensor: 3 values do not fill \[2\]/],
  [() => of(2, 3).reshape(4, -1), /^reshape: \[2,3\] has 6 elements, \[4,-1\] takes another number/],
  [
    () => typed('bfloat16', 4).upload(new Uint8Array(16)),
    /^tensor: 16 bytes from 0 on do not fit bfloat16 \[4\]/,
  ],
  [() => of(4).upload(new Uint8Array(8), 12), /^tensor: 8 bytes from 12 on do not fit float32 \[4\]/],
  [() => add(of(2), typed('float16', 2)), /^add: a is float32, b is float16; cast one of them/],
  [() => add(of(2), empty([2], { device: standInDevice() })), /^add: inputs are on reference and stand-in/],
  [() => add(of(2, 3), of(2, 2)), /^add: \[2,3\] and \[2,2\] differ/],
  [() => linear(of(2, 3), of(5, 4)), /^linear: weight \[5,4\] takes 4 inputs, x \[2,3\] has 3/],
  [() => linear(of(2, 3), of(5, 3), of(4)), /^linear: bias \[4\] for 5 outputs/],
  [() => matmul(of(2, 3), of(4, 5)), /^matmul: a \[2,3\] and b \[4,5\] do not chain \(inner 3 and 4\)/],
  [
    () => conv2d(of(1, 4, 4, 3), of(8, 3, 3, 2)),
    /^conv2d: weight \[8,3,3,2\] takes 2 input channels, x \[1,4,4,3\]/,
  ],
  [() => conv2d(of(1, 2, 2, 3), of(8, 3, 3, 3)), /^conv2d: x \[1,2,2,3\] is smaller than the kernel/],
  [
    () => attention(of(1, 4, 6), of(1, 5, 8), of(1, 5, 8), { heads: 2 }),
    /^attention: q \[1,4,6\], k \[1,5,8\]/,
  ],
  [
    () => attention(of(1, 4, 6), of(1, 5, 6), of(1, 5, 6), { heads: 4 }),
    /^attention: 6 channels do not divide/,
  ],
  [
    () => groupNorm(of(1, 4, 6), of(6), of(6), { groups: 4, eps: 1 }),
    /^group_norm: 6 channels of x \[1,4,6\]/,
  ],
  [
    () => layerNorm(of(4, 6), of(5), of(6), { eps: 1 }),
    /^layer_norm: x \[4,6\] has 6 channels, weight \[5\]/,
  ],
  [() => concat([of(2, 3), of(3, 3)], 1), /^concat: \[2,3\] and \[3,3\] differ outside axis 1/],
  [() => slice(of(2, 3), 1, 2, 2), /^slice: 2..4 of axis 1 of x \[2,3\]/],
  [() => sum(of(2, 3), 2), /^sum: axis 2 of a tensor with 2 axes/],
  [() => permute(of(2, 3), [0, 0]), /^permute: order \[0,0\] for x \[2,3\]/],
  [() => upsampleNearest(of(2, 3), 4, 6), /^upsample_nearest: x \[2,3\] is not \[n, h, w, c\]/],
  [() => embedding(of(2), of(5, 4)), /^embedding: ids are float32, not int32/],
  [() => timestepEmbedding(typed('bfloat16', 2), 8), /^timestep_embedding: t is bfloat16, not float32/],
  [() => mse(of(2, 3), of(2, 4)), /^mse: prediction \[2,3\] and target \[2,4\] differ/],
  [
    () => mse(of(2, 3), of(2, 3), of(3)),
    /^mse: weights are float32 \[3\], not a float32 for each of 2 images/,
  ],
  [
    () => huber(of(2, 3), of(2, 3), typed('bfloat16', 2)),
    /^huber: weights are bfloat16 \[2\], not a float32/,
  ],
];

test('shapes and types that do not fit', (t) => {
  const before = device.memory.storages;
  for (const [call, message] of refused)
    t.throws(() => scope(call), { name: 'ShapeError', message }, String(message));
  t.equal(device.memory.storages, before, 'and nothing is left behind');
  t.end();
});
