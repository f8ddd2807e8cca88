// Micro-kernels of one kind of access each: loads, stores, copies and what orders them, and exchange between lanes.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { type Bench, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { sameBits } from './agreement.ts';
import type { MicroKernel } from './micro.ts';

const THREADS = 64;

/** A kernel of two pointers, %in and %out; %t is the thread, %s the start of 2 KiB of shared memory. */
const kernel = (body: string) => `.version 7.0
.target sm_80
.address_size 64
.visible .entry op(.param .u64 to, .param .u64 from)
{
.reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %t, %s, %r<16>; .reg .f32 %f<8>; .reg .f64 %g<4>; .reg .b64 %in, %out, %at, %o, %w<8>;
.shared .align 16 .b8 tile[2048];
ld.param.u64 %w1, [to]; ld.param.u64 %w2, [from]; cvta.to.global.u64 %out, %w1; cvta.to.global.u64 %in, %w2;
mov.u32 %t, %tid.x; mov.u32 %s, tile;
${body}
ret;
}`;

const step = (register: string, base: string, bytes: number) =>
  `mul.wide.u32 %o, %t, ${bytes}; add.s64 ${register}, ${base}, %o;`;
const stepShared = (register: string, lane: string, bytes: number) =>
  `mul.lo.s32 ${register}, ${lane}, ${bytes}; add.s32 ${register}, ${register}, %s;`;

/** Runs over 4 KiB of input into `outBytes`, all of them written. */
function memory(name: string, body: string, outBytes: number, group = 'memory'): MicroKernel {
  const ptx = kernel(body);
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(outBytes);
    bench.launch(ptx, 'op', 1, THREADS, [to, bench.give(floatsFrom(1024, 11))]);
    return bench.bytes(to, outBytes);
  };
  return { group, name, ptx, run, agree: sameBits('u32') };
}

const registers: Record<string, readonly string[]> = {
  u8: ['%h1', '%h2'],
  u16: ['%h1', '%h2'],
  u32: ['%r1', '%r2'],
  b32: ['%r1', '%r2'],
  f32: ['%f1', '%f2'],
  f64: ['%g1', '%g2'],
  u64: ['%w3', '%w4'],
};
const bytes: Record<string, number> = { u8: 1, u16: 2, u32: 4, b32: 4, f32: 4, f64: 8, u64: 8 };
const vectors: Record<string, string> = {
  'v2.f32': '{%f1, %f2}',
  'v4.f32': '{%f1, %f2, %f3, %f4}',
  'v2.u32': '{%r1, %r2}',
  'v4.u32': '{%r1, %r2, %r3, %r4}',
  'v4.b32': '{%r1, %r2, %r3, %r4}',
  'v4.u16': '{%h1, %h2, %h3, %h4}',
  'v2.u16': '{%h1, %h2}',
  'v4.u8': '{%h1, %h2, %h3, %h4}',
};

/** Through global memory, then through shared memory to another thread, in one width. */
function width(type: string): MicroKernel[] {
  const [value] = registers[type] ?? [vectors[type]];
  const size = bytes[type] ?? Number(type[1]) * bytes[type.slice(3)];
  const shared = `${step('%at', '%in', size)} ld.global.${type} ${value}, [%at];
${stepShared('%r8', '%t', size)} st.shared.${type} [%r8], ${value}; bar.sync 0;
add.s32 %r9, %t, 5; and.b32 %r9, %r9, ${THREADS - 1}; ${stepShared('%r8', '%r9', size)} ld.shared.${type} ${value}, [%r8];
${step('%at', '%out', size)} st.global.${type} [%at], ${value};`;
  const global = `${step('%at', '%in', size)} ld.global.${type} ${value}, [%at];
xor.b32 %r9, %t, 3; mul.wide.u32 %o, %r9, ${size}; add.s64 %at, %out, %o; st.global.${type} [%at], ${value};`;
  return [memory(`global ${type}`, global, THREADS * size), memory(`shared ${type}`, shared, THREADS * size)];
}

const store4 = `${step('%at', '%out', 16)} st.global.v4.u32 [%at], {%r1, %r2, %r3, %r4};`;

function copies(): MicroKernel[] {
  const other = `add.s32 %r9, %t, 9; and.b32 %r9, %r9, ${THREADS - 1}; ${stepShared('%r8', '%r9', 16)}
ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r8]; ${store4}`;
  const begin = `${step('%at', '%in', 16)} ${stepShared('%r8', '%t', 16)}`;
  const wait = 'cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;';
  return [
    memory('cp.async.cg', `${begin} cp.async.cg.shared.global [%r8], [%at], 16; ${wait} ${other}`, 1024),
    memory(
      'cp.async.cg with zeros',
      `${begin} and.b32 %r7, %t, 15; cp.async.cg.shared.global [%r8], [%at], 16, %r7; ${wait} ${other}`,
      1024,
    ),
    memory(
      'cp.async.ca of 4 and 8',
      `${begin} cp.async.ca.shared.global [%r8], [%at], 8; add.s32 %r7, %r8, 8; cp.async.ca.shared.global [%r7], [%at+8], 4;
add.s32 %r7, %r8, 12; cp.async.ca.shared.global [%r7], [%at+12], 4; cp.async.commit_group; cp.async.wait_all; bar.sync 0; ${other}`,
      1024,
    ),
    memory(
      'cp.async.wait_group 1',
      `${begin} cp.async.cg.shared.global [%r8], [%at], 16; cp.async.commit_group; add.s32 %r7, %r8, 1024;
cp.async.cg.shared.global [%r7], [%at], 16; cp.async.commit_group; cp.async.wait_group 1; bar.sync 0; ${other} cp.async.wait_group 0;`,
      1024,
    ),
  ];
}

