// Float instructions: each runs on the virtual GPU over awkward operands, against exact arithmetic that is rounded once.
import { test } from 'tap';
import {
  bfloat16,
  exactFma,
  exactProduct,
  exactRounding,
  exactSum,
  float16,
  float32,
  float64,
  type RoundingMode,
} from '../virtual-gpu/exact.ts';
import {
  type Bits,
  f32,
  floatTriples,
  fromF32,
  halfBits,
  integerPairs,
  run,
  whole,
} from '../virtual-gpu/instruction.ts';

const bitsOf64 = (x: number): bigint => BigInt.asUintN(64, new BigInt64Array(Float64Array.of(x).buffer)[0]);
const fromBits64 = (bits: bigint): number => new Float64Array(BigUint64Array.of(bits).buffer)[0];
const sameFloat = (p: number, q: number) => Object.is(p, q) || (Number.isNaN(p) && Number.isNaN(q));

/** An exact zero sum of unlike signs is -0 when rounding down. */
const zeroSum = (p: number, q: number, sum: number, mode: RoundingMode) =>
  mode === 'rm' && p === -q && Number.isFinite(p) && !(Object.is(p, 0) && Object.is(q, 0)) ? -0 : sum;

test('fma.rn.f64 rounds once, where the exponent ends too', (t) => {
  const powers = [-1074, -1060, -1022, -600, -537, -500, -52, 0, 1, 52, 400, 511, 512, 600, 970, 1000, 1023];
  const sizes = powers.flatMap((power, i) =>
    [1, -(1 + (i + 1) / 3), 1.5 + 2 ** -30].map((x) => x * 2 ** power),
  );
  const triples = sizes.flatMap((x, i) =>
    sizes.map((y, j) => [x, y, sizes[(7 * i + 11 * j) % sizes.length]] as const),
  );
  const ends = triples.flatMap(([x, y, z]) => [[x, y, z] as const, [x, y, -x * y] as const]);
  const bits = (k: 0 | 1 | 2) => whole(ends.map((triple) => bitsOf64(triple[k])));
  const got = run('fma.rn.f64 %d, %a, %b, %c;', 'f64', ['f64', 'f64', 'f64'], [bits(0), bits(1), bits(2)]);
  const bad = ends.filter(([x, y, z], i) => !sameFloat(exactFma(x, y, z, float64), fromBits64(got[i])));
  t.same(bad, []);
  t.end();
});

test('float32 arithmetic rounds once', (t) => {
  const [x, y, z] = floatTriples();
  const check = (name: string, oracle: (a: number, b: number, c: number) => number) => {
    const n = oracle.length;
    const body = `${name} %d, ${['%a', '%b', '%c'].slice(0, n).join(', ')};`;
    const got = run(
      body,
      'f32',
      Array(n).fill('f32'),
      [x, y, z].slice(0, n).map((v) => v.map(f32)),
    ).map(fromF32);
    const wrong = got.findIndex((v, i) => !sameFloat(v, oracle(x[i], y[i], z[i])));
    t.equal(wrong, -1, `${name} ${wrong < 0 ? '' : [x, y, z].map((v) => v[wrong])} gives ${got[wrong]}`);
  };
  for (const mode of ['rn', 'rz', 'rm', 'rp'] as RoundingMode[]) {
    check(`add.${mode}.f32`, (a, b) => zeroSum(a, b, exactSum(a, b, float32, mode), mode));
    check(`mul.${mode}.f32`, (a, b) => exactProduct(a, b, float32, mode));
    check(`fma.${mode}.f32`, (a, b, c) => zeroSum(a * b, c, exactFma(a, b, c, float32, mode), mode));
  }
  check('sub.f32', (a, b) => exactSum(a, -b));
  check('div.rn.f32', (a, b) => Math.fround(a / b));
  check('sqrt.rn.f32', (a) => Math.fround(Math.sqrt(a)));
  check('rcp.rn.f32', (a) => Math.fround(1 / a));
  check('neg.f32', (a) => -a);
  check('abs.f32', (a) => Math.abs(a));
  check('min.f32', (a, b) => (Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.min(a, b)));
  check('max.f32', (a, b) => (Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.max(a, b)));
  check('min.NaN.f32', (a, b) => Math.min(a, b));
  check('max.NaN.f32', (a, b) => Math.max(a, b));
  const isNegative = (a: number) => f32(a) >> 31n === 1n;
  check('copysign.f32', (a, b) => (isNegative(a) ? -1 : 1) * Math.abs(b));
  check('add.sat.f32', (a, b) => Math.min(1, Math.max(0, exactSum(a, b) || 0)));
  t.end();
});

