// Integer, bit and predicate instructions as JavaScript.
import type { Emitter } from './emit.ts';
import { unsigned } from './emit.ts';
import type { Instruction, Operand } from './ptx.ts';
import { bytesOf, isSigned, isWide, typeOf } from './ptx.ts';

type Emit = (e: Emitter, i: Instruction, type: string) => void;

/** Stores a 16- or 32-bit result, keeping 16-bit registers within 0 to 65535. */
function setNarrow(e: Emitter, target: Operand, type: string, value: string): void {
  e.setInt(target, bytesOf(type) === 2 ? `(${value})&65535` : value);
}

/** `low` and `high` of x + y + carry. */
function addWide(e: Emitter, target: Operand, x: readonly string[], y: readonly string[]): void {
  e.line(`{const lo=(${x[0]}+${y[0]})|0,hi=(${x[1]}+${y[1]}+(${unsigned('lo')}<${unsigned(y[0])}?1:0))|0;`);
  e.setWide(target, 'lo', 'hi');
  e.line('}');
}

/** The low 64 bits of x * y, as two constants pl and ph in an open brace. */
function openProduct(e: Emitter, x: readonly string[], y: readonly string[]): void {
  e.line(`{const pl=Math.imul(${x[0]},${y[0]});`);
  e.line(`const ph=(num.mulHighU(${x[0]},${y[0]})+Math.imul(${x[1]},${y[0]})+Math.imul(${x[0]},${y[1]}))|0;`);
}

/** The 64 bits of a 32 x 32 product. */
function wideProduct(e: Emitter, [x, y]: readonly Operand[], type: string): readonly [string, string] {
  const [a, b] = [e.int(x), e.int(y)];
  const power = y.kind === 'integer' && y.low > 1 && (y.low & (y.low - 1)) === 0 ? 31 - Math.clz32(y.low) : 0;
  const s = isSigned(type);
  if (power) return [`${a}<<${power}`, s ? `${a}>>${32 - power}` : `(${a}>>>${32 - power})`];
  return [`Math.imul(${a},${b})`, `num.mulHigh${s ? 'S' : 'U'}(${a},${b})`];
}

const multiply: Emit = (e, i, type) => {
  const [d, a, b] = i.operands;
  const s = isSigned(type);
  const how = i.modifiers[0];
  if (how === 'wide' && bytesOf(type) === 2) e.setInt(d, `Math.imul(${e.int(a, type)},${e.int(b, type)})`);
  else if (how === 'wide') e.setWide(d, ...wideProduct(e, [a, b], type));
  else if (how === 'hi' && isWide(type)) e.setWideResult(d, `num.mulHigh64(${e.wide(a)},${e.wide(b)},${s})`);
  else if (how === 'hi' && bytesOf(type) === 2)
    setNarrow(e, d, type, `Math.imul(${e.int(a, type)},${e.int(b, type)})>>16`);
  else if (how === 'hi') e.setInt(d, `num.mulHigh${s ? 'S' : 'U'}(${e.int(a)},${e.int(b)})`);
  else if (isWide(type)) {
    openProduct(e, e.wide(a), e.wide(b));
    e.setWide(d, 'pl', 'ph');
    e.line('}');
  } else setNarrow(e, d, type, `Math.imul(${e.int(a, type)},${e.int(b, type)})`);
};

const multiplyAdd: Emit = (e, i, type) => {
  const [d, a, b, c] = i.operands;
  const how = i.modifiers[0];
  if (how === 'wide' && bytesOf(type) === 2) {
    e.setInt(d, `(Math.imul(${e.int(a, type)},${e.int(b, type)})+${e.int(c)})|0`);
  } else if (how === 'wide') {
    const [low, high] = wideProduct(e, [a, b], type);
    e.line(`{const pl=${low},ph=${high};`);
    addWide(e, d, ['pl', 'ph'], e.wide(c));
    e.line('}');
  } else if (how === 'hi' && !isWide(type)) {
    e.setInt(d, `(num.mulHigh${isSigned(type) ? 'S' : 'U'}(${e.int(a)},${e.int(b)})+${e.int(c)})|0`);
  } else if (how === 'hi') e.unsupported(i);
  else if (isWide(type)) {
    openProduct(e, e.wide(a), e.wide(b));
    addWide(e, d, ['pl', 'ph'], e.wide(c));
    e.line('}');
  } else setNarrow(e, d, type, `(Math.imul(${e.int(a, type)},${e.int(b, type)})+${e.int(c, type)})|0`);
};