/** 512 bytes a warp to shared memory, then matrices of 8 x 8 halves to registers. */
function matrices(): MicroKernel[] {
  const fill = `${step('%at', '%in', 16)} ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%at]; ${stepShared('%r8', '%t', 16)}
st.shared.v4.u32 [%r8], {%r1, %r2, %r3, %r4}; bar.sync 0;`;
  const load = (how: string, list: string) =>
    memory(
      `ldmatrix${how}`,
      `${fill} mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; ldmatrix.sync.aligned.m8n8${how}.shared.b16 ${list}, [%r8]; ${store4}`,
      1024,
    );
  const all = '{%r1, %r2, %r3, %r4}';
  return [
    load('.x1', '{%r1}'),
    load('.x2', '{%r1, %r2}'),
    load('.x4', all),
    load('.x2.trans', '{%r1, %r2}'),
    load('.x4.trans', all),
  ];
}

const oneWord = `${step('%at', '%in', 4)} ld.global.u32 %r1, [%at];`;
const storeWord = (register = '%r2') => `${step('%at', '%out', 4)} st.global.u32 [%at], ${register};`;

function acrossLanes(): MicroKernel[] {
  const warp = (name: string, text: string) =>
    memory(name, `${oneWord} ${text} ${storeWord()}`, THREADS * 4, 'warp');
  return [
    ...[1, 5, 16].map((by) =>
      warp(`shfl.sync.bfly.b32 ${by}`, `shfl.sync.bfly.b32 %r2, %r1, ${by}, 31, -1;`),
    ),
    warp('shfl.sync.down.b32', 'shfl.sync.down.b32 %r2, %r1, 4, 31, -1;'),
    warp('shfl.sync.up.b32', 'shfl.sync.up.b32 %r2, %r1, 3, 0, -1;'),
    warp('shfl.sync.idx.b32', 'shfl.sync.idx.b32 %r2, %r1, 9, 31, -1;'),
    warp(
      'shfl.sync.down.b32 with its flag',
      'shfl.sync.down.b32 %r2|%p1, %r1, 2, 6175, -1; @!%p1 mov.u32 %r2, 0;',
    ),
    warp('vote.sync.ballot.b32', 'setp.lt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r2, %p1, -1;'),
    warp(
      'vote.sync.any.pred',
      'setp.lt.s32 %p1, %r1, 0; vote.sync.any.pred %p2, %p1, -1; selp.u32 %r2, 1, 0, %p2;',
    ),
    warp(
      'vote.sync.all.pred',
      'setp.ge.u32 %p1, %t, 16; vote.sync.all.pred %p2, %p1, -1; selp.u32 %r2, 1, 0, %p2;',
    ),
    warp('redux.sync.add.s32', 'redux.sync.add.s32 %r2, %r1, -1;'),
    warp('activemask.b32', 'activemask.b32 %r2;'),
    warp(
      'divergence and reconvergence',
      `setp.lt.u32 %p1, %t, 13; @%p1 bra LOW; add.s32 %r2, %r1, 7; bra.uni JOIN;
LOW: xor.b32 %r2, %r1, -1;
JOIN: bar.warp.sync -1; shfl.sync.bfly.b32 %r2, %r2, 8, 31, -1;`,
    ),
  ];
}

