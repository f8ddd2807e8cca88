// Micro-kernels of one arithmetic instruction each, over awkward operands: every variant that our kernels use.
import { bfloat16, exactRounding } from '../virtual-gpu/exact.ts';
import {
  type Bits,
  f32,
  floatTriples,
  halfBits,
  instructionPtx,
  integerPairs,
  random,
  runInstruction,
  whole,
} from '../virtual-gpu/instruction.ts';
import { type Agree, sameBits, ulps } from './agreement.ts';
import type { MicroKernel } from './micro.ts';

/** One instruction a thread: `body` leaves its result in %d. */
function lanes(
  group: string,
  name: string,
  body: string,
  [out, ...types]: readonly string[],
  inputs: readonly Bits[],
  agree: Agree,
): MicroKernel {
  return {
    group,
    name,
    ptx: instructionPtx(body, out, types),
    run: (bench) => runInstruction(bench, body, out, types, inputs),
    agree,
  };
}

const operands = (count: number) => ['%a', '%b', '%c'].slice(0, count).join(', ');
const bitsType = (out: string) => `u${out.slice(-2)}` as 'u16' | 'u32' | 'u64';

const pairs = { 16: integerPairs(16), 32: integerPairs(32), 64: integerPairs(64) };
/** Where a zero divisor, or the one quotient that overflows, would leave the result to the machine. */
const divisors = pairs[32][1].map((v, i) => (v === 0n || (v === 0xffffffffn && i % 2) ? 3n : v));
const dividends = pairs[32][0].map((v, i) => (v === 0x80000000n && divisors[i] === 0xffffffffn ? 5n : v));

function integers(): MicroKernel[] {
  const [x, y] = pairs[32];
  const z = y.map((v, i) => v ^ x[(i * 7) % x.length]);
  const counts = x.map((_, i) => BigInt(i % 37));
  const of = (name: string, arity: number, inputs: readonly Bits[] = [x, y, z], out = 'u32') =>
    lanes(
      'integer',
      name,
      `${name} %d, ${operands(arity)};`,
      [out, ...Array(arity).fill('u32')],
      inputs.slice(0, arity),
      sameBits(bitsType(out)),
    );
  /** Those whose text is more than name and operands. */
  const spelled = (name: string, body: string, inputs: readonly Bits[]) =>
    lanes('integer', name, body, Array(1 + inputs.length).fill('u32'), inputs, sameBits('u32'));
  const binary =
    'add.s32 sub.s32 mul.lo.s32 mul.hi.s32 mul.hi.u32 min.s32 max.s32 min.u32 max.u32 and.b32 or.b32 xor.b32';
  const unary = 'not.b32 neg.s32 abs.s32 clz.b32 brev.b32 popc.b32';
  return [
    ...binary.split(' ').map((name) => of(name, 2)),
    ...unary.split(' ').map((name) => of(name, 1)),
    ...['mad.lo.s32', 'prmt.b32'].map((name) => of(name, 3)),
    ...['div.s32', 'div.u32', 'rem.s32', 'rem.u32'].map((name) => of(name, 2, [dividends, divisors])),
    ...['shl.b32', 'shr.u32', 'shr.s32'].map((name) => of(name, 2, [x, counts])),
    ...['mul.wide.s32', 'mul.wide.u32'].map((name) => of(name, 2, [x, y], 'u64')),
    spelled('bfi.b32', 'bfi.b32 %d, %a, %b, %c, 7;', [x, y, counts]),
    spelled('bfe.u32', 'bfe.u32 %d, %a, %b, 9;', [x, counts]),
    spelled('lop3.b32', 'lop3.b32 %d, %a, %b, %c, 0x96;', [x, y, z]),
    spelled('shf.l.wrap.b32', 'shf.l.wrap.b32 %d, %a, %b, %c;', [x, y, counts]),
  ];
}

