// Floating-point instructions and conversions as JavaScript. Everything but the approximations (ex2, lg2, sin, cos,
// tanh, rsqrt and .approx division) is exact; those are computed in float64 and rounded once, well inside PTX's bounds.
import type { Emitter } from './emit.ts';
import { unsigned } from './emit.ts';
import type { Instruction, Operand } from './ptx.ts';
import { isSigned, isWide, sizeOf } from './ptx.ts';

type Emit = (e: Emitter, i: Instruction, type: string) => void;

const roundings = new Set(['rn', 'rz', 'rm', 'rp', 'rni', 'rzi', 'rmi', 'rpi', 'rna']);
const rounding = (i: Instruction): string | undefined => i.modifiers.find((word) => roundings.has(word));

/** Reads an operand of a float type as a JavaScript number; .ftz flushes it. */
function read(e: Emitter, i: Instruction, x: Operand, type: string): string {
  if (type === 'f64') return e.double(x);
  if (type === 'f16') return `num.fromF16(${e.int(x)})`;
  if (type === 'bf16') return `num.fromBf16(${e.int(x)})`;
  return i.modifiers.includes('ftz') ? `num.flush(${e.float(x)})` : e.float(x);
}

/** Stores a float64 expression, rounded once to the type, flushed and saturated as the instruction says. */
function write(e: Emitter, i: Instruction, target: Operand, type: string, value: string): void {
  const limited = i.modifiers.includes('sat') ? `num.saturate(${value})` : value;
  if (type === 'f64') {
    e.setDouble(target, limited);
    return;
  }
  if (type === 'f16') {
    e.setInt(target, `num.toF16(${limited})`);
    return;
  }
  if (type === 'bf16') {
    e.setInt(target, `num.toBf16(${limited})`);
    return;
  }
  const mode = rounding(i);
  const rounded =
    mode && /^r[zmp]$/.test(mode) ? `num.roundFloat(${limited},'${mode}')` : `fround(${limited})`;
  e.setFloat(target, i.modifiers.includes('ftz') ? `num.flush(${rounded})` : rounded);
}

/** `f` over float64 numbers; packed types take it half by half. */
const binary =
  (f: (x: string, y: string) => string): Emit =>
  (e, i, type) => {
    const [d, a, b] = i.operands;
    if (type.endsWith('x2')) {
      const pairwise = type === 'f16x2' ? 'num.pairwiseF16' : 'num.pairwiseBf16';
      return e.setInt(d, `${pairwise}((x,y)=>${f('x', 'y')},${e.int(a)},${e.int(b)})`);
    }
    write(e, i, d, type, f(read(e, i, a, type), read(e, i, b, type)));
  };

/** min and max give the number beside a NaN, but with .NaN the NaN. */
const extreme =
  (name: 'min' | 'max'): Emit =>
  (e, i, type) => {
    if (i.modifiers.includes('xorsign')) e.unsupported(i);
    const own = name === 'min' ? 'num.floatMin' : 'num.floatMax';
    const call = i.modifiers.includes('NaN') ? `Math.${name}` : own;
    binary((x, y) => `${call}(${x},${y})`)(e, i, type);
  };

const unary =
  (f: (x: string) => string): Emit =>
  (e, i, type) => {
    const [d, a] = i.operands;
    if (type.endsWith('x2')) return e.unsupported(i);
    write(e, i, d, type, f(read(e, i, a, type)));
  };

/** neg and abs of 16-bit floats touch the sign bits alone. */
const signBits =
  (f: (x: string) => string, bits: (x: string, mask: string) => string): Emit =>
  (e, i, type) => {
    const [d, a] = i.operands;
    if (type.endsWith('x2')) e.setInt(d, bits(e.int(a), '-2147450880'));
    else if (type === 'f16' || type === 'bf16') e.setInt(d, `${bits(e.int(a), '32768')}&65535`);
    else write(e, i, d, type, f(read(e, i, a, type)));
  };

