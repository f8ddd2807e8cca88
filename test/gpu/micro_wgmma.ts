// Micro-kernels of wgmma, of every width that our kernels use: halves and bytes, from shared memory as it lies there and from registers.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { fromE4m3, toBf16, toF16 } from '../virtual-gpu/numbers.ts';
import { type Bench, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { sameBits, within } from './agreement.ts';
import type { MicroKernel } from './micro.ts';
import { integers } from './micro_matrix.ts';
import { copyWords, kernel, onHopper, THREADS, toShared } from './micro_sm90.ts';

/** The operands as 8 x 8 core matrices of 128 bytes: 128 bytes apart along k, 256 along m or n. */
function coreMatrices(values: Uint16Array): Uint16Array {
  return values.map(
    (_, i) =>
      values[
        (Math.floor(i / 128) * 8 + (Math.floor(i / 8) % 8)) * 16 + (Math.floor(i / 64) % 2) * 8 + (i % 8)
      ],
  );
}

/** Operands that lie across k, in chunks of so many bytes of m or n, swizzled, 16 k after one another; 0: core matrices. */
interface Across {
  readonly a: number;
  readonly b: number;
}

/** All of a descriptor but the address: leading offset at bit 16, stride at 32, both in 16 bytes, the swizzle at 62. */
function layoutOf(span: number): string {
  const swizzle = [0, 128, 64, 32].indexOf(span);
  const [leading, stride] = span ? [16 * span, 8 * span] : [128, 256];
  const bits = (BigInt(swizzle) << 62n) | (BigInt(stride >> 4) << 32n) | (BigInt(leading >> 4) << 16n);
  return `0x${bits.toString(16)}`;
}

/** One wgmma of 64 x n x 16, of bytes x 32; each thread stores its sums as it holds them. With `registers` a comes from them. */
function wgmmaPtx(n: number, type: string, registers: boolean, across: Across = { a: 0, b: 0 }): string {
  const sums = Array.from({ length: n / 2 }, (_, i) => `%d${i}`);
  const descriptor = (at: string, to: string, span: number) =>
    `mov.u32 %r4, ${at}; shr.u32 %r4, %r4, 4; cvt.u64.u32 ${to}, %r4; or.b64 ${to}, ${to}, ${layoutOf(span)};`;
  const operand = registers ? '{%a0, %a1, %a2, %a3}' : '%w1';
  const turned = [...(registers ? [] : [across.a]), across.b].map((span) => (span ? ', 1' : ', 0'));
  const [k, flags] = type === 'e4m3' ? [32, '1, 1'] : [16, `1, 1${turned.join('')}`];
  return kernel(
    '.param .u64 to, .param .u64 a, .param .u64 b',
    `.reg .f32 %d<${n / 2}>; .reg .b32 %a<4>; .shared .align 1024 .b8 sa[2048]; .shared .align 1024 .b8 sb[${n * 32}];`,
    `ld.param.u64 %from, [a]; mov.u32 %s, sa; mov.u32 %n, 2048; ${copyWords('A', toShared)}
mul.wide.u32 %o, %t, 16; add.s64 %w3, %from, %o; ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%w3];
ld.param.u64 %from, [b]; mov.u32 %s, sb; mov.u32 %n, ${n * 32}; ${copyWords('B', toShared)}
fence.proxy.async.shared::cta; bar.sync 0;
${descriptor('sa', '%w1', across.a)} ${descriptor('sb', '%w2', across.b)}
${sums.map((d) => `mov.f32 ${d}, 0f40000000;`).join(' ')}
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n${n}k${k}.f32.${type}.${type} {${sums.join(', ')}}, ${operand}, %w2, 1, ${flags};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
ld.param.u64 %to, [to]; mul.wide.u32 %o, %t, ${2 * n}; add.s64 %to, %to, %o;
${sums.map((d, i) => `st.global.f32 [%to+${4 * i}], ${d};`).join(' ')}`,
  );
}

function wgmma(n: number, type: 'bf16' | 'f16', exact: boolean, registers = false): MicroKernel {
  const encode = type === 'bf16' ? toBf16 : toF16;
  const values = (count: number, seed: number) =>
    Uint16Array.from(exact ? integers(count, seed) : floatsFrom(count, seed), encode);
  const ptx = wgmmaPtx(n, type, registers);
  const [a, b] = [values(64 * 16, n), values(n * 16, n + 1)];
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(64 * n * 4);
    // Registers take a as it comes, for their bits are what matters, not their places.
    const from = [registers ? a : coreMatrices(a), coreMatrices(b)].map((each) => bench.give(each));
    bench.launch(ptx, 'op', 1, THREADS, [to, ...from]);
    return bench.bytes(to, 64 * n * 4);
  };
  // Terms are at most 1, sums begin at 2: see micro_matrix.ts.
  const agree = exact ? sameBits('f32') : within(Array(64 * n).fill(18 * 2 * 2 ** -23));
  const kind = `${exact ? 'integers' : 'random'}${registers ? ', a in registers' : ''}`;
  return { ...onHopper, name: `wgmma.m64n${n}k16 ${type}, ${kind}`, ptx, run, agree };
}