function wideIntegers(): MicroKernel[] {
  const [x, y] = pairs[64];
  const [h, g] = pairs[16];
  const counts = x.map((_, i) => BigInt(i % 69));
  const sixtyFour = (name: string, arity: number, inputs: readonly Bits[] = [x, y]) => {
    const types = name.startsWith('sh') ? ['u64', 'u64', 'u32'] : ['u64', ...Array(arity).fill('u64')];
    return lanes(
      'integer',
      name,
      `${name} %d, ${operands(arity)};`,
      types,
      inputs.slice(0, arity),
      sameBits('u64'),
    );
  };
  return [
    ...'add.s64 add.u64 sub.s64 mul.lo.s64 and.b64 or.b64 xor.b64'
      .split(' ')
      .map((name) => sixtyFour(name, 2)),
    // A zero divisor is left to the machine, and so is the one quotient that overflows.
    sixtyFour('div.s64', 2, [x.map((v) => v >> 1n), y.map((v) => v || 3n)]),
    ...['shl.b64', 'shr.u64', 'shr.s64'].map((name) => sixtyFour(name, 2, [x, counts])),
    lanes(
      'integer',
      'mul.wide.u16',
      'mul.wide.u16 %d, %a, %b;',
      ['u32', 'u16', 'u16'],
      [h, g],
      sameBits('u32'),
    ),
    ...['and.b16', 'add.s16'].map((name) =>
      lanes('integer', name, `${name} %d, %a, %b;`, ['u16', 'u16', 'u16'], [h, g], sameBits('u16')),
    ),
  ];
}

/** Comparisons, selections and predicate logic: each leaves a number that tells the predicate. */
function predicates(): MicroKernel[] {
  const [x, y] = pairs[32];
  const floats = floatTriples().map((v) => v.map(f32));
  const chosen = 'selp.u32 %d, 1, 0, %p1;';
  const compare = (name: string, type: string, inputs: readonly Bits[]) =>
    lanes('predicate', name, `${name} %p1, %a, %b; ${chosen}`, ['u32', type, type], inputs, sameBits('u32'));
  const logic = (name: string, text: string) => {
    const body = `setp.lt.s32 %p1, %a, %b; setp.lt.u32 %p2, %a, %b; ${text} ${chosen}`;
    return lanes('predicate', name, body, ['u32', 'u32', 'u32'], [x, y], sameBits('u32'));
  };
  const [doubles] = doubleTriples();
  const select = (type: string, register: string, values: Bits) => {
    const body = `setp.gt.u32 %p1, %i, 40; selp.${type} %d, %a, %b, %p1;`;
    const types = Array(3).fill(register);
    return lanes(
      'predicate',
      `selp.${type}`,
      body,
      types,
      [values, values.slice().reverse()],
      sameBits(bitsType(register)),
    );
  };
  return [
    ...'lt ge gt eq ne le'.split(' ').map((how) => compare(`setp.${how}.s32`, 'u32', [x, y])),
    ...'lt ge gt le'.split(' ').map((how) => compare(`setp.${how}.u32`, 'u32', [x, y])),
    compare('setp.eq.b32', 'u32', [x, y]),
    compare('setp.ne.b32', 'u32', [x, y]),
    ...'eq.s64 ne.s64 lt.s64 eq.b64 ge.u64'.split(' ').map((how) => compare(`setp.${how}`, 'u64', pairs[64])),
    ...['eq.s16', 'ne.s16'].map((how) => compare(`setp.${how}`, 'u16', pairs[16])),
    ...'lt le gt ge eq neu ltu leu gtu geu nan num'
      .split(' ')
      .map((how) => compare(`setp.${how}.f32`, 'f32', floats.slice(0, 2))),
    ...['neu.f64', 'lt.f64', 'gtu.f64'].map((how) =>
      compare(`setp.${how}`, 'f64', [
        doubles,
        doubles.map((v, i) => (i % 3 ? doubles[(i * 5) % doubles.length] : v)),
      ]),
    ),
    logic('and.pred', 'and.pred %p1, %p1, %p2;'),
    logic('or.pred', 'or.pred %p1, %p1, %p2;'),
    logic('xor.pred', 'xor.pred %p1, %p1, %p2;'),
    logic('not.pred', 'not.pred %p1, %p2;'),
    logic('mov.pred', 'mov.pred %p1, -1; @%p2 mov.pred %p1, 0;'),
    ...[
      ['u16', 'u16', pairs[16][0]],
      ['s16', 'u16', pairs[16][0]],
      ['b16', 'u16', pairs[16][0]],
      ['b32', 'u32', x],
      ['b64', 'u64', pairs[64][0]],
      ['f32', 'f32', floats[0]],
      ['f64', 'f64', doubles],
    ].map(([type, register, values]) => select(type as string, register as string, values as Bits)),
  ];
}

