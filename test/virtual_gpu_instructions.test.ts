// Instruction by instruction: each runs on the virtual GPU over awkward operands, and BigInt arithmetic or a plain loop,
// written apart from the virtual GPU, says what PTX defines.
import { test } from 'tap';
import {
  bfloat16,
  exactFma,
  exactProduct,
  exactRounding,
  exactSum,
  float16,
  float32,
  type RoundingMode,
} from './virtual-gpu/exact.ts';
import {
  type Bits,
  f32,
  floatTriples,
  fromF32,
  halfBits,
  integerPairs,
  runInstruction,
  unpacked,
  whole,
} from './virtual-gpu/instruction.ts';
import { type MmaType, runMma } from './virtual-gpu/mma.ts';
import { newBench } from './virtual-gpu/run_kernel.ts';

/** One value a thread of what `body` leaves in %d, on a virtual GPU of its own. */
const run = (body: string, out: string, types: readonly string[], inputs: readonly Bits[]): Bits =>
  unpacked(runInstruction(newBench(), body, out, types, inputs), Number(out.slice(-2)) / 8);

const hex = (values: Bits) => values.map((v) => v.toString(16)).join(' ');

type Oracle = (a: bigint, b: bigint, c: bigint) => bigint;

/** Integer oracles see values signed or unsigned as the type says; results are cut to the output's bits. */
const integerCases = (bits: 16 | 32 | 64): Record<string, Oracle> => {
  const [s, u, b] = [`s${bits}`, `u${bits}`, `b${bits}`];
  const n = BigInt(bits);
  const abs = (x: bigint) => (x < 0n ? -x : x);
  const wide: Record<string, Oracle> =
    bits === 64
      ? {}
      : {
          [`mul.wide.${s}`]: (x, y) => x * y,
          [`mul.wide.${u}`]: (x, y) => x * y,
          [`mad.wide.${s}`]: (x, y, z) => x * y + z,
          [`mad.wide.${u}`]: (x, y, z) => x * y + z,
        };
  return {
    [`add.${s}`]: (x, y) => x + y,
    [`sub.${s}`]: (x, y) => x - y,
    [`mul.lo.${s}`]: (x, y) => x * y,
    [`mul.hi.${s}`]: (x, y) => (x * y) >> n,
    [`mul.hi.${u}`]: (x, y) => (x * y) >> n,
    [`mad.lo.${s}`]: (x, y, z) => x * y + z,
    [`div.${s}`]: (x, y) => (y === 0n ? -1n : x / y),
    [`div.${u}`]: (x, y) => (y === 0n ? -1n : x / y),
    [`rem.${s}`]: (x, y) => (y === 0n ? -1n : x % y),
    [`rem.${u}`]: (x, y) => (y === 0n ? -1n : x % y),
    [`min.${s}`]: (x, y) => (x < y ? x : y),
    [`min.${u}`]: (x, y) => (x < y ? x : y),
    [`max.${s}`]: (x, y) => (x > y ? x : y),
    [`max.${u}`]: (x, y) => (x > y ? x : y),
    [`and.${b}`]: (x, y) => x & y,
    [`or.${b}`]: (x, y) => x | y,
    [`xor.${b}`]: (x, y) => x ^ y,
    [`neg.${s}`]: (x) => -x,
    [`abs.${s}`]: (x) => abs(x),
    [`not.${b}`]: (x) => ~x,
    ...wide,
  };
};