const fma: Emit = (e, i, type) => {
  const [d, a, b, c] = i.operands;
  const mode = rounding(i);
  if (type === 'f64') return e.setDouble(d, `num.fma64(${e.double(a)},${e.double(b)},${e.double(c)})`);
  if (type === 'f16' || type === 'bf16') {
    return e.setInt(d, `num.fma${type === 'f16' ? 'F16' : 'Bf16'}(${e.int(a)},${e.int(b)},${e.int(c)})`);
  }
  if (type.endsWith('x2')) {
    const f = `num.fma${type === 'f16x2' ? 'F16' : 'Bf16'}`;
    const [x, y, z] = [e.int(a), e.int(b), e.int(c)];
    const low = `${f}(${x}&65535,${y}&65535,${z}&65535)`;
    return e.setInt(d, `${low}|(${f}(${x}>>>16,${y}>>>16,${z}>>>16)<<16)`);
  }
  const [x, y, z] = [read(e, i, a, type), read(e, i, b, type), read(e, i, c, type)];
  if (mode === 'rn' && i.modifiers.length === 2) {
    // The commonest float instruction, spelled out: as a call its result would be boxed.
    e.line(`{const z=${z},p=${x}*${y},s=p+z;let v=fround(s);const t=s-v;`);
    e.line('if(t!==0&&fround(v+t+t)===v+t+t)v=num.addTie(p,z);');
    e.setFloat(d, 'v');
    return e.line('}');
  }
  const value =
    mode === 'rn' || !mode ? `num.fma(${x},${y},${z})` : `num.addRounded(${x}*${y},${z},'${mode}')`;
  const limited = i.modifiers.includes('sat') ? `num.saturate(${value})` : value;
  e.setFloat(d, i.modifiers.includes('ftz') ? `num.flush(${limited})` : limited);
};

/** add and sub: JavaScript's float64 sum is already rounded, which directed rounding must not see. */
const sum =
  (sign: '' | '-'): Emit =>
  (e, i, type) => {
    const [d, a, b] = i.operands;
    const mode = rounding(i);
    if (type !== 'f32' || !mode || mode === 'rn') return binary((x, y) => `${x}+${sign}${y}`)(e, i, type);
    const value = `num.addRounded(${read(e, i, a, type)},${sign}${read(e, i, b, type)},'${mode}')`;
    write(e, i, d, type, value);
  };

/** Opcode to emitter, for float operand types. */
export const floatInstructions: Readonly<Record<string, Emit>> = {
  add: sum(''),
  sub: sum('-'),
  mul: binary((x, y) => `${x}*${y}`),
  div: binary((x, y) => `${x}/${y}`),
  min: extreme('min'),
  max: extreme('max'),
  copysign: binary((x, y) => `num.copySign(${x},${y})`),
  fma,
  mad: fma,
  neg: signBits(
    (x) => `-${x}`,
    (x, mask) => `(${x}^${mask})`,
  ),
  abs: signBits(
    (x) => `Math.abs(${x})`,
    (x, mask) => `(${x}&~${mask})`,
  ),
  ex2: unary((x) => `Math.pow(2,${x})`),
  lg2: unary((x) => `Math.log2(${x})`),
  rcp: (e, i, type) => {
    const gross = type === 'f64' && i.modifiers.includes('approx');
    unary((x) => (gross ? `num.grossReciprocal(${x})` : `1/${x}`))(e, i, type);
  },
  sqrt: unary((x) => `Math.sqrt(${x})`),
  rsqrt: unary((x) => `1/Math.sqrt(${x})`),
  sin: unary((x) => `Math.sin(${x})`),
  cos: unary((x) => `Math.cos(${x})`),
  tanh: unary((x) => `Math.tanh(${x})`),
  testp: (e, i) => {
    const [d, a] = i.operands;
    const x = e.float(a);
    const tests: Record<string, string> = {
      finite: `Number.isFinite(${x})`,
      infinite: `(Math.abs(${x})===Infinity)`,
      number: `(${x}===${x})`,
      notanumber: `(${x}!==${x})`,
    };
    if (!tests[i.modifiers[0]]) e.unsupported(i);
    e.setPredicate(d, `(${tests[i.modifiers[0]]}?1:0)`);
  },
};

