// The kinds of adapter, each one record: by which tensors it is known, and the difference that they make of a weight.
//
//   LoRA (Hu et al. 2021)                      B A
//   LoHa (FedPara, Hyeon-Woo et al. 2022)      (B1 A1) * (B2 A2), element by element
//   LoKr (LyCORIS, Yeh et al. 2023)            C x D, a Kronecker product; C and D are whole or products B A
//   whole difference                           D
//   OFT (Qiu et al. 2023)                      R W - W, R a rotation (oft.ts)
//
// In a convolution's product a Tucker core T may stand between: the sum over p and q of B[o, p] T[p, q, tap] A[q, i]. All is
// computed in float32 and channels last, [o, taps * i], in which the Kronecker product of convolutions is one of matrices.
import type { Device } from '../../engine/device.ts';
import { mul } from '../../engine/ops/binary.ts';
import { matmul } from '../../engine/ops/linear.ts';
import { permute } from '../../engine/ops/move.ts';
import { empty, sizeOf, type Tensor } from '../../engine/tensor.ts';
import type { TensorInfo } from '../../io/tensor_file.ts';
import { toMemoryLayout } from '../checkpoint/weights.ts';

export type Shape = readonly number[];

/** What a file has for one layer, by part: `lora_up`, `hada_w1_a`, `alpha`, ... */
export type Parts = Readonly<Record<string, TensorInfo | undefined>>;

/** A matrix of a kind, whole in one part or the product of two. */
interface Factor {
  whole?: string;
  /** [o, rank] */
  left?: string;
  /** [rank, i, ...kernel]; with a core [rank, i] */
  right?: string;
  /** [rank, rank, ...kernel] */
  core?: string;
  /** With a core, the left one is stored [rank, o]. */
  turned?: true;
}

interface Kind {
  name: string;
  /** A suffix, and the part that it tells; without a name it is what the brackets hold. */
  suffixes: readonly (readonly [suffix: RegExp, part?: string])[];
  factors: readonly Factor[];
  /** A layer has one of the factors, which turns the weight: there is no difference without it. */
  turns?: true;
  /** Shapes of the factors, for a weight. */
  shapes(weight: Shape, parts: Readonly<Record<string, { shape: Shape } | undefined>>): readonly Shape[];
  /** The difference [o, taps * i], in any shape of as many elements, of the factors [o, taps * i] each. */
  join(factors: readonly Tensor[], shapes: readonly Shape[]): Tensor;
}

export const kinds: readonly Kind[] = [
  {
    name: 'LoRA',
    suffixes: [
      [
        /(\.lora_A|\.lora_down|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)(\.default)?(\.weight)?$/,
        'lora_down',
      ],
      [
        /(\.lora_B|\.lora_up|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)(\.default)?(\.weight)?$/,
        'lora_up',
      ],
      [/\.lora_mid\.weight$/, 'lora_mid'],
    ],
    factors: [{ left: 'lora_up', right: 'lora_down', core: 'lora_mid' }],
    shapes: (weight) => [weight],
    join: ([product]) => product,
  },
  {
    name: 'LoHa',
    suffixes: [[/\.(hada_(?:w[12]_[ab]|t[12]))$/]],
    factors: [
      { left: 'hada_w1_a', right: 'hada_w1_b', core: 'hada_t1', turned: true },
      { left: 'hada_w2_a', right: 'hada_w2_b', core: 'hada_t2', turned: true },
    ],
    shapes: (weight) => [weight, weight],
    join: ([first, second]) => mul(first, second),
  },
  {
    name: 'LoKr',
    suffixes: [[/\.(lokr_(?:w[12](?:_[ab])?|t2))$/]],
    factors: [
      { whole: 'lokr_w1', left: 'lokr_w1_a', right: 'lokr_w1_b' },
      { whole: 'lokr_w2', left: 'lokr_w2_a', right: 'lokr_w2_b', core: 'lokr_t2', turned: true },
    ],
    shapes([o, i, ...kernel], { lokr_w1: whole, lokr_w1_a: left, lokr_w1_b: right }) {
      const rows = (whole ?? left)?.shape[0] ?? 1;
      const columns = (whole ?? right)?.shape[1] ?? 1;
      return [
        [rows, columns],
        [o / rows, i / columns, ...kernel],
      ];
    },
    join: ([first, second], [, [, inputs]]) => kronecker(first, second.reshape(-1, inputs)),
  },
  {
    name: 'whole difference',
    suffixes: [[/\.(?:diff|w_norm)$/, 'diff']],
    factors: [{ whole: 'diff' }],
    shapes: (weight) => [weight],
    join: ([whole]) => whole,
  },
  {
    name: 'OFT',
    suffixes: [[/\.(oft_blocks|oft_diag|rescale)$/], [/\.oft_R(?:\.default)?\.weight$/, 'oft_R']],
    factors: [{ whole: 'oft_blocks' }, { whole: 'oft_diag' }, { whole: 'oft_R' }],
    turns: true,
    shapes([o, ...rest], { oft_blocks, oft_diag, oft_R }) {
      if (!oft_R) {
        const [, b] = (oft_blocks ?? oft_diag)?.shape ?? [];
        return [[o / b, b, b]];
      }
      const [blocks, count] = oft_R.shape;
      const most = sizeOf(rest) / sideOf(count);
      return [[blocks === 1 && Number.isInteger(most) ? 1 : most, count]];
    },
    join: ([whole]) => whole,
  },
];