for (const bits of [16, 32, 64] as const) {
  test(`integer instructions of ${bits} bits`, (t) => {
    const [x, y] = integerPairs(bits);
    const z = y.map((v, i) => v ^ x[(i * 7) % x.length]);
    for (const [name, oracle] of Object.entries(integerCases(bits))) {
      const type = name.split('.').at(-1)!;
      const isWide = name.includes('wide');
      const out = isWide ? `u${bits * 2}` : type;
      const arity = oracle.length;
      const operands = ['%a', '%b', '%c'].slice(0, arity).join(', ');
      const types = [type, type, isWide ? out : type].slice(0, arity);
      const got = run(`${name} %d, ${operands};`, out, types, [x, y, z].slice(0, arity));
      const see = (v: bigint, as: string) =>
        as[0] === 's' ? BigInt.asIntN(bits, v) : BigInt.asUintN(isWide ? bits * 2 : bits, v);
      const cut = (v: bigint) => BigInt.asUintN(isWide ? bits * 2 : bits, v);
      const want = x.map((v, i) =>
        cut(oracle(see(v, type), see(y[i], type), isWide ? z[i] : see(z[i], type))),
      );
      // A quotient by zero is not defined, and JavaScript's remainder of the least number by -1 is.
      const same = got.every((v, i) => v === want[i] || (/div|rem/.test(name) && y[i] === 0n));
      t.ok(same, same ? name : `${name}: ${hex(got.slice(0, 8))} for ${hex(want.slice(0, 8))}`);
    }
    t.end();
  });

  test(`shifts and comparisons of ${bits} bits`, (t) => {
    const [x] = integerPairs(bits);
    const n = BigInt(bits);
    const counts = x.map((_, i) => BigInt(i % (bits + 5)));
    const signed = (v: bigint) => BigInt.asIntN(bits, v);
    const shifts: Record<string, Oracle> = {
      [`shl.b${bits}`]: (v, k) => (k >= n ? 0n : v << k),
      [`shr.u${bits}`]: (v, k) => (k >= n ? 0n : v >> k),
      [`shr.s${bits}`]: (v, k) => signed(v) >> (k >= n ? n - 1n : k),
    };
    for (const [name, oracle] of Object.entries(shifts)) {
      const want = x.map((v, i) => BigInt.asUintN(bits, oracle(v, counts[i], 0n)));
      t.same(
        run(`${name} %d, %a, %b;`, `u${bits}`, [`u${bits}`, 'u32'], [x, counts]),
        want,
        `${name} by a register`,
      );
      for (const k of [0, 1, 15, 16, 31, 32, 33, 63].filter((k) => k < bits)) {
        const fixed = x.map((v) => BigInt.asUintN(bits, oracle(v, BigInt(k), 0n)));
        t.same(run(`${name} %d, %a, ${k};`, `u${bits}`, [`u${bits}`], [x]), fixed, `${name} by ${k}`);
      }
    }
    const [a, b] = integerPairs(bits);
    const tests: Record<string, (p: bigint, q: bigint) => boolean> = {
      ...{ eq: (p, q) => p === q, ne: (p, q) => p !== q, lt: (p, q) => p < q },
      ...{ le: (p, q) => p <= q, gt: (p, q) => p > q, ge: (p, q) => p >= q },
    };
    for (const [how, holds] of Object.entries(tests)) {
      for (const sign of ['s', 'u']) {
        const body = `setp.${how}.${sign}${bits} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;`;
        const see = (v: bigint) => (sign === 's' ? signed(v) : v);
        const want = a.map((v, i) => (holds(see(v), see(b[i])) ? 1n : 0n));
        t.same(run(body, 'u32', [`u${bits}`, `u${bits}`], [a, b]), want, `setp.${how}.${sign}${bits}`);
      }
    }
    t.end();
  });
}

test('a true predicate may be written -1', (t) => {
  const body =
    'mov.pred %p1, -1; not.pred %p2, %p1; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; add.s32 %d, %r1, %r2;';
  t.same(run(body, 'u32', ['u32'], [whole([0n])]), Array(32).fill(1n));
  t.end();
});

