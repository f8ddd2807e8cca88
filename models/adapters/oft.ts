// Orthogonal finetuning (OFT, Qiu et al. 2023) out of files: a weight is multiplied by a rotation R of blocks along its diagonal, each
// made of a skew matrix Q (cayley.ts). Three spellings are told by their parts:
//
//   oft_blocks [blocks, b, b]         LyCORIS's diag-oft and kohya's networks/oft.py: Q = B - B^T, W' = R^T W turns outputs
//   oft_diag [blocks, b, b]           LyCORIS 2.0: R itself
//   oft_R [blocks, b (b - 1) / 2]     peft: what is above Q's diagonal, W' = W R^T turns inputs; its config tells how R is made
//
// alpha is a constraint: all of Q is no longer than alpha times the outputs. LyCORIS's rescale [o, 1, ...] then stretches rows. A
// convolution's rows are its outputs in all layouts; its inputs are counted as torch has them, [i, kh, kw].
import { add, mul } from '../../engine/ops/binary.ts';
import { matmul } from '../../engine/ops/linear.ts';
import { permute } from '../../engine/ops/move.ts';
import { cast, scale } from '../../engine/ops/unary.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { TensorInfo } from '../../io/tensor_file.ts';
import { cayley, neumann } from './cayley.ts';
import { type Parts, type Read, sideOf } from './lora_kinds.ts';
import type { PeftConfig } from './peft_config.ts';

/** What the rotation makes of the weight less the weight itself, both float32 and as they lie in memory. */
export function rotated(parts: Parts, weight: Tensor, read: Read, config: PeftConfig): Tensor {
  if (parts.oft_R) return turnedInputs(weight, rotationOfPeft(parts.oft_R, weight, read, config));
  const [o] = weight.shape;
  const matrix = weight.reshape(o, -1);
  const turned = turnedOutputs(matrix, rotationOf(parts, weight, read));
  const { rescale } = parts;
  if (!rescale) return turned.reshape(...weight.shape);
  const factors = tensor(read(rescale), [o, 1], { device: weight.device });
  return stretched(turned, matrix, factors).reshape(...weight.shape);
}

/**
 * What makes rows of the weight and its difference longer by float32 factors, less the weight: factor (W + D) - W. Written as D +
 * (factor - 1) (W + D), which reads the factors once: where they are trained, their gradient comes whole.
 */
export function stretched(difference: Tensor, weight: Tensor, factors: Tensor): Tensor {
  const more = cast(scale(factors.reshape(weight.shape[0], 1), 1, -1), weight.dtype);
  return add(difference, mul(add(weight, difference), more));
}

/** (R - I)^T W of a matrix [o, n] and a rotation's R - I [blocks, b, b]. */
export function turnedOutputs(weight: Tensor, rotation: Tensor): Tensor {
  const [blocks, b] = rotation.shape;
  const [, columns] = weight.shape;
  return matmul(rotation, weight.reshape(blocks, b, columns), { transA: true }).reshape(...weight.shape);
}

/** W (R - I)^T; one block turns all inputs, a few at a time. */
function turnedInputs(weight: Tensor, rotation: Tensor): Tensor {
  const { shape } = weight;
  const [o, i] = [shape[0], shape.at(-1) as number];
  const [blocks, b] = rotation.shape;
  const torch = permute(weight.reshape(o, -1, i), [0, 2, 1]);
  const turn = (x: Tensor): Tensor => matmul(x, rotation, { transB: true });
  const turned =
    blocks === 1
      ? turn(torch.reshape(1, -1, b))
      : permute(turn(permute(torch.reshape(o, blocks, b), [1, 0, 2])), [1, 0, 2]);
  return permute(turned.reshape(o, i, -1), [0, 2, 1]).reshape(...shape);
}

/** R - I of blocks that are kept whole. */
function rotationOf({ oft_blocks, oft_diag, alpha }: Parts, weight: Tensor, read: Read): Tensor {
  const info = (oft_blocks ?? oft_diag) as TensorInfo;
  const [blocks, b] = info.shape;
  const values = read(info);
  const uploaded = (numbers: Float32Array) => tensor(numbers, [blocks, b, b], { device: weight.device });
  if (oft_diag) return uploaded(values.map((x, at) => ((at % (b * b)) % (b + 1) === 0 ? x - 1 : x)));
  const q = values.map((x, at) => {
    const [row, column] = [Math.floor(at / b) % b, at % b];
    return x - values[at + (column - row) * (b - 1)];
  });
  const constraint = alpha ? read(alpha)[0] * weight.shape[0] : 0;
  // kohya's constraint of 0 lets nothing turn, LyCORIS's is none.
  if (constraint > 0 || info.name.startsWith('oft_unet_')) shorten(q, constraint);
  return cayley(uploaded(q), longestOf(q, b));
}

/** R - I as peft 0.21 makes it: what of a config is not told is its default. */
function rotationOfPeft(info: TensorInfo, weight: Tensor, read: Read, config: PeftConfig): Tensor {
  const { coft = false, eps = 6e-5, use_cayley_neumann = true, num_cayley_neumann_terms = 5 } = config;
  const [blocks, count] = info.shape;
  const b = sideOf(count);
  const values = read(info);
  const q = new Float32Array(blocks * b * b);
  for (let block = 0, from = 0; block < blocks; block++)
    for (let row = 0; row < b; row++)
      for (let column = row + 1; column < b; column++, from++) {
        q[(block * b + row) * b + column] = values[from];
        q[(block * b + column) * b + row] = -values[from];
      }
  if (coft) for (const each of blocksOf(q, b)) shorten(each, eps / Math.sqrt(blocks));
  const uploaded = (numbers: Float32Array) => tensor(numbers, [blocks, b, b], { device: weight.device });
  if (use_cayley_neumann) return neumann(uploaded(q), num_cayley_neumann_terms);
  // (I - Q) (I + Q)^-1, the other way round than the series.
  return cayley(uploaded(q.map((x) => -x)), longestOf(q, b));
}

const lengthOf = (q: Float32Array): number => Math.sqrt(q.reduce((sum, x) => sum + x * x, 0));

const blocksOf = (q: Float32Array, b: number): Float32Array[] =>
  Array.from({ length: q.length / (b * b) }, (_, k) => q.subarray(k * b * b, (k + 1) * b * b));

function shorten(q: Float32Array, most: number): void {
  const length = lengthOf(q);
  if (length > most) for (let i = 0; i < q.length; i++) q[i] *= most / length;
}

/** No less than any block's spectral norm: the eigenvalues of a skew matrix come in pairs. */
const longestOf = (q: Float32Array, b: number): number =>
  Math.max(...blocksOf(q, b).map(lengthOf)) / Math.SQRT2;
