// Weights in 8-bit integers, as Q8_0 of ggml: 32 neighbours share a scale, their largest magnitude over 127, and each is a byte, the
// rounded quotient plus 128. (Where one is NaN, the scale is.) Products take none of it: a weight is decoded before each. The scale
// has the type of the numbers (ggml's is float16), so that what is decoded knows its type.
import { apply, defineOp, type Numbers } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';
import { rint } from './math.ts';
import { awkwardShapes } from './samples.ts';

/** Numbers that share a scale. */
export const Q8_BLOCK = 32;
const LARGEST = 127;
/** What a byte holds beyond its number. */
const OFFSET = 128;

const scaleOp = defineOp<Record<string, never>>({
  name: 'q8_scale',
  outputs({ x }) {
    if (x.size % Q8_BLOCK)
      throw new ShapeError(`q8_scale: [${x.shape}] is not made of whole blocks of ${Q8_BLOCK}`);
    return { y: { shape: [x.size / Q8_BLOCK], dtype: x.dtype } };
  },
  saves: [],
  forward: (t, _, launch) => launch('q8_scale_forward', [t.y, t.x, t.x.size]),
  reference: {
    forward({ y, x }) {
      for (let block = 0; block < y.data.length; block++) {
        let most = 0;
        for (let i = 0; i < Q8_BLOCK; i++) most = Math.max(most, Math.abs(x.data[block * Q8_BLOCK + i]));
        y.data[block] = Math.fround(most) / LARGEST;
      }
    },
  },
  samples: sizes().map((x) => ({ inputs: { x }, attrs: {} })),
});

const toOp = defineOp<Record<string, never>>({
  name: 'to_q8',
  outputs(t) {
    checkBlocks('to_q8', t);
    return { y: { shape: t.x.shape, dtype: 'uint8' } };
  },
  saves: [],
  forward: (t, _, launch) => launch('to_q8_forward', [t.y, t.x, t.scale, t.x.size]),
  reference: {
    forward({ y, x, scale }) {
      for (let i = 0; i < x.data.length; i++) {
        const factor = inverse(scale.data, i);
        const number = rint(Math.fround(x.data[i] * factor));
        y.data[i] = (number > -LARGEST ? Math.min(LARGEST, number) : -LARGEST) + OFFSET;
      }
    },
  },
  samples: sizes().map((x) => ({
    inputs: { x, scale: blocksOf(x) },
    attrs: {},
    nonnegative: ['scale'],
  })),
});

const fromOp = defineOp<Record<string, never>>({
  name: 'from_q8',
  outputs(t) {
    checkBlocks('from_q8', t);
    return { y: { shape: t.x.shape, dtype: t.scale.dtype } };
  },
  saves: [],
  storage: 'scale',
  forward: (t, _, launch) => launch('from_q8_forward', [t.y, t.x, t.scale, t.x.size]),
  reference: {
    forward({ y, x, scale }) {
      for (let i = 0; i < x.data.length; i++)
        y.data[i] = (x.data[i] - OFFSET) * scale.data[Math.floor(i / Q8_BLOCK)];
    },
  },
  samples: sizes().map((x) => ({
    inputs: { x, scale: blocksOf(x) },
    attrs: {},
    ints: { x: 256 },
    dtypes: { x: 'uint8' },
    nonnegative: ['scale'],
  })),
});

/** One over element i's scale; a block of zeros has none. */
function inverse(scale: Numbers, i: number): number {
  const own = scale[Math.floor(i / Q8_BLOCK)];
  return own > 0 ? Math.fround(1 / own) : 0;
}

function checkBlocks(op: string, { x, scale }: Record<string, Tensor>): void {
  if (scale.size * Q8_BLOCK !== x.size)
    throw new ShapeError(`${op}: ${scale.size} scales for [${x.shape}], of which ${Q8_BLOCK} share one`);
}

function blocksOf(shape: readonly number[]): number[] {
  return [shape.reduce((a, b) => a * b, 1) / Q8_BLOCK];
}

function sizes(): number[][] {
  return [...awkwardShapes.map(([rows, blocks]) => [rows, Q8_BLOCK * Math.ceil(blocks / 16)]), [5, 3, 3, 32]];
}

/** A weight as bytes in its own shape, and a scale for each block of 32. */
export interface Q8Weight {
  readonly bytes: Tensor;
  readonly scale: Tensor;
}

/** @throws ShapeError where the weight is not made of whole blocks */
export function toQ8(weight: Tensor): Q8Weight {
  const scale = apply(scaleOp, { x: weight }, {});
  return { bytes: apply(toOp, { x: weight, scale }, {}), scale };
}

/** The weight again, in the type that it had. */
export const fromQ8 = ({ bytes, scale }: Q8Weight): Tensor => apply(fromOp, { x: bytes, scale }, {});
