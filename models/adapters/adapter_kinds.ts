// Adapters that can be trained, by LyCORIS's word `algo`: the matrices that each gives a layer, how they begin, and the difference
// that they make of its weight. What kinds are made of is told in lora_kinds.ts; shapes and beginnings are peft's for LoRA (Kaiming
// uniform, zeros) and LyCORIS's for LoHa, LoKr and OFT (lycoris/modules/loha.py, lokr.py and diag_oft.py), where peft's begin with
// other numbers, or turn other axes. Matrices lie as LyCORIS saves them, so a convolution's right one is flat, [rank, i * taps], and
// is turned channels last when used.
import { type Parameter, parameter } from '../../engine/module.ts';
import { sub } from '../../engine/ops/binary.ts';
import { matmul } from '../../engine/ops/linear.ts';
import { permute } from '../../engine/ops/move.ts';
import { cast, scale, scaled } from '../../engine/ops/unary.ts';
import { sizeOf, type Tensor } from '../../engine/tensor.ts';
import { cayley } from './cayley.ts';
import { kinds, type Shape } from './lora_kinds.ts';
import { stretched, turnedOutputs } from './oft.ts';

export const algos = ['lora', 'loha', 'lokr', 'oft'] as const;
export type Algo = (typeof algos)[number];

/** Ranks and alphas as kohya and LyCORIS divide them. */
export interface LoraSizes {
  /** Of linear layers and 1x1 convolutions; of OFT the side of its blocks, as near as divisors of the outputs come. */
  rank: number;
  alpha: number;
  /** Of convolutions with a larger kernel; 0 for those above. */
  conv_rank?: number;
  conv_alpha?: number;
}

export interface AdapterConfig extends LoraSizes {
  algo?: Algo;
  /** LoKr: into what a side is divided, as near as its divisors come; -1 for two numbers near each other. */
  factor?: number;
  /** LoKr: make the smaller matrix a product too. */
  decompose_both?: boolean;
  /** LoRA: give the weight's rows lengths that are trained beside their directions (DoRA). */
  use_dora?: boolean;
  /** OFT: stretch the weight's rows, too, by factors that are trained. */
  rescaled?: boolean;
}

/** What of a layer's adapter is trained. */
export interface Part {
  /** As lora_kinds.ts names it. */
  part: string;
  /** Behind the layer's path. */
  key: string;
  parameter: Parameter;
}

/** A matrix of a layer's adapter. */
export interface Matrix extends Part {
  /**
   * Zeros, uniform numbers within 1 / sqrt(inputs), or normals of a standard deviation; or ones, of factors, which are in float32 so that
   * each step tells.
   */
  start: 'zeros' | 'ones' | 'uniform' | number;
}

/** What an adapter has for a layer. */
export interface Matrices {
  matrices: readonly Matrix[];
  /** Of a DoRA: the lengths of the rows of weight and difference together, as which they begin. In float32, so that each step tells. */
  magnitude?: Part;
  rank: number;
  alpha: number;
  /** alpha / rank times the difference [o, taps * i] that such tensors make of the weight, each in its matrix's place. */
  difference(tensors: readonly Tensor[], weight: Parameter): Tensor;
  /** What a bound on norms is of: the difference, but of OFT the blocks, as in LyCORIS. */
  bounded(tensors: readonly Tensor[]): Tensor;
}

/** Whether a weight of that shape is a convolution's that `conv_rank` is of. */
export const isLarge = ([, , kh = 1, kw = 1]: Shape): boolean => kh * kw > 1;

/** The rank and alpha of a layer whose weight has that shape. */
export function sizesFor(shape: Shape, sizes: LoraSizes): { rank: number; alpha: number } {
  const { rank, alpha, conv_rank, conv_alpha } = sizes;
  return isLarge(shape) ? { rank: conv_rank || rank, alpha: conv_alpha || alpha } : { rank, alpha };
}

/** What an adapter has for a layer whose weight has that shape. */
export function matricesFor(weight: Shape, config: AdapterConfig): Matrices {
  const { algo = 'lora' } = config;
  const { rank, alpha } = sizesFor(weight, config);
  const matrices = makers[algo](weight, rank, config);
  // LyCORIS keeps an OFT's constraint as its alpha: none.
  if (algo === 'oft') return { matrices, rank, alpha: 0, difference: turned, bounded: ([blocks]) => blocks };
  // LyCORIS takes a LoKr of two whole factors as it is, whatever its alpha.
  const own = { rank, alpha: isWhole(matrices) ? rank : alpha };
  const magnitude = config.use_dora ? magnitudeFor(weight) : undefined;
  const difference = differenceOf(algo, matrices, weight, own.alpha / rank);
  return { matrices, magnitude, ...own, difference, bounded: difference };
}

/** All that is trained of it. */
export const partsOf = ({ matrices, magnitude }: Pick<Matrices, 'matrices' | 'magnitude'>): Part[] =>
  magnitude ? [...matrices, magnitude] : [...matrices];

/** In peft's shapes. */
function magnitudeFor([o, , ...kernel]: Shape): Part {
  const name = 'lora_magnitude_vector';
  const shape = kernel.length ? [1, o, ...kernel.map(() => 1)] : [o];
  return { part: name, key: name, parameter: parameter(shape) };
}

const isWhole = (matrices: readonly Matrix[]): boolean =>
  matrices.every(({ part }) => part === 'lokr_w1' || part === 'lokr_w2');

const makers: Record<Algo, (weight: Shape, rank: number, config: AdapterConfig) => Matrix[]> = {
  lora: loraMatrices,
  loha: lohaMatrices,
  lokr: lokrMatrices,
  oft: oftMatrices,
};