test('float comparisons and NaN', (t) => {
  const [x, y] = floatTriples();
  const unordered = (p: number, q: number) => Number.isNaN(p) || Number.isNaN(q);
  const tests: Record<string, (p: number, q: number) => boolean> = {
    ...{ eq: (p, q) => p === q, lt: (p, q) => p < q, ge: (p, q) => p >= q },
    ne: (p, q) => p !== q && !unordered(p, q),
    equ: (p, q) => p === q || unordered(p, q),
    neu: (p, q) => p !== q,
    ltu: (p, q) => p < q || unordered(p, q),
    gtu: (p, q) => p > q || unordered(p, q),
    ...{ num: (p, q) => !unordered(p, q), nan: unordered },
  };
  for (const [how, holds] of Object.entries(tests)) {
    const body = `setp.${how}.f32 %p1|%p2, %a, %b; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %d, %r1, %r2;`;
    const want = x.map((v, i) => (holds(v, y[i]) ? 1n : 2n));
    t.same(run(body, 'u32', ['f32', 'f32'], [x.map(f32), y.map(f32)]), want, `setp.${how}.f32`);
  }
  t.end();
});

test('conversions', (t) => {
  const [x] = floatTriples();
  const bits = x.map(f32);
  const fails = (got: Bits, want: Bits) =>
    got.map((v, i) => (v === want[i] ? '' : `${x[i]}: ${v} not ${want[i]}`)).filter((v) => v);
  const clamp = (v: number, low: bigint, high: bigint, how: (v: number) => number): bigint => {
    if (Number.isNaN(v)) return high >> 32n ? 1n << 63n : 0n;
    if (!Number.isFinite(v)) return v > 0 ? high : low;
    const whole = BigInt(how(v));
    return whole < low ? low : whole > high ? high : whole;
  };
  const even = (v: number) => {
    const f = Math.floor(v);
    return v - f === 0.5 ? f + (f % 2 === 0 ? 0 : 1) : Math.round(v);
  };
  const roundings: Record<string, (v: number) => number> = {
    ...{ rzi: Math.trunc, rni: even, rmi: Math.floor, rpi: Math.ceil },
  };
  for (const [how, rounded] of Object.entries(roundings)) {
    for (const [type, low, high] of [
      ['s32', -(2n ** 31n), 2n ** 31n - 1n],
      ['u32', 0n, 2n ** 32n - 1n],
      ['s64', -(2n ** 63n), 2n ** 63n - 1n],
      ['u64', 0n, 2n ** 64n - 1n],
    ] as const) {
      const got = run(`cvt.${how}.${type}.f32 %d, %a;`, type, ['f32'], [bits]);
      const want = x.map((v) => BigInt.asUintN(type.endsWith('64') ? 64 : 32, clamp(v, low, high, rounded)));
      t.same(fails(got, want), [], `cvt.${how}.${type}.f32`);
    }
  }
  const small = [-0.25, -0.5, -0.75, -0, 0.5, 1.5, -2.5];
  const rounded = run('cvt.rni.f32.f32 %d, %a;', 'f32', ['f32'], [whole(small.map(f32))]).map(fromF32);
  t.same(
    rounded.slice(0, small.length),
    [-0, -0, -1, -0, 0, 2, -2],
    'cvt.rni.f32.f32: zeros keep their sign, as on an H200',
  );
  const doubles = [Number.NaN, 1e300, -1e300, -2.5, 70000];
  const bits64 = whole(doubles.map(bitsOf64));
  for (const [type, size, from] of [
    ['s32', 'u32', [2n ** 31n, 2n ** 31n - 1n, 2n ** 31n, 2n ** 32n - 2n, 70000n]],
    ['u32', 'u32', [2n ** 31n, 2n ** 32n - 1n, 0n, 0n, 70000n]],
    ['u16', 'u16', [2n ** 15n, 2n ** 16n - 1n, 0n, 0n, 2n ** 16n - 1n]],
    ['s64', 'u64', [2n ** 63n, 2n ** 63n - 1n, 2n ** 63n, 2n ** 64n - 2n, 70000n]],
  ] as const) {
    const got = run(`cvt.rzi.${type}.f64 %d, %a;`, size, ['f64'], [bits64]).slice(0, doubles.length);
    t.same(got, from, `cvt.rzi.${type}.f64`);
  }
  // Both words below the high ones are ignored, and are zero.
  const gross = [0x4008000000000000n, 0x40080000ffffffffn, 0x7fe0000000000000n, 0x0008000000000000n];
  t.same(
    run('rcp.approx.ftz.f64 %d, %a;', 'f64', ['f64'], [whole(gross)]).slice(0, gross.length),
    [0x3fd5555500000000n, 0x3fd5555500000000n, 0n, 0x7ff0000000000000n],
    'rcp.approx.ftz.f64',
  );
  const nan16 = (v: bigint, mask: bigint) =>
    (v & mask) === mask && (v & ~mask & 0x7fffn) !== 0n ? 0x7fffn : v;
  for (const [format, name, mask] of [
    [bfloat16, 'bf16', 0x7f80n],
    [float16, 'f16', 0x7c00n],
  ] as const) {
    const want = x.map((v) => halfBits(exactRounding(v, format), format));
    const got = run(`cvt.rn.${name}.f32 %d, %a;`, 'u16', ['f32'], [bits]).map((v) => nan16(v, mask));
    t.same(fails(got, want), [], `cvt.rn.${name}.f32`);
    const pair = run(
      `cvt.rn.${name}x2.f32 %d, %a, %b;`,
      'u32',
      ['f32', 'f32'],
      [bits, bits.slice().reverse()],
    );
    const wantPair = want.map((v, i) => (v << 16n) | want[want.length - 1 - i]);
    const canonical = pair.map((v) => (nan16(v >> 16n, mask) << 16n) | nan16(v & 0xffffn, mask));
    t.same(fails(canonical, wantPair), [], `cvt.rn.${name}x2.f32`);
  }
  const halves = whole(Array.from({ length: 512 }, (_, i) => BigInt(i * 128 + (i % 128))));
  const back = run('cvt.f32.f16 %d, %a;', 'f32', ['u16'], [halves]).map(fromF32);
  t.ok(
    halves.every((h, i) => Number.isNaN(back[i]) || halfBits(back[i], float16) === h),
    'cvt.f32.f16 is the inverse',
  );
  const ints = integerPairs(32)[0];
  const signed = run('cvt.rn.f32.s32 %d, %a;', 'f32', ['u32'], [ints]).map(fromF32);
  t.same(
    signed,
    ints.map((v) => Math.fround(Number(BigInt.asIntN(32, v)))),
    'cvt.rn.f32.s32',
  );
  const longs = integerPairs(64)[0];
  const unsigned = run('cvt.rn.f32.u64 %d, %a;', 'f32', ['u64'], [longs]).map(fromF32);
  t.ok(
    unsigned.every((v, i) => Math.abs(v / Number(longs[i] || 1n) - (longs[i] ? 1 : 0)) < 2 ** -23),
    'cvt.rn.f32.u64',
  );
  t.same(
    run('cvt.s64.s32 %d, %a;', 'u64', ['u32'], [ints]),
    ints.map((v) => BigInt.asUintN(64, BigInt.asIntN(32, v))),
  );
  t.same(
    run('cvt.u32.u64 %d, %a;', 'u32', ['u64'], [longs]),
    longs.map((v) => BigInt.asUintN(32, v)),
  );
  t.same(
    run('cvt.s32.s16 %d, %a;', 'u32', ['u16'], [halves]),
    halves.map((v) => BigInt.asUintN(32, BigInt.asIntN(16, v))),
  );
  t.same(
    run('cvt.u32.u8 %d, %a;', 'u32', ['u32'], [ints]),
    ints.map((v) => v & 255n),
  );
  t.same(
    run(
      'cvt.rna.tf32.f32 %d, %a;',
      'u32',
      ['f32'],
      [[f32(1 + 2 ** -11), f32(1 + 2 ** -12)].concat(Array(30).fill(f32(1)))],
    ).slice(0, 2),
    [f32(1 + 2 ** -10), f32(1)],
  );
  t.end();
});