/** Of a skew matrix, by how many numbers are above its diagonal. */
export const sideOf = (count: number): number => (1 + Math.sqrt(1 + 8 * count)) / 2;

/** Parts that any kind may have. The two magnitudes are DoRA's (Liu et al. 2024). */
const common: Kind['suffixes'] = [
  [/(?:\.lora)?\.alpha$/, 'alpha'],
  [/\.dora_scale$/, 'dora_scale'],
  [/\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$/, 'lora_magnitude_vector'],
  [/\.(?:diff_b|b_norm)$/, 'diff_b'],
];

const suffixes = [...kinds.flatMap((kind) => kind.suffixes), ...common];

/** A tensor's name without the suffix of its part, or undefined where it has none that is known. */
export function partOf({ name, shape }: TensorInfo): { module: string; part: string } | undefined {
  for (const [suffix, part] of suffixes) {
    const found = suffix.exec(name);
    // LyCORIS's BOFT goes by the names of its OFT, with an axis more.
    if (found && unsupportedKind(name) && shape.length === 4) return undefined;
    if (found) return { module: name.slice(0, found.index), part: part ?? found[1] };
  }
  return undefined;
}

const others: readonly (readonly [RegExp, string])[] = [
  [/\.boft_[Rs](\.|$)/, 'BOFT'],
  // A rotation of one factor is OFT.
  [/\.oft_(blocks|diag)$/, 'BOFT'],
  [/\.oft_[rs](\.|$)/, 'OFT as peft wrote it up to 0.15'],
  [/\.(on_input$|ia3_l(\.|$))/, 'IA3'],
];

/** The kind of an adapter that is known by name alone. */
export const unsupportedKind = (name: string): string | undefined =>
  others.find(([suffix]) => suffix.test(name))?.[1];

/** The kind of a layer's parts; undefined for a bias alone. */
export const kindOf = (parts: Parts): Kind | undefined => kinds.find((kind) => kindHas(kind, parts));

const kindHas = ({ factors }: Kind, parts: Parts): boolean => factors.some((factor) => has(factor, parts));

const has = (factor: Factor, parts: Parts): boolean => namesOf(factor).some((name) => parts[name]);

/** Those that a layer should have. */
const factorsOf = ({ factors, turns }: Kind, parts: Parts): readonly Factor[] =>
  turns ? factors.filter((factor) => has(factor, parts)) : factors;

const namesOf = ({ whole, left, right, core }: Factor): string[] =>
  [whole, left, right, core].filter((name) => name !== undefined);

/** What people call it. */
export function kindName(parts: Parts): string {
  const { name } = kindOf(parts) ?? { name: 'whole difference' };
  if (!magnitudeOf(parts)) return name;
  return name === 'LoRA' ? 'DoRA' : `${name} with DoRA`;
}

export const magnitudeOf = (parts: Parts): TensorInfo | undefined =>
  parts.dora_scale ?? parts.lora_magnitude_vector;

/**
 * Whose lengths DoRA's magnitudes are: of rows (what makes one output) or columns (what one input goes into), undefined where they
 * fit neither. peft's, [o] or [1, o, 1, 1], are those of rows; LyCORIS's tell by their shape, [o, 1, ...] or [1, i, ...].
 */
export function magnitudeAxis(parts: Parts, [o, i]: Shape): 'rows' | 'columns' | undefined {
  const { dora_scale, lora_magnitude_vector: peft } = parts;
  const { shape } = magnitudeOf(parts) ?? { shape: [] };
  if (sizeOf(shape) === o && (peft || shape[0] === o)) return 'rows';
  return dora_scale && sizeOf(shape) === i ? 'columns' : undefined;
}

