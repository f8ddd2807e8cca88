// The random number kernels as records, so that they are proved as ops are: the engine itself draws on the host, with the same
// generator. Each sample is a key of train/draws.ts and how many numbers are drawn.
import type { OpRecord } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { draws, streamOf } from '../train/draws.ts';

interface DrawAttrs {
  readonly count: number;
  readonly key: Parameters<typeof draws>;
  readonly dtype: FloatDType;
}

type Draw = (count: number, from: ReturnType<typeof draws>, dtype: FloatDType) => ArrayLike<number>;

function drawRecord(name: string, draw: Draw): [string, OpRecord<DrawAttrs>] {
  const record: OpRecord<DrawAttrs> = {
    name,
    storage: 'y',
    outputs: (_, { count, dtype }) => ({ y: { shape: [count], dtype } }),
    saves: [],
    forward({ y }, { count, key }, launch) {
      const { seedLow, seedHigh, stream } = streamOf(...key);
      launch(`${name}_forward`, [y, count, seedLow, seedHigh, stream, 0]);
    },
    reference: {
      forward({ y }, { count, key, dtype }) {
        y.data.set(draw(count, draws(...key), dtype));
      },
    },
    samples: [1, 30, 257, 4099].map((count, i) => ({
      inputs: {},
      attrs: { count, key: [2 ** 40 + i, i, 7, 'noise'], dtype: 'float32' },
    })),
  };
  return [name, record];
}

/** Bits of a uniform number: as many as the type holds, so that rounding never reaches 1. */
const bits: Record<FloatDType, number> = { float32: 24, bfloat16: 8, float16: 11 };

export const drawRecords = new Map([
  drawRecord('normal', (count, from) => from.normals(count)),
  drawRecord('uniform', (count, from, dtype) =>
    Float32Array.from({ length: count }, () => {
      const steps = 2 ** bits[dtype];
      return Math.floor(from.uniform() * steps) / steps;
    }),
  ),
]);