/** float32's awkward numbers as doubles, and doubles of all their bits near them. */
function doubleTriples(): Bits[] {
  const bits = (x: number) => new BigUint64Array(Float64Array.of(x).buffer)[0];
  return floatTriples().map((values) =>
    values.map((x, i) => (i % 2 && Number.isFinite(x) ? bits(x) ^ (random(32) & 0xfffffffn) : bits(x))),
  );
}

function floats(): MicroKernel[] {
  const single = floatTriples().map((v) => v.map(f32));
  const double = doubleTriples();
  const of = (name: string, arity: number) => {
    const type = name.slice(-3) as 'f32' | 'f64';
    const inputs = (type === 'f32' ? single : double).slice(0, arity);
    return lanes(
      'float',
      name,
      `${name} %d, ${operands(arity)};`,
      Array(arity + 1).fill(type),
      inputs,
      sameBits(type),
    );
  };
  const list = (names: string, arity: number) => names.split(' ').map((name) => of(name, arity));
  return [
    ...list(
      'add.f32 sub.f32 sub.rn.f32 mul.f32 mul.rn.f32 add.rn.f32 div.rn.f32 min.f32 max.f32 copysign.f32',
      2,
    ),
    ...list('fma.rn.f32 fma.rm.f32 fma.rz.f32', 3),
    ...list('neg.f32 abs.f32 rcp.rn.f32 sqrt.rn.f32', 1),
    ...list('add.f64 add.rn.f64 sub.f64 mul.f64 mul.rn.f64 div.rn.f64 max.f64', 2),
    ...list('fma.rn.f64', 3),
    ...list('neg.f64 abs.f64 rcp.rn.f64 sqrt.rn.f64', 1),
  ];
}

function conversions(): MicroKernel[] {
  const single = floatTriples()[0].map(f32);
  const [double] = doubleTriples();
  const small = floatTriples()[0].map(
    (x) => new BigUint64Array(Float64Array.of(Math.max(-1e15, Math.min(1e15, x || 0))).buffer)[0],
  );
  const half = whole(Array.from({ length: 512 }, (_, i) => BigInt(i * 128 + (i % 128))));
  const [i16, i32, i64] = [pairs[16][0], pairs[32][0], pairs[64][0]];
  const table: readonly (readonly [name: string, out: string, type: string, inputs: Bits])[] = [
    ['cvt.s64.s32', 'u64', 'u32', i32],
    ['cvt.u64.u32', 'u64', 'u32', i32],
    ['cvt.u32.u64', 'u32', 'u64', i64],
    ['cvt.u32.u16', 'u32', 'u16', i16],
    ['cvt.s32.s16', 'u32', 'u16', i16],
    ['cvt.u16.u32', 'u16', 'u32', i32],
    ['cvt.f32.f16', 'f32', 'u16', half],
    ['cvt.rn.f16.f32', 'f16', 'f32', single],
    ['cvt.rn.bf16.f32', 'bf16', 'f32', single],
    ['cvt.sat.f32.f32', 'f32', 'f32', single],
    ['cvt.rzi.f32.f32', 'f32', 'f32', single],
    ['cvt.rni.f32.f32', 'f32', 'f32', single],
    ['cvt.rmi.f32.f32', 'f32', 'f32', single],
    ['cvt.rzi.s32.f32', 'u32', 'f32', single],
    ['cvt.rzi.u32.f32', 'u32', 'f32', single],
    ['cvt.rni.s32.f32', 'u32', 'f32', single],
    ['cvt.f64.f32', 'f64', 'f32', single],
    ['cvt.rn.f32.s32', 'f32', 'u32', i32],
    ['cvt.rn.f32.u32', 'f32', 'u32', i32],
    ['cvt.rn.f32.f64', 'f32', 'f64', double],
    ['cvt.rn.f64.s32', 'f64', 'u32', i32],
    ['cvt.rn.f64.u32', 'f64', 'u32', i32],
    ['cvt.rni.f64.f64', 'f64', 'f64', double],
    ['cvt.rzi.f64.f64', 'f64', 'f64', double],
    ['cvt.rzi.s64.f64', 'u64', 'f64', small],
  ];
  // 16-bit floats live in .b16 registers.
  const register = (type: string) => (type === 'f16' || type === 'bf16' ? 'u16' : type);
  const pair = (name: 'f16' | 'bf16') => {
    const inputs = [single, single.slice().reverse()];
    const body = `cvt.rn.${name}x2.f32 %d, %a, %b;`;
    return lanes('convert', `cvt.rn.${name}x2.f32`, body, ['u32', 'f32', 'f32'], inputs, sameBits(name));
  };
  return [
    ...table.map(([name, out, type, inputs]) =>
      lanes('convert', name, `${name} %d, %a;`, [register(out), type], [inputs], sameBits(out as 'u32')),
    ),
    pair('bf16'),
    pair('f16'),
  ];
}