/** A's convolution has the base's kernel; B's is 1x1. */
function loraMatrices([o, ...rest]: Shape, rank: number): Matrix[] {
  const [down, up] =
    rest.length > 1
      ? [parameter([rank, ...rest], 'conv'), parameter([o, rank, 1, 1], 'conv')]
      : [parameter([rank, ...rest]), parameter([o, rank])];
  return [
    { part: 'lora_down', key: 'lora_A.weight', parameter: down, start: 'uniform' },
    { part: 'lora_up', key: 'lora_B.weight', parameter: up, start: 'zeros' },
  ];
}

const flat = (part: string, shape: Shape, start: Matrix['start']): Matrix => ({
  part,
  key: part,
  parameter: parameter(shape),
  start,
});

function lohaMatrices([o, ...rest]: Shape, rank: number): Matrix[] {
  const inputs = sizeOf(rest);
  return [
    flat('hada_w1_a', [o, rank], 0.1),
    flat('hada_w1_b', [rank, inputs], 1),
    flat('hada_w2_a', [o, rank], 'zeros'),
    flat('hada_w2_b', [rank, inputs], 1),
  ];
}

/** A factor whose product would be no smaller is whole. */
function lokrMatrices([o, i, ...kernel]: Shape, rank: number, config: AdapterConfig): Matrix[] {
  const { factor = -1, decompose_both = false } = config;
  const [[a, c], [b, d]] = [factorization(o, factor), factorization(i, factor)];
  const first =
    decompose_both && rank < Math.max(a, b) / 2
      ? [flat('lokr_w1_a', [a, rank], 'uniform'), flat('lokr_w1_b', [rank, b], 'uniform')]
      : [flat('lokr_w1', [a, b], 'uniform')];
  if (rank < Math.max(c, d) / 2)
    return [
      ...first,
      flat('lokr_w2_a', [c, rank], 'uniform'),
      flat('lokr_w2_b', [rank, d * sizeOf(kernel)], 'zeros'),
    ];
  const whole = parameter([c, d, ...kernel], kernel.length ? 'conv' : 'plain');
  return [...first, { part: 'lokr_w2', key: 'lokr_w2', parameter: whole, start: 'zeros' }];
}

/** LyCORIS's division of a side into two numbers, the smaller first: `factor` where it divides, else the divisors that come nearest. */
export function factorization(side: number, factor: number): [number, number] {
  if (factor > 0 && side % factor === 0) {
    const other = side / factor;
    return factor > other ? [other, factor] : [factor, other];
  }
  const most = factor < 0 ? side : factor;
  let [m, n] = [1, side];
  while (m < n) {
    let next = m + 1;
    while (side % next !== 0) next++;
    if (next + side / next > 1 + side || next > most) break;
    [m, n] = [next, side / next];
  }
  return m > n ? [n, m] : [m, n];
}

/** As LyCORIS divides outputs, blocks are no larger than there are of them. */
function oftMatrices([o, ...rest]: Shape, rank: number, { rescaled }: AdapterConfig): Matrix[] {
  const [b, blocks] = factorization(o, rank);
  const made = [flat('oft_blocks', [blocks, b, b], 'zeros')];
  return rescaled ? [...made, flat('rescale', [o, ...rest.map(() => 1)], 'ones')] : made;
}

/** What OFT makes of a weight, less the weight itself. */
function turned([given, rescale]: readonly Tensor[], { tensor }: Parameter): Tensor {
  const weight = tensor.reshape(tensor.shape[0], -1);
  // A product of its own, as it is read twice: the gradient of what is trained then comes whole.
  const blocks = scale(cast(given, 'float32'), 1);
  const rotation = cayley(sub(blocks, permute(blocks, [0, 2, 1])));
  const delta = turnedOutputs(weight, cast(rotation, weight.dtype));
  return rescale ? stretched(delta, weight, rescale) : delta;
}

const kindNames: Record<Exclude<Algo, 'oft'>, string> = { lora: 'LoRA', loha: 'LoHa', lokr: 'LoKr' };

/** alpha / rank goes to a small matrix: the first of all. */
function differenceOf(
  algo: Exclude<Algo, 'oft'>,
  matrices: readonly Matrix[],
  weight: Shape,
  factor: number,
) {
  const kind = kinds.find(({ name }) => name === kindNames[algo]) as (typeof kinds)[number];
  const places = new Map(matrices.map(({ part }, k) => [part, k]));
  const shapeOf = Object.fromEntries(matrices.map(({ part, parameter: { shape } }) => [part, { shape }]));
  const shapes = kind.shapes(weight, shapeOf);
  return (tensors: readonly Tensor[]): Tensor => {
    const matrix = (part = ''): [Tensor, Parameter] | undefined => {
      const k = places.get(part);
      return k === undefined ? undefined : [tensors[k], matrices[k].parameter];
    };
    const factors = kind.factors.map(({ whole, left, right }, k) => {
      const [first] = (matrix(whole) ?? matrix(left)) as [Tensor, Parameter];
      const small = k === 0 ? scaled(first, factor) : first;
      const rows = small.reshape(small.shape[0], -1);
      const other = matrix(right);
      return other ? matmul(rows, inMemoryOrder(...other, shapes[k])) : rows;
    });
    return kind.join(factors, shapes);
  };
}

/** A product's right matrix as [rank, taps * i]. */
function inMemoryOrder(tensor: Tensor, { layout }: Parameter, [, inputs, ...kernel]: Shape): Tensor {
  const rank = tensor.shape[0];
  const taps = sizeOf(kernel);
  if (layout === 'conv' || taps === 1) return tensor.reshape(rank, -1);
  return permute(tensor.reshape(rank, inputs, taps), [0, 2, 1]).reshape(rank, -1);
}