/** What keeps a layer's parts from making a difference, in words. */
export function lackOf(parts: Parts): string | undefined {
  const [kind, other] = kinds.filter((each) => kindHas(each, parts));
  if (other) return `${kind.name} and ${other.name} at once`;
  if (!kind) return parts.diff_b && !magnitudeOf(parts) ? undefined : `only ${Object.keys(parts).join(', ')}`;
  const factors = factorsOf(kind, parts);
  if (kind.turns && factors.length > 1) return factors.map(({ whole }) => whole).join(' and ');
  for (const factor of factors) {
    const { whole, left = '', right = '' } = factor;
    const present = namesOf(factor).filter((name) => parts[name]);
    if (whole && parts[whole]) {
      if (present.length > 1) return present.join(' and ');
    } else if (!left) return `no ${whole}`;
    else if (!parts[left] || !parts[right])
      return `no ${[left, right].filter((name) => !parts[name]).join(', ')}${whole ? `, no ${whole}` : ''}`;
  }
  return undefined;
}

/** The rank of the first product; undefined where there is none. */
export function rankOf(parts: Parts): number | undefined {
  const products = (kindOf(parts)?.factors ?? []).flatMap(({ right = '' }) => parts[right] ?? []);
  return products[0]?.shape[0];
}

/** Whether the parts make a difference of a weight of that shape, as a checkpoint spells it. */
export function fits(parts: Parts, weight: Shape): boolean {
  const kind = kindOf(parts);
  const shapes = kind?.shapes(weight, parts);
  if (parts.rescale && sizeOf(parts.rescale.shape) !== weight[0]) return false;
  return !kind || factorsOf(kind, parts).every((factor, i) => factorFits(factor, parts, shapes?.[i] ?? []));
}

function factorFits(factor: Factor, parts: Parts, target: Shape): boolean {
  const [whole, left = [], right = [], core] = (['whole', 'left', 'right', 'core'] as const).map(
    (place) => parts[factor[place] ?? '']?.shape,
  );
  if (whole) return same(whole, target);
  const [o, rank] = core && factor.turned ? [left[1], left[0]] : left;
  const product = core ? [o, right[1], ...core.slice(2)] : [o, ...right.slice(1)];
  const ranks = core ? core[0] === rank && core[1] === right[0] : right[0] === rank;
  return ranks && isLinear(left) && (!core || isLinear(right)) && same(product, target);
}

/** Some trainers write a linear layer as a 1x1 convolution, and some flatten [i, kh, kw]. */
function same(shape: Shape, target: Shape): boolean {
  const matrix = isLinear(shape) ? shape.slice(0, 2) : shape;
  return matrix.join() === target.join() || matrix.join() === [target[0], sizeOf(target.slice(1))].join();
}

const isLinear = (shape: Shape): boolean => shape.slice(2).every((size) => size === 1);

/** Reads a part's numbers. */
export type Read = (part: TensorInfo) => Float32Array;

/** The difference of a weight of that shape, without alpha: float32, [o, taps * i], as it lies in memory. */
export function difference(parts: Parts, weight: Shape, read: Read, device: Device): Tensor {
  const kind = kindOf(parts);
  if (!kind) throw new Error('these parts make no difference of a weight');
  const shapes = kind.shapes(weight, parts);
  const factors = kind.factors.map((factor, i) => factorOf(factor, parts, shapes[i], read, device));
  return kind.join(factors, shapes);
}

function factorOf(factor: Factor, parts: Parts, target: Shape, read: Read, device: Device): Tensor {
  const [o, i = 1, ...kernel] = target;
  const taps = sizeOf(kernel);
  /** [rows, i, taps] of a file as [rows, taps * i]. */
  const load = (part: TensorInfo | undefined, rows: number, inputs: number, taps: number): Tensor => {
    const bytes = new Uint8Array(read(part as TensorInfo).buffer);
    return empty([rows, taps * inputs], { device }).upload(toMemoryLayout(bytes, [rows, inputs, taps, 1], 4));
  };
  const [whole, left, right, core] = (['whole', 'left', 'right', 'core'] as const).map(
    (place) => parts[factor[place] ?? ''],
  );
  if (whole) return load(whole, o, i, taps);
  const rank = right?.shape[0] ?? 0;
  if (!core) return matmul(load(left, o, rank, 1), load(right, rank, i, taps));
  const [p] = core.shape;
  const inner = matmul(load(core, p, rank, taps).reshape(p * taps, rank), load(right, rank, i, 1));
  const outer = factor.turned ? load(left, p, o, 1) : load(left, o, p, 1);
  return matmul(outer, inner.reshape(p, taps * i), { transA: factor.turned });
}

/** [a, b] and [c, d] make [a, c, b, d]: an outer product, of which training keeps nothing but the two. */
function kronecker(first: Tensor, second: Tensor): Tensor {
  const outer = matmul(first.reshape(-1, 1), second.reshape(1, -1));
  return permute(outer.reshape(...first.shape, ...second.shape), [0, 2, 1, 3]);
}
