// How the result of a micro-kernel on the device must agree with the virtual GPU's: to the bit where the PTX ISA says what an
// instruction gives, within a stated bound where it leaves room (approximations, sums of matrix instructions).

export interface Agreement {
  /** The largest difference, in the unit of the bound; 0 where all is equal. */
  error: number;
  /** What is wrong, with the worst element; absent where nothing is. */
  problem?: string;
}

export type Agree = (got: Uint8Array, want: Uint8Array) => Agreement;

type Element = 'u8' | 'u16' | 'u32' | 'u64' | 'f16' | 'bf16' | 'f32' | 'f64';
const bytesOf: Record<Element, number> = { u8: 1, u16: 2, u32: 4, u64: 8, f16: 2, bf16: 2, f32: 4, f64: 8 };
/** Exponent bits, all set in a NaN or an infinity, and fraction bits. */
const formats: Partial<Record<Element, readonly [exponent: bigint, fraction: bigint]>> = {
  f16: [0x7c00n, 0x3ffn],
  bf16: [0x7f80n, 0x7fn],
  f32: [0x7f800000n, 0x7fffffn],
  f64: [0x7ff0000000000000n, 0xfffffffffffffn],
};

function elements(bytes: Uint8Array, type: Element): bigint[] {
  const size = bytesOf[type];
  return Array.from({ length: Math.floor(bytes.length / size) }, (_, i) => {
    let bits = 0n;
    for (let b = size - 1; b >= 0; b--) bits = (bits << 8n) | BigInt(bytes[i * size + b]);
    return bits;
  });
}

const isNaNBits = (bits: bigint, type: Element): boolean => {
  const format = formats[type];
  return format !== undefined && (bits & format[0]) === format[0] && (bits & format[1]) !== 0n;
};

/** The place of a float among all floats of its type, so that neighbours are one apart; both zeros are 0. */
const place = (bits: bigint, type: Element): bigint => {
  const sign = 1n << BigInt(bytesOf[type] * 8 - 1);
  return bits & sign ? -(bits & (sign - 1n)) : bits;
};

/** Holds element by element; `error` is 0 for equal ones and judged against `bound` of the element. */
function each(
  type: Element,
  error: (got: bigint, want: bigint) => number,
  bound: (index: number) => number,
): Agree {
  return (got, want) => {
    const [ours, theirs] = [elements(got, type), elements(want, type)];
    if (ours.length !== theirs.length)
      return {
        error: Number.MAX_VALUE,
        problem: `${ours.length} elements, ${theirs.length} on the virtual GPU`,
      };
    let worst = { error: 0, excess: 0, at: -1 };
    let bad = 0;
    ours.forEach((value, i) => {
      const found = isNaNBits(value, type) && isNaNBits(theirs[i], type) ? 0 : error(value, theirs[i]);
      const excess = found - bound(i);
      if (excess > 0) bad++;
      if (found > worst.error || excess > worst.excess) worst = { error: found, excess, at: i };
    });
    if (!bad) return { error: worst.error };
    const shown = (values: bigint[]) => `0x${values[worst.at].toString(16)}`;
    const problem = `${bad} of ${ours.length} elements differ; the worst, ${worst.at}, is ${shown(ours)}, on the virtual GPU ${shown(theirs)}`;
    return { error: worst.error, problem };
  };
}

/** Equal bits; of floats, any NaN equals any other. */
export const sameBits = (type: Element): Agree =>
  each(
    type,
    (got, want) => (got === want ? 0 : 1),
    () => 0,
  );

/** At most `count` floats apart. */
export const ulps = (type: Element, count: number): Agree =>
  each(
    type,
    (got, want) => {
      const apart = place(got, type) - place(want, type);
      return Number(apart < 0n ? -apart : apart);
    },
    () => count,
  );

const float = (bits: bigint): number => new Float32Array(Uint32Array.of(Number(bits)).buffer)[0];

/** float32 sums within a bound of each element; a NaN is within none. */
export const within = (bounds: readonly number[]): Agree =>
  each(
    'f32',
    (got, want) => {
      const apart = Math.abs(float(got) - float(want));
      return Number.isNaN(apart) ? Number.MAX_VALUE : apart;
    },
    (i) => bounds[i],
  );