const floatTypes = new Set(['f16', 'bf16', 'f16x2', 'bf16x2', 'f32', 'f64', 'tf32']);
export const isFloat = (type: string): boolean => floatTypes.has(type);

/** cvt.{rounding}{.sat}.to.from: the last two types are the target's and the source's. */
export const convert: Emit = (e, i) => {
  const [to, from] = i.modifiers.filter((word) => sizeOf(word)).slice(-2);
  const [d, a, b] = i.operands;
  if (to.endsWith('x2')) return packPair(e, i, d, to, a, b);
  if (to === 'tf32') return e.setInt(d, `num.toTf32(${e.float(a)})`);
  if (isFloat(to)) return convertToFloat(e, i, d, to, a, from);
  if (isFloat(from)) return convertToInteger(e, i, d, to, a, from);
  const low = isWide(from) ? e.wide(a)[0] : e.int(a, from);
  if (!isWide(to)) return e.setInt(d, narrowTo(to, low));
  if (isWide(from)) e.setWide(d, ...e.wide(a));
  else e.setWide(d, low, isSigned(from) ? `${low}>>31` : '0');
};

function narrowTo(type: string, value: string): string {
  const bytes = sizeOf(type);
  if (bytes === 2) return `${value}&65535`;
  if (bytes === 1) return isSigned(type) ? `${value}<<24>>24` : `${value}&255`;
  return value;
}

/** cvt.rn.bf16x2.f32 d, a, b: a becomes the high half. */
function packPair(e: Emitter, i: Instruction, d: Operand, to: string, a: Operand, b: Operand): void {
  const relu = i.modifiers.includes('relu');
  const half = (x: Operand) => {
    const value = relu ? `num.floatMax(${e.float(x)},0)` : e.float(x);
    if (to === 'f16x2') return `num.toF16(${value})`;
    return rounding(i) === 'rz' ? `num.truncateBf16(${value})` : `num.toBf16(${value})`;
  };
  e.setInt(d, `(${half(a)}<<16)|${half(b)}`);
}

function convertToFloat(e: Emitter, i: Instruction, d: Operand, to: string, a: Operand, from: string): void {
  if (!isFloat(from)) {
    const value = isWide(from)
      ? `num.wideToNumber(${e.wide(a)},${isSigned(from)})`
      : isSigned(from)
        ? e.int(a, from)
        : unsigned(e.int(a, from));
    write(e, i, d, to, value);
    return;
  }
  let value = read(e, i, a, from);
  if (rounding(i)?.endsWith('i')) value = roundToInteger(i, value);
  if (to === 'bf16' && rounding(i) === 'rz') {
    e.setInt(d, `num.truncateBf16(${value})`);
    return;
  }
  write(e, i, d, to, i.modifiers.includes('relu') ? `num.floatMax(${value},0)` : value);
}

function convertToInteger(
  e: Emitter,
  i: Instruction,
  d: Operand,
  to: string,
  a: Operand,
  from: string,
): void {
  const value = roundToInteger(i, read(e, i, a, from));
  if (isWide(to)) e.setWideResult(d, `num.toWide(${value},${isSigned(to)})`);
  else if (from === 'f64') e.setInt(d, `num.fromF64(${value},num.to${to.toUpperCase()},${highestBits[to]})`);
  else e.setInt(d, `num.to${to.toUpperCase()}(${value})`);
}

/** The highest bit of an integer type, as a register holds it. */
const highestBits: Record<string, number> = {
  ...{ s32: -2147483648, u32: -2147483648, s16: 32768, u16: 32768, s8: -128, u8: 128 },
};

function roundToInteger(i: Instruction, value: string): string {
  switch (rounding(i)) {
    case 'rni':
      return `num.nearestEven(${value})`;
    case 'rmi':
      return `Math.floor(${value})`;
    case 'rpi':
      return `Math.ceil(${value})`;
    default:
      return `Math.trunc(${value})`;
  }
}