const sum: Emit = (e, i, type) => {
  const [d, a, b] = i.operands;
  if (i.modifiers[0] === 'cc' || i.modifiers[0] === 'sat') e.unsupported(i);
  if (isWide(type)) addWide(e, d, e.wide(a), e.wide(b));
  else setNarrow(e, d, type, `(${e.int(a)}+${e.int(b)})|0`);
};

const difference: Emit = (e, i, type) => {
  const [d, a, b] = i.operands;
  if (i.modifiers[0] === 'cc' || i.modifiers[0] === 'sat') e.unsupported(i);
  if (!isWide(type)) return setNarrow(e, d, type, `(${e.int(a)}-${e.int(b)})|0`);
  const [x, y] = [e.wide(a), e.wide(b)];
  e.line(`{const lo=(${x[0]}-${y[0]})|0,hi=(${x[1]}-${y[1]}-(${unsigned(x[0])}<${unsigned(y[0])}?1:0))|0;`);
  e.setWide(d, 'lo', 'hi');
  e.line('}');
};

const quotient =
  (name: 'div' | 'rem'): Emit =>
  (e, i, type) => {
    const [d, a, b] = i.operands;
    const s = isSigned(type);
    if (isWide(type)) return e.setWideResult(d, `num.${name}64(${e.wide(a)},${e.wide(b)},${s})`);
    const [x, y] = [e.int(a, type), e.int(b, type)];
    setNarrow(e, d, type, s ? `num.${name}32(${x},${y})` : `num.${name}32(${unsigned(x)},${unsigned(y)})`);
  };

const extreme =
  (name: 'min' | 'max'): Emit =>
  (e, i, type) => {
    const [d, a, b] = i.operands;
    if (!isWide(type)) {
      const [x, y] = [e.int(a, type), e.int(b, type)];
      const value = isSigned(type)
        ? `Math.${name}(${x},${y})`
        : `Math.${name}(${unsigned(x)},${unsigned(y)})|0`;
      return setNarrow(e, d, type, value);
    }
    const [x, y] = [e.wide(a), e.wide(b)];
    const less = name === 'min' ? '<0' : '>0';
    e.line(`{const first=num.compare64(${x},${y},${isSigned(type)})${less};`);
    e.setWide(d, `first?${x[0]}:${y[0]}`, `first?${x[1]}:${y[1]}`);
    e.line('}');
  };

const bitwise =
  (operator: '&' | '|' | '^'): Emit =>
  (e, i, type) => {
    const [d, a, b] = i.operands;
    if (type === 'pred') return e.setPredicate(d, `${e.predicate(a)}${operator}${e.predicate(b)}`);
    if (!isWide(type)) return setNarrow(e, d, type, `${e.int(a)}${operator}${e.int(b)}`);
    const [x, y] = [e.wide(a), e.wide(b)];
    e.setWide(d, `${x[0]}${operator}${y[0]}`, `${x[1]}${operator}${y[1]}`);
  };

const negate: Emit = (e, i, type) => {
  const [d, a] = i.operands;
  if (!isWide(type)) return setNarrow(e, d, type, `(-${e.int(a, type)})|0`);
  const [low, high] = e.wide(a);
  e.setWide(d, `(-${low})|0`, `(~${high}+(${low}===0?1:0))|0`);
};

const absolute: Emit = (e, i, type) => {
  const [d, a] = i.operands;
  if (!isWide(type)) return setNarrow(e, d, type, `Math.abs(${e.int(a, type)})|0`);
  const [low, high] = e.wide(a);
  e.line(`{const neg=${high}<0;`);
  e.setWide(d, `neg?(-${low})|0:${low}`, `neg?(~${high}+(${low}===0?1:0))|0:${high}`);
  e.line('}');
};