test('bit fields', (t) => {
  const [x, y] = integerPairs(32);
  const at = x.map((_, i) => BigInt((i * 5) % 37));
  const ones = (k: bigint) => (1n << k) - 1n;
  const bitsOf = (v: bigint) => v.toString(2).padStart(32, '0');
  const check = (body: string, inputs: Bits[], oracle: Oracle) => {
    const want = x.map((_, i) =>
      BigInt.asUintN(32, oracle(inputs[0][i], inputs[1]?.[i] ?? 0n, inputs[2]?.[i] ?? 0n)),
    );
    t.same(run(body, 'u32', Array(inputs.length).fill('u32'), inputs), want, body);
  };
  for (const length of [0n, 1n, 7n, 32n]) {
    check(`bfe.u32 %d, %a, %b, ${length};`, [x, at], (v, p) => (p > 31n ? 0n : (v >> p) & ones(length)));
    check(`bfe.s32 %d, %a, %b, ${length};`, [x, at], (v, p) => {
      // Bits above the top are copies of it.
      const extended = BigInt.asIntN(32, v) >> (p > 31n ? 31n : p);
      return length === 0n ? 0n : BigInt.asIntN(Number(length), extended);
    });
    check(`bfi.b32 %d, %a, %b, %c, ${length};`, [x, y, at], (v, w, p) =>
      p > 31n ? w : (w & ~(ones(length) << p)) | ((v & ones(length)) << p),
    );
  }
  check('popc.b32 %d, %a;', [x], (v) => BigInt(bitsOf(v).replaceAll('0', '').length));
  check('clz.b32 %d, %a;', [x], (v) => BigInt(`${bitsOf(v)}1`.indexOf('1')));
  check('brev.b32 %d, %a;', [x], (v) => BigInt(`0b${[...bitsOf(v)].reverse().join('')}`));
  check('bfind.u32 %d, %a;', [x], (v) => BigInt(v.toString(2).length - 1) - (v === 0n ? 1n : 0n));
  check('prmt.b32 %d, %a, %b, %c;', [x, y, x.map((_, i) => BigInt((i * 40503) & 0xffff))], (v, w, sel) => {
    const bytes = v | (w << 32n);
    let out = 0n;
    for (let k = 0n; k < 4n; k++) {
      const pick = (sel >> (4n * k)) & 15n;
      const byte = (bytes >> (8n * (pick & 7n))) & 255n;
      out |= (pick & 8n ? (byte & 128n ? 255n : 0n) : byte) << (8n * k);
    }
    return out;
  });
  check('lop3.b32 %d, %a, %b, %c, 0xCA;', [x, y, at], (p, q, r) => (p & q) | (~p & r));
  check('lop3.b32 %d, %a, %b, %c, 0x96;', [x, y, at], (p, q, r) => p ^ q ^ r);
  check('shf.l.wrap.b32 %d, %a, %b, %c;', [x, y, at], (lo, hi, k) => ((hi << 32n) | lo) >> (32n - (k & 31n)));
  check(
    'shf.r.clamp.b32 %d, %a, %b, %c;',
    [x, y, at],
    (lo, hi, k) => ((hi << 32n) | lo) >> (k > 32n ? 32n : k),
  );
  t.end();
});

// Floats

const sameFloat = (p: number, q: number) => Object.is(p, q) || (Number.isNaN(p) && Number.isNaN(q));

/** An exact zero sum of unlike signs is -0 when rounding down. */
const zeroSum = (p: number, q: number, sum: number, mode: RoundingMode) =>
  mode === 'rm' && p === -q && Number.isFinite(p) && !(Object.is(p, 0) && Object.is(q, 0)) ? -0 : sum;

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
    if (Number.isNaN(v)) return 0n;
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
      // A NaN becomes 0, but for s64 and u64 PTX leaves another value: those are not compared.
      const want = x.map((v) => BigInt.asUintN(type.endsWith('64') ? 64 : 32, clamp(v, low, high, rounded)));
      t.same(fails(got, want), [], `cvt.${how}.${type}.f32`);
    }
  }
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

// Across lanes

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

test('an instruction that the virtual GPU does not know is named', (t) => {
  t.throws(
    () => run('frobnicate.b32 %d, %a;', 'u32', ['u32'], [whole([1n])]),
    /does not know "frobnicate\.b32 %d, %a"/,
  );
  t.end();
});
