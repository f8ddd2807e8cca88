// One mma.sync as a kernel: matrices to fragments as the PTX ISA tabulates them, the product of 2 + a b, and back.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { bfloat16, float16 } from './exact.ts';
import { f32, halfBits } from './instruction.ts';
import type { Bench } from './run_kernel.ts';

export type MmaType = 'bf16' | 'f16' | 'tf32';

export interface Mma {
  readonly k: number;
  readonly type: MmaType;
  readonly accumulator: 'f32' | 'f16';
  /** [16, k] and [k, 8], numbers that the type can hold. */
  readonly a: readonly number[];
  readonly b: readonly number[];
}

/** Words of a lane's fragment of a, and of b. */
const fragmentWords = (k: number, type: MmaType): [number, number] =>
  type === 'tf32' ? [k / 2, k / 4] : [k / 4, k / 8];

export function mmaPtx({ k, type, accumulator }: Pick<Mma, 'k' | 'type' | 'accumulator'>): string {
  const [nA, nB] = fragmentWords(k, type);
  const list = (letter: string, n: number) => Array.from({ length: n }, (_, j) => `%${letter}${j}`);
  const nD = accumulator === 'f32' ? 4 : 2;
  const register = accumulator === 'f32' ? 'f32' : 'b32';
  const load = (letter: string, n: number, from: string) =>
    `mul.wide.u32 %o, %l, ${n * 4}; ld.param.u64 %w, [${from}]; add.s64 %w, %w, %o;
${list(letter, n)
  .map((r, j) => `ld.global.b32 ${r}, [%w+${4 * j}];`)
  .join('\n')}`;
  return `.version 7.0\n.target sm_80\n.address_size 64
.visible .entry op(.param .u64 d, .param .u64 a, .param .u64 b)
{ .reg .b32 %l, %a<8>, %b<8>; .reg .${register} %d<4>; .reg .b64 %w, %o; mov.u32 %l, %laneid;
${load('a', nA, 'a')}
${load('b', nB, 'b')}
${list('d', nD)
  .map((r) => `mov.${register} ${r}, ${register === 'f32' ? '0f40000000' : '0x40004000'};`)
  .join('\n')}
mma.sync.aligned.m16n8k${k}.row.col.${accumulator}.${type}.${type}.${accumulator} {${list('d', nD)}}, {${list('a', nA)}}, {${list('b', nB)}}, {${list('d', nD)}};
mul.wide.u32 %o, %l, ${4 * nD}; ld.param.u64 %w, [d]; add.s64 %w, %w, %o;
${list('d', nD)
  .map((r, j) => `st.global.b32 [%w+${4 * j}], ${r};`)
  .join('\n')}
ret; }`;
}

/** [16, 8] sums that start at 2: numbers, or bits of float16. */
export function runMma(bench: Bench<GpuApi>, { k, type, accumulator, a, b }: Mma): number[] {
  const tf32 = type === 'tf32';
  const format = type === 'f16' ? float16 : bfloat16;
  const bits = (x: number) => Number(tf32 ? f32(x) : halfBits(x, format));
  // Fragments as the PTX ISA tabulates them: group = lane / 4 is a row of A, a column of B; its four threads share a row.
  const step = tf32 ? 1 : 2;
  const span = 4 * step;
  const words = (row: number, column: number) =>
    tf32 ? bits(a[row * k + column]) : bits(a[row * k + column]) | (bits(a[row * k + column + 1]) << 16);
  const wordsB = (row: number, column: number) =>
    tf32 ? bits(b[row * 8 + column]) : bits(b[row * 8 + column]) | (bits(b[(row + 1) * 8 + column]) << 16);
  const [nA, nB] = fragmentWords(k, type);
  const fa = new Uint32Array(32 * nA);
  const fb = new Uint32Array(32 * nB);
  for (let l = 0; l < 32; l++) {
    for (let j = 0; j < nA; j++)
      fa[l * nA + j] = words((l >> 2) + (j % 2) * 8, (l % 4) * step + Math.floor(j / 2) * span);
    for (let j = 0; j < nB; j++) fb[l * nB + j] = wordsB((l % 4) * step + j * span, l >> 2);
  }
  const nD = accumulator === 'f32' ? 4 : 2;
  const d = bench.room(32 * 4 * nD);
  bench.launch(mmaPtx({ k, type, accumulator }), 'op', 1, 32, [d, bench.give(fa), bench.give(fb)]);
  const raw = bench.bytes(d, 32 * 4 * nD);
  const view = new DataView(raw.buffer);
  const out = Array<number>(128);
  for (let l = 0; l < 32; l++) {
    for (let j = 0; j < 4; j++) {
      const at = ((l >> 2) + (j >> 1) * 8) * 8 + (l % 4) * 2 + (j & 1);
      out[at] = nD === 4 ? view.getFloat32(l * 16 + j * 4, true) : view.getUint16(l * 8 + j * 2, true);
    }
  }
  return out;
}