function others(): MicroKernel[] {
  return [
    memory(
      'prefetch.global.L2',
      `${step('%at', '%in', 16)} prefetch.global.L2 [%at]; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%at]; ${store4}`,
      THREADS * 16,
    ),
    memory(
      'bar.warp.sync',
      `${oneWord} ${stepShared('%r8', '%t', 4)} st.shared.u32 [%r8], %r1; bar.warp.sync -1; xor.b32 %r9, %t, 17;
${stepShared('%r8', '%r9', 4)} ld.shared.u32 %r2, [%r8]; ${storeWord()}`,
      THREADS * 4,
    ),
    memory(
      'bar.arrive',
      // The first warp writes and arrives, the second waits and reads; then the other way round.
      `${oneWord} ${stepShared('%r8', '%t', 4)} xor.b32 %r9, %t, 32; ${stepShared('%r7', '%r9', 4)} setp.lt.u32 %p1, %t, 32;
@!%p1 bra READ; st.shared.u32 [%r8], %r1; bar.arrive 1, 64; bar.sync 2, 64; ld.shared.u32 %r2, [%r7]; bra.uni BOTH;
READ: bar.sync 1, 64; ld.shared.u32 %r2, [%r7]; st.shared.u32 [%r8], %r1; bar.arrive 2, 64;
BOTH: ${storeWord()}`,
      THREADS * 4,
    ),
    memory(
      'st.volatile.shared.f32',
      `${step('%at', '%in', 4)} ld.global.f32 %f1, [%at]; ${stepShared('%r8', '%t', 4)} st.volatile.shared.f32 [%r8], %f1; bar.sync 0;
xor.b32 %r9, %t, 33; ${stepShared('%r8', '%r9', 4)} ld.shared.u32 %r2, [%r8]; ${storeWord()}`,
      THREADS * 4,
    ),
    memory(
      'local memory',
      `.local .align 16 .b8 own[64]; ${step('%at', '%in', 16)} ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%at];
mov.u64 %w5, own; st.local.v4.u32 [%w5], {%r1, %r2, %r3, %r4}; and.b32 %r6, %t, 3; mul.wide.u32 %o, %r6, 4; add.s64 %w5, %w5, %o;
ld.local.u32 %r2, [%w5]; ${storeWord()}`,
      THREADS * 4,
    ),
    memory(
      'atom.global.add.u32',
      `mov.u32 %r1, 0; setp.eq.s32 %p1, %t, 0; @%p1 st.global.u32 [%out], %r1; membar.gl; bar.sync 0; add.s32 %r1, %t, 3;
atom.global.add.u32 %r2, [%out], %r1; bar.sync 0;`,
      4,
    ),
    memory(
      'moves',
      `${step('%at', '%in', 8)} ld.global.u64 %w3, [%at]; mov.b64 {%r1, %r2}, %w3; mov.b32 {%h1, %h2}, %r1; mov.u16 %h3, %h1;
mov.b32 %r3, {%h2, %h3}; mov.f32 %f1, 0f3FC00000; mov.b32 %r4, %f1; add.s32 %r3, %r3, %r4; mov.b64 %w4, {%r3, %r2};
mov.u64 %w5, %w4; mov.b64 %g1, %w5; mov.f64 %g2, %g1; ${step('%at', '%out', 8)} st.global.f64 [%at], %g2;`,
      THREADS * 8,
    ),
  ];
}

/** Addresses that do not say which memory they are in. */
function generic(): MicroKernel[] {
  const of = (type: string, value: string, size: number) =>
    memory(
      `generic ${type}`,
      `mul.wide.u32 %o, %t, ${size}; add.s64 %w3, %w2, %o; add.s64 %w4, %w1, %o; ld.${type} ${value}, [%w3]; st.${type} [%w4], ${value};`,
      THREADS * size,
    );
  return [
    of('u8', '%h1', 1),
    of('u16', '%h1', 2),
    of('u32', '%r1', 4),
    of('f32', '%f1', 4),
    of('v4.u8', vectors['v4.u8'], 4),
    of('v4.u16', vectors['v4.u16'], 8),
    of('v2.u32', vectors['v2.u32'], 8),
    of('v4.u32', vectors['v4.u32'], 16),
    of('v4.f32', vectors['v4.f32'], 16),
  ];
}

/** Parameters of every kind, at their offsets in the block. */
function parameters(): MicroKernel {
  const ptx = `.version 7.0
.target sm_80
.address_size 64
.visible .entry op(.param .u32 a, .param .u64 to, .param .f32 b, .param .s32 c, .param .u64 d,
.param .u32 e, .param .f64 g)
{
.reg .b32 %r<4>; .reg .f32 %f<2>; .reg .f64 %g<2>; .reg .b64 %w<4>;
ld.param.u32 %r1, [a]; ld.param.u64 %w1, [to]; ld.param.f32 %f1, [b]; ld.param.s32 %r2, [c]; ld.param.u64 %w2, [d];
ld.param.u32 %r3, [e]; ld.param.f64 %g1, [g];
cvta.to.global.u64 %w1, %w1; st.global.u32 [%w1], %r1; st.global.f32 [%w1+4], %f1; st.global.u32 [%w1+8], %r2;
st.global.u32 [%w1+12], %r3; st.global.u64 [%w1+16], %w2; st.global.f64 [%w1+24], %g1; ret;
}`;
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(32);
    bench.launch(ptx, 'op', 1, 1, [7, to, 1.1, -3, 0x123456789abcdefn, 5, Math.PI]);
    return bench.bytes(to, 32);
  };
  return { group: 'memory', name: 'parameters', ptx, run, agree: sameBits('u32') };
}

export const memoryKernels = (): MicroKernel[] => [
  ...['u8', 'u16', 'u32', 'f32', 'f64', 'u64', ...Object.keys(vectors)].flatMap(width),
  ...copies(),
  ...matrices(),
  ...acrossLanes(),
  ...others(),
  ...generic(),
  parameters(),
];