/** Two numbers a register. */
function packedHalves(): MicroKernel[] {
  const bits = floatTriples().map((v) => v.map((x) => halfBits(exactRounding(x, bfloat16), bfloat16)));
  const both = bits.map((v) => v.map((b, i) => (v[v.length - 1 - i] << 16n) | b));
  return (['fma.rn.bf16x2', 'max.bf16x2', 'neg.bf16x2', 'abs.bf16x2'] as const).map((name) => {
    const arity = { fma: 3, max: 2, neg: 1, abs: 1 }[name.slice(0, 3)] as number;
    return lanes(
      'packed half',
      name,
      `${name} %d, ${operands(arity)};`,
      Array(arity + 1).fill('u32'),
      both.slice(0, arity),
      sameBits('bf16'),
    );
  });
}

/** Approximations: the bounds are the PTX ISA's, on both sides of the exact value. */
function approximations(): MicroKernel[] {
  const x = Array.from({ length: 512 }, (_, i) => f32(Math.fround((i - 256) / 9 + 0.01)));
  const positive = Array.from({ length: 512 }, (_, i) => f32(Math.fround(1.07 ** (i - 256))));
  const double = floatTriples()[0].map(
    (v) => new BigUint64Array(Float64Array.of(Number.isFinite(v) && v ? v : 3).buffer)[0],
  );
  const of = (name: string, inputs: Bits, agree: Agree, type = 'f32') =>
    lanes('approximation', name, `${name} %d, %a;`, [type, type], [inputs], agree);
  return [
    of('ex2.approx.ftz.f32', x, ulps('f32', 3)),
    of('ex2.approx.f32', x, ulps('f32', 3)),
    of('lg2.approx.f32', positive, ulps('f32', 64)),
    of('lg2.approx.ftz.f32', positive, ulps('f32', 64)),
    of('rcp.approx.ftz.f32', x, ulps('f32', 2)),
    lanes(
      'approximation',
      'div.approx.f32',
      'div.approx.f32 %d, %a, %b;',
      ['f32', 'f32', 'f32'],
      [x, positive],
      ulps('f32', 4),
    ),
    of('rsqrt.approx.f32', positive, ulps('f32', 3)),
    of('rsqrt.approx.ftz.f32', positive, ulps('f32', 3)),
    of('sqrt.approx.f32', positive, ulps('f32', 4)),
    of('sqrt.approx.ftz.f32', positive, ulps('f32', 4)),
    // Relative 2^-11.
    of('tanh.approx.f32', x, ulps('f32', 2 ** 13)),
    // The upper 20 bits of the fraction.
    of('rcp.approx.ftz.f64', double, ulps('f64', 2 ** 34), 'f64'),
  ];
}

export const arithmeticKernels = (): MicroKernel[] => [
  ...integers(),
  ...wideIntegers(),
  ...predicates(),
  ...floats(),
  ...conversions(),
  ...packedHalves(),
  ...approximations(),
];
