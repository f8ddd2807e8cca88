// The six storage types and how they sit in bytes: float32, bfloat16, float16, int32, int64, uint8. Half types have no
// typed array on Node 20, so both are carried as Uint16Array bit patterns and converted here, rounding to nearest even.

export type DType = 'float32' | 'bfloat16' | 'float16' | 'int32' | 'int64' | 'uint8';
export type FloatDType = 'float32' | 'bfloat16' | 'float16';

export const bytesPerElement: Record<DType, number> = {
  float32: 4,
  bfloat16: 2,
  float16: 2,
  int32: 4,
  int64: 8,
  uint8: 1,
};

export const isFloat = (dtype: DType): dtype is FloatDType =>
  dtype === 'float32' || dtype === 'bfloat16' || dtype === 'float16';

const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);

/** float32 → bfloat16 bits, nearest even; NaN stays a quiet NaN. */
export function toBfloat16(value: number): number {
  f32[0] = value;
  return roundedToBfloat16(u32[0]);
}

function roundedToBfloat16(bits: number): number {
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40;
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

export function fromBfloat16(bits: number): number {
  u32[0] = bits << 16;
  return f32[0];
}

/** float32 → float16 bits, nearest even, with subnormals; overflow becomes infinity. */
export function toFloat16(value: number): number {
  f32[0] = value;
  const bits = u32[0];
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude >= 0x38800000)
    return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  if (magnitude <= 0x33000000) return sign;
  // Subnormal half: the significand shifted right by up to 24 places, rounded on what falls off.
  const exponent = magnitude >>> 23;
  const significand = (magnitude & 0x7fffff) | 0x800000;
  const shift = 126 - exponent;
  const kept = significand >>> shift;
  const rest = significand & ((1 << shift) - 1);
  const half = 1 << (shift - 1);
  return sign | (kept + (rest > half || (rest === half && kept & 1) ? 1 : 0));
}

export function fromFloat16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const significand = bits & 0x3ff;
  if (exponent === 0) return sign * significand * 2 ** -24;
  if (exponent === 31) return significand ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + significand / 1024) * 2 ** (exponent - 15);
}

let halves: Float32Array | undefined;
/** Every float16 by its bits: to take it apart costs ten times a look. */
export const allFloat16 = (): Float32Array =>
  (halves ??= Float32Array.from({ length: 2 ** 16 }, (_, bits) => fromFloat16(bits)));

/** The elements of raw little-endian `bytes` as float32 numbers (int64 beyond 2^24 loses precision). */
export function decodeFloats(bytes: Uint8Array, dtype: DType): Float32Array {
  const count = bytes.byteLength / bytesPerElement[dtype];
  const raw = typedView(bytes, dtype);
  if (raw instanceof Float32Array) return raw.slice();
  const out = new Float32Array(count);
  if (dtype === 'bfloat16') {
    const target = new Uint32Array(out.buffer);
    for (let i = 0; i < count; i++) target[i] = (raw[i] as number) << 16;
  } else if (dtype === 'float16') {
    const all = allFloat16();
    for (let i = 0; i < count; i++) out[i] = all[raw[i] as number];
  } else {
    for (let i = 0; i < count; i++) out[i] = Number(raw[i]);
  }
  return out;
}

/** Numbers as raw bytes of `dtype`, rounding to nearest even for the half types. */
export function encodeNumbers(values: ArrayLike<number>, dtype: DType): Uint8Array {
  const bytes = new Uint8Array(values.length * bytesPerElement[dtype]);
  const out = typedView(bytes, dtype);
  if (out instanceof BigInt64Array) for (let i = 0; i < values.length; i++) out[i] = BigInt(values[i]);
  else if (out instanceof Float32Array || out instanceof Int32Array) out.set(values);
  else if (dtype === 'bfloat16') {
    const singles = values instanceof Float32Array ? values : Float32Array.from(values);
    const bits = new Uint32Array(singles.buffer, singles.byteOffset, singles.length);
    for (let i = 0; i < bits.length; i++) out[i] = roundedToBfloat16(bits[i]);
  } else if (dtype === 'float16') for (let i = 0; i < values.length; i++) out[i] = toFloat16(values[i]);
  else for (let i = 0; i < values.length; i++) out[i] = values[i];
  return bytes;
}

export type TypedView = Float32Array | Uint16Array | Int32Array | BigInt64Array | Uint8Array;

/** `bytes` seen as elements of `dtype` without a copy (half types as Uint16Array bits); copies only if misaligned. */
export function typedView(bytes: Uint8Array, dtype: DType): TypedView {
  const size = bytesPerElement[dtype];
  const aligned = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
  const count = bytes.byteLength / size;
  if (dtype === 'float32') return new Float32Array(aligned.buffer, aligned.byteOffset, count);
  if (dtype === 'int32') return new Int32Array(aligned.buffer, aligned.byteOffset, count);
  if (dtype === 'int64') return new BigInt64Array(aligned.buffer, aligned.byteOffset, count);
  if (dtype === 'uint8') return aligned;
  return new Uint16Array(aligned.buffer, aligned.byteOffset, count);
}
