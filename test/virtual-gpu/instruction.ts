// Operands for single instructions, and the kernel that runs one: what the tests of the virtual GPU and the program that
// compares it with a real GPU share. Operands are the awkward ones of each type and as many random ones.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { float16 } from './exact.ts';
import { type Bench, newBench } from './run_kernel.ts';

/** One value a thread, as bits; 64-bit types and narrower ones alike. */
export type Bits = bigint[];

const sizes: Record<string, number> = { 16: 2, 32: 4, 64: 8 };
const sizeOf = (type: string) => sizes[type.slice(-2)];

function packed(values: Bits, bytes: number): Uint8Array {
  const out = new Uint8Array(values.length * bytes);
  const view = new DataView(out.buffer);
  values.forEach((v, i) => {
    for (let b = 0; b < bytes; b++) view.setUint8(i * bytes + b, Number((v >> BigInt(8 * b)) & 255n));
  });
  return out;
}

function unpacked(bytes: Uint8Array, size: number): Bits {
  return Array.from({ length: bytes.length / size }, (_, i) => {
    let v = 0n;
    for (let b = size - 1; b >= 0; b--) v = (v << 8n) | BigInt(bytes[i * size + b]);
    return v;
  });
}

/**
 * A kernel that runs `body` once a thread: inputs are in %a, %b, %c (registers of `types`), the result is what it leaves in
 * %d (of type `out`). Its parameters are the output and the inputs. Memory is read and written as bits.
 */
export function instructionPtx(body: string, out: string, types: readonly string[]): string {
  const names = ['a', 'b', 'c'].slice(0, types.length);
  const access = (type: string) => `b${sizeOf(type) * 8}`;
  const register = (type: string) => (type.startsWith('f') ? type : access(type));
  return `.version 7.0
.target sm_80
.address_size 64
.visible .entry op(.param .u64 out${names.map((n) => `, .param .u64 in_${n}`).join('')})
{
.reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %i, %n, %t, %r<8>; .reg .f32 %f<8>; .reg .b64 %at, %o, %w<8>;
.reg .${register(out)} %d;
${names.map((n, k) => `.reg .${register(types[k])} %${n};`).join('\n')}
mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mov.u32 %t, %tid.x; mad.lo.s32 %i, %i, %n, %t;
${names
  .map(
    (n, k) => `mul.wide.u32 %o, %i, ${sizeOf(types[k])};
ld.param.u64 %at, [in_${n}]; add.s64 %at, %at, %o; ld.global.${register(types[k])} %${n}, [%at];`,
  )
  .join('\n')}
${body}
mul.wide.u32 %o, %i, ${sizeOf(out)};
ld.param.u64 %at, [out]; add.s64 %at, %at, %o; st.global.${register(out)} [%at], %d;
ret;
}`;
}

/** Runs such a kernel, a warp's worth of threads to a block. */
export function runInstruction(
  bench: Bench<GpuApi>,
  body: string,
  out: string,
  types: readonly string[],
  inputs: readonly Bits[],
): Uint8Array {
  const count = inputs[0].length;
  const to = bench.room(count * sizeOf(out));
  const from = inputs.map((values, k) => bench.give(packed(values, sizeOf(types[k]))));
  bench.launch(instructionPtx(body, out, types), 'op', Math.ceil(count / 32), 32, [to, ...from]);
  return bench.bytes(to, count * sizeOf(out));
}

/** One value a thread of what `body` leaves in %d, on a virtual GPU of its own. */
export const run = (body: string, out: string, types: readonly string[], inputs: readonly Bits[]): Bits =>
  unpacked(runInstruction(newBench(), body, out, types, inputs), sizeOf(out));

/** Pads to whole warps with the first value. */
export const whole = (values: Bits): Bits => [
  ...values,
  ...Array((32 - (values.length % 32)) % 32).fill(values[0]),
];

let state = 99;
export const random = (bits: number): bigint => {
  let v = 0n;
  for (let b = 0; b < bits; b += 16) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    v = (v << 16n) | BigInt((state >>> 12) & 0xffff);
  }
  return BigInt.asUintN(bits, v);
};

/** Every pair of awkward values and as many random ones. */
export function integerPairs(bits: number): [Bits, Bits] {
  const top = 1n << BigInt(bits - 1);
  const edges = [0n, 1n, 2n, 3n, 31n, 32n, 33n, top - 1n, top, top + 1n, 2n * top - 1n, 2n * top - 2n];
  const x: Bits = [];
  const y: Bits = [];
  for (const p of edges) for (const q of edges) x.push(p) && y.push(q);
  while (x.length % 32 || x.length < 256) {
    x.push(random(bits));
    y.push(random(bits) >> (random(16) % BigInt(bits)));
  }
  return [x, y];
}

export const f32 = (x: number): bigint => BigInt(new Uint32Array(Float32Array.of(x).buffer)[0]);
export const fromF32 = (b: bigint): number => new Float32Array(Uint32Array.of(Number(b)).buffer)[0];

const floatEdges = [
  ...[
    0,
    -0,
    1,
    -1,
    1.5,
    2 ** -149,
    -(2 ** -149),
    2 ** -126,
    2 ** 24 + 2,
    65504,
    65520,
    3.4028234663852886e38,
  ],
  ...[Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NaN, 1 / 3, -1e-40, 16777215],
].map(Math.fround);

/** Awkward triples: edges, random ones near each other, and sums that fall on a tie of float32. */
export function floatTriples(): [number[], number[], number[]] {
  const triples: number[][] = [];
  for (const p of floatEdges)
    for (const q of floatEdges) triples.push([p, q, floatEdges[triples.length % 18]]);
  for (let i = 0; i < 400; i++) {
    const scale = () => fromF32((random(32) & 0x807fffffn) | (BigInt(110 + (i % 36)) << 23n));
    triples.push([scale(), scale(), scale()]);
    const c = scale();
    const ulp = 2 ** (Number((f32(c) >> 23n) & 255n) - 150);
    const near = 1 + (i & 1 ? 1 : -1) * 2 ** -(15 + (i % 8));
    triples.push([near, Math.fround(((2 - near) * ulp * (i & 2 ? 1 : -1)) / 2), c]);
  }
  while (triples.length % 32) triples.push([1, 1, 1]);
  return [0, 1, 2].map((k) => triples.map((v) => Math.fround(v[k]))) as [number[], number[], number[]];
}

/** Bits of a 16-bit float from a number that it can hold. */
export function halfBits(x: number, format: typeof float16): bigint {
  if (Number.isNaN(x)) return 0x7fffn;
  const fractionBits = BigInt(format.precision - 1);
  const sign = x < 0 || Object.is(x, -0) ? 0x8000n : 0n;
  const size = Math.abs(x);
  const infinity = format === float16 ? 0x7c00n : 0x7f80n;
  if (size === Number.POSITIVE_INFINITY) return sign | infinity;
  const normal = 2 ** (format.least + format.precision - 1);
  if (size < normal) return sign | BigInt(size / 2 ** format.least);
  const e = Math.floor(Math.log2(size));
  const exponent = size >= 2 ** (e + 1) ? e + 1 : size < 2 ** e ? e - 1 : e;
  const bias = format === float16 ? 15 : 127;
  const fraction = BigInt((size / 2 ** exponent - 1) * 2 ** (format.precision - 1));
  return sign | (BigInt(exponent + bias) << fractionBits) | fraction;
}