const not: Emit = (e, i, type) => {
  const [d, a] = i.operands;
  if (type === 'pred') e.setPredicate(d, `1-${e.predicate(a)}`);
  else if (isWide(type)) {
    const [low, high] = e.wide(a);
    e.setWide(d, `~${low}`, `~${high}`);
  } else setNarrow(e, d, type, `~${e.int(a)}`);
};

const shiftLeft: Emit = (e, i, type) => {
  const [d, a, n] = i.operands;
  if (isWide(type)) {
    const [low, high] = e.wide(a);
    if (n.kind !== 'integer') return e.setWideResult(d, `num.shiftLeft64(${low},${high},${e.int(n)})`);
    const k = n.low;
    if (k === 0) e.setWide(d, low, high);
    else if (k < 32) e.setWide(d, `${low}<<${k}`, `(${high}<<${k})|(${low}>>>${32 - k})`);
    else e.setWide(d, '0', k < 64 ? `${low}<<${k - 32}` : '0');
  } else if (n.kind === 'integer') setNarrow(e, d, type, n.low >>> 0 > 31 ? '0' : `${e.int(a)}<<${n.low}`);
  else setNarrow(e, d, type, `(${unsigned(e.int(n))}>31?0:${e.int(a)}<<${e.int(n)})`);
};

const shiftRight: Emit = (e, i, type) => {
  const [d, a, n] = i.operands;
  const s = isSigned(type);
  if (isWide(type)) {
    const [low, high] = e.wide(a);
    if (n.kind !== 'integer' || n.low <= 0 || n.low >= 32) {
      return e.setWideResult(d, `num.shiftRight64(${low},${high},${e.int(n)},${s})`);
    }
    const k = n.low;
    return e.setWide(d, `(${low}>>>${k})|(${high}<<${32 - k})`, s ? `${high}>>${k}` : `(${high}>>>${k})|0`);
  }
  const x = e.int(a, type);
  if (n.kind === 'integer') {
    const k = n.low >>> 0;
    return setNarrow(e, d, type, s ? `${x}>>${Math.min(31, k)}` : k > 31 ? '0' : `(${x}>>>${k})|0`);
  }
  const k = e.int(n);
  setNarrow(e, d, type, s ? `${x}>>Math.min(31,${unsigned(k)})` : `(${unsigned(k)}>31?0:(${x}>>>${k})|0)`);
};

const select: Emit = (e, i, type) => {
  const [d, a, b, p] = i.operands;
  const choose = (x: string, y: string) => `${e.predicate(p)}?${x}:${y}`;
  if (type === 'f32') e.setFloat(d, choose(e.float(a), e.float(b)));
  else if (type === 'f64') e.setDouble(d, choose(e.double(a), e.double(b)));
  else if (isWide(type)) {
    const [x, y] = [e.wide(a), e.wide(b)];
    e.setWide(d, choose(x[0], y[0]), choose(x[1], y[1]));
  } else setNarrow(e, d, type, choose(e.int(a), e.int(b)));
};

const operators: Record<string, string> = {
  ...{ eq: '===', ne: '!==', lt: '<', le: '<=', gt: '>', ge: '>=', lo: '<', ls: '<=', hi: '>', hs: '>=' },
};

/** A comparison of two integers as a boolean expression. */
function integerComparison(e: Emitter, how: string, [a, b]: readonly Operand[], type: string): string {
  const operator = operators[how];
  const equality = how === 'eq' || how === 'ne';
  if (isWide(type)) {
    const [x, y] = [e.wide(a), e.wide(b)];
    if (how === 'eq') return `(${x[0]}===${y[0]}&&${x[1]}===${y[1]})`;
    if (how === 'ne') return `(${x[0]}!==${y[0]}||${x[1]}!==${y[1]})`;
    return `(num.compare64(${x},${y},${isSigned(type)})${operator}0)`;
  }
  const [x, y] = [e.int(a, type), e.int(b, type)];
  return isSigned(type) || equality ? `(${x}${operator}${y})` : `(${unsigned(x)}${operator}${unsigned(y)})`;
}