test('packed halves', (t) => {
  const low = floatTriples().map((v) => v.map((x) => exactRounding(x, bfloat16)));
  const bits = low.map((v) => v.map((x) => halfBits(x, bfloat16)));
  const pairs = bits.map((v) => v.map((b, i) => (v[v.length - 1 - i] << 16n) | b));
  const value = (b: bigint) => fromF32(b << 16n);
  const check = (name: string, oracle: (a: number, b: number, c: number) => number) => {
    const n = oracle.length;
    const operands = ['%a', '%b', '%c'].slice(0, n).join(', ');
    const got = run(`${name} %d, ${operands};`, 'u32', Array(n).fill('u32'), pairs.slice(0, n));
    const wrong = got.findIndex((v, i) => {
      const half = (shift: bigint) => {
        const args = pairs.map((p) => value((p[i] >> shift) & 0xffffn));
        return sameFloat(value((v >> shift) & 0xffffn), oracle(args[0], args[1], args[2]));
      };
      return !half(0n) || !half(16n);
    });
    t.equal(wrong, -1, name);
  };
  check('fma.rn.bf16x2', (a, b, c) => exactFma(a, b, c, bfloat16));
  check('max.bf16x2', (a, b) => (Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.max(a, b)));
  check('neg.bf16x2', (a) => -a);
  check('abs.bf16x2', (a) => Math.abs(a));
  t.end();
});

