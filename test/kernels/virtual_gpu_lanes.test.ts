// Instructions across the lanes of a warp, atomics, and matrix products, against plain loops.
import { test } from 'tap';
import { float16 } from '../virtual-gpu/exact.ts';
import { type Bits, halfBits, run } from '../virtual-gpu/instruction.ts';
import { type MmaType, runMma } from '../virtual-gpu/mma.ts';
import { newBench } from '../virtual-gpu/run_kernel.ts';

const lanes = Array.from({ length: 32 }, (_, l) => BigInt(l * l * 7 + 3));

test('shuffles, votes and reductions of a warp', (t) => {
  const warp = (body: string, inputs: Bits[] = [lanes]) =>
    run(body, 'u32', Array(inputs.length).fill('u32'), inputs);
  const all = '-1';
  const pick = (from: (l: number) => number) =>
    lanes.map((v, l) => (from(l) < 0 || from(l) > 31 ? v : lanes[from(l)]));
  t.same(
    warp(`shfl.sync.bfly.b32 %d, %a, 5, 31, ${all};`),
    pick((l) => l ^ 5),
  );
  t.same(
    warp(`shfl.sync.up.b32 %d, %a, 3, 0, ${all};`),
    pick((l) => l - 3),
  );
  t.same(
    warp(`shfl.sync.down.b32 %d, %a, 4, 31, ${all};`),
    pick((l) => l + 4),
  );
  t.same(
    warp(`shfl.sync.idx.b32 %d, %a, 9, 31, ${all};`),
    pick(() => 9),
  );
  t.same(
    warp(`shfl.sync.down.b32 %d|%p1, %a, 2, 6175, ${all}; @!%p1 mov.u32 %d, 0;`),
    lanes.map((_, l) => (l % 8 > 5 ? 0n : lanes[l + 2])),
    'segments of eight lanes, with the flag of those out of range',
  );
  const odd = lanes.map((v) => v & 1n);
  const ballot = odd.reduce((m, v, l) => m | (v << BigInt(l)), 0n);
  const vote = (how: string, type: string) =>
    warp(`and.b32 %r1, %a, 1; setp.ne.s32 %p1, %r1, 0; vote.sync.${how}.${type}`);
  t.same(vote('ballot', `b32 %d, %p1, ${all};`), Array(32).fill(ballot));
  t.same(vote('any', `pred %p2, %p1, ${all}; selp.u32 %d, 1, 0, %p2;`), Array(32).fill(1n));
  t.same(vote('all', `pred %p2, !%p1, ${all}; selp.u32 %d, 1, 0, %p2;`), Array(32).fill(0n));
  t.same(warp(`redux.sync.add.s32 %d, %a, ${all};`), Array(32).fill(lanes.reduce((p, q) => p + q)));
  t.same(warp(`redux.sync.max.u32 %d, %a, ${all};`), Array(32).fill(lanes[31]));
  const groups = lanes.map((_, l) => BigInt(l % 3));
  const same = groups.map((g) => groups.reduce((m, v, l) => (v === g ? m | (1n << BigInt(l)) : m), 0n));
  t.same(warp(`match.any.sync.b32 %d, %a, ${all};`, [groups]), same);
  t.same(warp('activemask.b32 %d;'), Array(32).fill(0xffffffffn));
  t.same(warp(`setp.lt.u32 %p1, %a, 100; bar.red.popc.u32 %d, 0, %p1;`), Array(32).fill(4n), 'bar.red.popc');
  t.end();
});

test('atomics', (t) => {
  const results: Record<string, (old: number, v: number) => number> = {
    'add.u32': (o, v) => o + v,
    'max.s32': Math.max,
    'min.u32': Math.min,
    'xor.b32': (o, v) => o ^ v,
    'exch.b32': (_, v) => v,
    'inc.u32': (o, v) => (o >= v ? 0 : o + 1),
  };
  for (const [name, step] of Object.entries(results)) {
    const bench = newBench();
    const ptx = `.version 7.0\n.target sm_80\n.address_size 64
.visible .entry op(.param .u64 sum, .param .u64 old)
{ .reg .b32 %r<4>; .reg .b64 %w<4>;
ld.param.u64 %w1, [sum]; ld.param.u64 %w2, [old]; mov.u32 %r1, %tid.x; add.s32 %r2, %r1, 5;
atom.global.${name} %r3, [%w1], %r2; mul.wide.u32 %w3, %r1, 4; add.s64 %w2, %w2, %w3; st.global.u32 [%w2], %r3; ret; }`;
    const sum = bench.give(Int32Array.of(17));
    const old = bench.room(128);
    bench.launch(ptx, 'op', 1, 32, [sum, old]);
    let value = 17;
    const olds = Array.from({ length: 32 }, (_, l) => {
      const before = value;
      value = step(value, l + 5);
      return before;
    });
    t.same([...bench.ints(sum, 1), ...bench.ints(old, 32)], [value, ...olds], `atom.${name}`);
  }
  const bench = newBench();
  const float = bench.give(Float32Array.of(1));
  const ptx = `.version 7.0\n.target sm_80\n.address_size 64
.visible .entry op(.param .u64 sum)
{ .reg .b64 %w<4>; ld.param.u64 %w1, [sum]; red.global.add.f32 [%w1], 0f3E800000; ret; }`;
  bench.launch(ptx, 'op', 2, 32, [float]);
  t.same(bench.floats(float, 1), Float32Array.of(17));
  t.end();
});

/** mma.sync over random small integers, whose products and sums are exact in every type. */
function product(k: number, type: MmaType, accumulator: 'f32' | 'f16'): { got: number[]; want: number[] } {
  const small = (seed: number) => (((seed * 2654435761) >>> 7) % 7) - 3;
  const a = Array.from({ length: 16 * k }, (_, i) => small(i + 1));
  const b = Array.from({ length: k * 8 }, (_, i) => small(i + 1000));
  const got = runMma(newBench(), { k, type, accumulator, a, b });
  const want = Array.from({ length: 128 }, (_, i) => {
    let sum = 2;
    for (let q = 0; q < k; q++) sum += a[Math.floor(i / 8) * k + q] * b[q * 8 + (i % 8)];
    return accumulator === 'f32' ? sum : Number(halfBits(sum, float16));
  });
  return { got, want };
}

test('mma.sync', (t) => {
  for (const [k, type, accumulator] of [
    [16, 'bf16', 'f32'],
    [16, 'f16', 'f32'],
    [16, 'f16', 'f16'],
    [8, 'bf16', 'f32'],
    [8, 'f16', 'f32'],
    [8, 'tf32', 'f32'],
    [4, 'tf32', 'f32'],
  ] as const) {
    const { got, want } = product(k, type, accumulator);
    t.same(got, want, `m16n8k${k} ${type} into ${accumulator}`);
  }
  t.end();
});