/** A comparison of two floats; the names ending in u are true for a NaN. */
function floatComparison(how: string, x: string, y: string): string {
  const unordered = `(${x}!==${x}||${y}!==${y})`;
  if (how === 'nan') return unordered;
  if (how === 'num') return `!${unordered}`;
  if (how === 'ne') return `(${x}<${y}||${x}>${y})`;
  if (operators[how]) return `(${x}${operators[how]}${y})`;
  return `(${x}${operators[how.slice(0, -1)]}${y}||${unordered})`;
}

function comparison(e: Emitter, i: Instruction, pair: readonly Operand[]): string {
  const type = typeOf(i);
  const how = i.modifiers[0];
  if (type === 'f32') return floatComparison(how, e.float(pair[0]), e.float(pair[1]));
  if (type === 'f64') return floatComparison(how, e.double(pair[0]), e.double(pair[1]));
  if (type === 'f16' || type === 'bf16') {
    const from = type === 'f16' ? 'num.fromF16' : 'num.fromBf16';
    return floatComparison(how, `${from}(${e.int(pair[0])})`, `${from}(${e.int(pair[1])})`);
  }
  return integerComparison(e, how, pair, type);
}

const setPredicate: Emit = (e, i) => {
  const [d, a, b, c] = i.operands;
  const joined = { and: '&', or: '|', xor: '^' }[i.modifiers[1]];
  const value = `(${comparison(e, i, [a, b])}?1:0)`;
  e.setPredicate(d, joined ? `${value}${joined}${e.predicate(c)}` : value);
};

const set: Emit = (e, i) => {
  const [d, a, b] = i.operands;
  const type = i.modifiers.find((word) => /^[usf]32$/.test(word));
  const truth = comparison(e, i, [a, b]);
  if (type === 'f32') e.setFloat(d, `(${truth}?1:0)`);
  else e.setInt(d, `(${truth}?-1:0)`);
};

const call3 =
  (name: string): Emit =>
  (e, i) =>
    e.setInt(i.operands[0], `num.${name}(${i.operands.slice(1).map((x) => e.int(x))})`);

const countOf =
  (name: string): Emit =>
  (e, i, type) => {
    const [d, a] = i.operands;
    if (!isWide(type)) return e.setInt(d, `${name}(${e.int(a)})`);
    const [low, high] = e.wide(a);
    if (name === 'num.countBits') e.setInt(d, `num.countBits(${low})+num.countBits(${high})`);
    else e.setInt(d, `(${high}===0?32+Math.clz32(${low}):Math.clz32(${high}))`);
  };

const extractBits: Emit = (e, i, type) => {
  const [d, a, p, n] = i.operands;
  if (!isWide(type))
    return e.setInt(d, `num.extract${isSigned(type) ? 'S' : 'U'}(${e.int(a)},${e.int(p)},${e.int(n)})`);
  e.unsupported(i);
};

/** Opcode to emitter, for operand types that are integers, bits or predicates. */
export const integerInstructions: Readonly<Record<string, Emit>> = {
  add: sum,
  sub: difference,
  mul: multiply,
  mad: multiplyAdd,
  mul24: (e, i) => e.setInt(i.operands[0], `Math.imul(${e.int(i.operands[1])},${e.int(i.operands[2])})`),
  div: quotient('div'),
  rem: quotient('rem'),
  min: extreme('min'),
  max: extreme('max'),
  neg: negate,
  abs: absolute,
  and: bitwise('&'),
  or: bitwise('|'),
  xor: bitwise('^'),
  not,
  shl: shiftLeft,
  shr: shiftRight,
  shf: (e, i) => {
    const [d, a, b, n] = i.operands;
    const [direction, mode] = i.modifiers;
    e.setInt(d, `num.funnel(${direction === 'l'},${mode === 'wrap'},${e.int(a)},${e.int(b)},${e.int(n)})`);
  },
  bfi: call3('insertBits'),
  bfe: extractBits,
  prmt: call3('permute'),
  lop3: call3('logic3'),
  popc: countOf('num.countBits'),
  clz: countOf('Math.clz32'),
  brev: call3('reverseBits'),
  bfind: (e, i, type) => e.setInt(i.operands[0], `num.highestBit(${e.int(i.operands[1])},${isSigned(type)})`),
  selp: select,
  setp: setPredicate,
  set,
};