test('approximations are close, and .ftz flushes', (t) => {
  const x = Array.from({ length: 96 }, (_, i) => Math.fround((i - 40) / 7 + 0.01));
  const bits = x.map(f32);
  const check = (name: string, oracle: (a: number) => number, bound: number) => {
    const got = run(`${name} %d, %a;`, 'f32', ['f32'], [bits]).map(fromF32);
    const worst = Math.max(
      ...got
        .map((v, i) =>
          sameFloat(v, oracle(x[i]))
            ? 0
            : Math.abs(v - oracle(x[i])) / Math.max(1e-3, Math.abs(oracle(x[i]))),
        )
        .filter((v) => !Number.isNaN(v)),
    );
    t.ok(worst < bound, `${name} ${worst}`);
  };
  check('ex2.approx.ftz.f32', (a) => 2 ** a, 2e-7);
  check('lg2.approx.f32', (a) => Math.log2(a), 2e-7);
  check('rsqrt.approx.f32', (a) => 1 / Math.sqrt(a), 2e-7);
  check('rcp.approx.ftz.f32', (a) => 1 / a, 2e-7);
  check('tanh.approx.f32', Math.tanh, 1e-3);
  check('sin.approx.f32', Math.sin, 1e-5);
  const tiny = whole([f32(2 ** -140), f32(-(2 ** -130)), f32(2 ** -126)]);
  const flushed = run('mul.ftz.f32 %d, %a, 0f3F800000;', 'f32', ['f32'], [tiny]).slice(0, 3).map(fromF32);
  t.same(flushed, [0, -0, 2 ** -126]);
  t.end();
});