/** Integers in shared memory as they come: which element a place holds is what the two GPUs have to agree on. */
function wgmmaAcross(n: number, across: Across): MicroKernel {
  const ptx = wgmmaPtx(n, 'bf16', false, across);
  const [a, b] = [64, n].map((size) => Uint16Array.from(integers(size * 16, size), toBf16));
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(64 * n * 4);
    bench.launch(ptx, 'op', 1, THREADS, [to, bench.give(a), bench.give(b)]);
    return bench.bytes(to, 64 * n * 4);
  };
  const name = `wgmma.m64n${n}k16 across k, swizzles of ${across.a} and ${across.b} bytes`;
  return { ...onHopper, name, ptx, run, agree: sameBits('f32') };
}

const integerBytes = [0x00, 0x38, 0x40, 0xb8, 0xc0]; // 0, 1, 2, -1, -2
const spread = (x: number) => Math.floor(x * 1e6);
const bytesTo16 = Array.from({ length: 256 }, (_, code) => code).filter(
  (code) => Math.abs(fromE4m3(code)) <= 16,
);

/** Bytes of e4m3, two to a half's place: rows are as long, and core matrices as large. */
function wgmmaOfBytes(n: number, exact: boolean): MicroKernel {
  const codes = exact ? integerBytes : bytesTo16;
  const byte = (x: number) => codes[Math.abs(x) % codes.length];
  const pairs = (count: number, seed: number) => {
    const numbers = exact ? integers : (size: number, from: number) => floatsFrom(size, from).map(spread);
    const [low, high] = [numbers(count, seed), numbers(count, seed + 7)];
    return Uint16Array.from({ length: count }, (_, i) => byte(low[i]) | (byte(high[i]) << 8));
  };
  const ptx = wgmmaPtx(n, 'e4m3', false);
  const [a, b] = [pairs(64 * 16, n), pairs(n * 16, n + 1)];
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(64 * n * 4);
    bench.launch(ptx, 'op', 1, THREADS, [
      to,
      ...[coreMatrices(a), coreMatrices(b)].map((each) => bench.give(each)),
    ]);
    return bench.bytes(to, 64 * n * 4);
  };
  // Terms are at most 256, each cut off at 13 bits of the largest of them, and the sum at 13 of its own.
  const agree = exact ? sameBits('f32') : within(Array(64 * n).fill(2 * (33 * 2 ** -5 + 1)));
  return { ...onHopper, name: `wgmma.m64n${n}k32 e4m3, ${exact ? 'integers' : 'random'}`, ptx, run, agree };
}

export const wgmmaKernels = (): MicroKernel[] => [
  ...([8, 64, 80, 96, 128, 160, 256] as const).flatMap((n) => [
    wgmma(n, 'bf16', true),
    wgmma(n, 'f16', true),
  ]),
  wgmmaOfBytes(160, true),
  wgmmaOfBytes(256, true),
  wgmmaOfBytes(64, false),
  wgmma(160, 'bf16', false),
  wgmma(256, 'f16', false),
  wgmma(64, 'bf16', true, true),
  wgmma(64, 'f16', true, true),
  wgmmaAcross(256, { a: 128, b: 128 }),
  wgmmaAcross(160, { a: 0, b: 64 }),
  wgmmaAcross(80, { a: 128, b: 32 }),
];
