// The code generator's common ground: PTX operands as JavaScript expressions, and assignments to PTX registers.
// In generated code a 32-bit integer is an int32 number, a 16-bit one a number from 0 to 65535, a float a float64 that
// is always rounded to float32, a 64-bit integer two int32 halves `r7l` and `r7h`, a predicate 0 or 1.
import type { Instruction, Operand, Register } from './ptx.ts';
import { isWide } from './ptx.ts';

/** High words of the four windows of the generic address space; global addresses are always in theirs. */
export const windows = { global: 0x7f40, shared: 0x7f20, local: 0x7f10, param: 0x7f08 } as const;

/** Where a symbol lies: its state space and its offset there. */
export type Locate = (name: string) => { readonly space: keyof typeof windows; readonly offset: number };

export interface Emitter {
  /** Statements of the block so far. */
  readonly lines: string[];
  /** Every register that the block names. */
  readonly touched: Set<Register>;
  readonly locate: Locate;
  line(text: string): void;
  /** An int32 expression, sign- or zero-extended from `type` where that is narrower. */
  int(x: Operand, type?: string): string;
  float(x: Operand): string;
  double(x: Operand): string;
  wide(x: Operand): readonly [low: string, high: string];
  predicate(x: Operand): string;
  setInt(target: Operand, value: string): void;
  setFloat(target: Operand, value: string): void;
  setDouble(target: Operand, value: string): void;
  setWide(target: Operand, low: string, high: string): void;
  /** Takes the halves that a helper left in num.result. */
  setWideResult(target: Operand, call: string): void;
  /** Sets `p` or `p|q` (q the complement) from a 0/1 or boolean expression. */
  setPredicate(target: Operand, value: string): void;
  unsupported(i: Instruction): never;
}

export const variable = (r: Register): string => `r${r.id}`;
export const unsigned = (expression: string): string => `(${expression}>>>0)`;

export function newEmitter(locate: Locate): Emitter {
  const lines: string[] = [];
  const touched = new Set<Register>();
  const name = (r: Register): string => {
    touched.add(r);
    return variable(r);
  };
  const refuse = (what: string, x: Operand): never => {
    throw new Error(
      `ptx: no ${what} in operand ${JSON.stringify(x, (_, v) => (typeof v === 'bigint' ? `${v}` : v))}`,
    );
  };

  const bits = (x: Operand): string => {
    switch (x.kind) {
      case 'register':
        return x.type === 'f32' ? `num.bitsOfFloat(${name(x)})` : isWide(x.type) ? `${name(x)}l` : name(x);
      case 'integer':
        return String(x.low);
      case 'float':
        return String(x.bits);
      case 'negated':
        return `(-${bits(x.operand)}|0)`;
      case 'special':
        return special(x.name);
      case 'symbol':
        return String(locate(x.name).offset);
      default:
        return refuse('integer', x);
    }
  };
  const int = (x: Operand, type = 'b32'): string => {
    if (x.kind === 'integer' && type.endsWith('16')) {
      return String(type === 's16' ? (x.low << 16) >> 16 : x.low & 0xffff);
    }
    const value = bits(x);
    switch (type) {
      case 's16':
        return `(${value}<<16>>16)`;
      case 's8':
        return `(${value}<<24>>24)`;
      case 'u8':
      case 'b8':
        return `(${value}&255)`;
      default:
        return value;
    }
  };
  const float = (x: Operand): string => {
    switch (x.kind) {
      case 'register':
        return x.type === 'f32' ? name(x) : `num.floatOfBits(${bits(x)})`;
      case 'float':
        return Object.is(x.value, -0) ? '-0' : Number.isNaN(x.value) ? 'NaN' : `${x.value}`;
      case 'negated':
        return `(-${float(x.operand)})`;
      case 'integer':
        return `num.floatOfBits(${x.low})`;
      default:
        return refuse('float', x);
    }
  };
  const double = (x: Operand): string => {
    if (x.kind === 'register') {
      return x.type === 'f64' ? name(x) : `num.doubleOfBits(${name(x)}l,${name(x)}h)`;
    }
    return x.kind === 'float' ? (Object.is(x.value, -0) ? '-0' : `${x.value}`) : refuse('double', x);
  };
  const wide = (x: Operand): readonly [string, string] => {
    switch (x.kind) {
      case 'register':
        if (x.type === 'f64') return [`num.lowOfDouble(${name(x)})`, `num.highOfDouble(${name(x)})`];
        return isWide(x.type) ? [`${name(x)}l`, `${name(x)}h`] : [name(x), `(${name(x)}>>31)`];
      case 'integer':
        return [String(x.low), String(Number(BigInt.asIntN(32, x.value >> 32n)))];
      case 'symbol': {
        const { space, offset } = locate(x.name);
        const high = space === 'global' || space === 'param' ? windows[space] : 0;
        return [String(offset), String(high)];
      }
      case 'special':
        return [special(x.name), '0'];
      default:
        return refuse('64-bit integer', x);
    }
  };
  const predicate = (x: Operand): string => {
    if (x.kind === 'not') return `(1-${predicate(x.operand)})`;
    return x.kind === 'register'
      ? name(x)
      : x.kind === 'integer'
        ? x.low
          ? '1'
          : '0'
        : refuse('predicate', x);
  };

  const line = (text: string) => {
    lines.push(text);
  };
  const emitter: Emitter = {
    ...{ lines, touched, locate, line, int, float, double, wide, predicate },
    setInt(target, value) {
      if (target.kind !== 'register') return void (target.kind === 'sink' || refuse('target', target));
      if (target.type === 'f32') line(`${name(target)}=num.floatOfBits(${value});`);
      else if (isWide(target.type)) line(`${name(target)}l=${value};${name(target)}h=0;`);
      else line(`${name(target)}=${value};`);
    },
    setFloat(target, value) {
      if (target.kind !== 'register') return void (target.kind === 'sink' || refuse('target', target));
      line(`${name(target)}=${target.type === 'f32' ? value : `num.bitsOfFloat(${value})`};`);
    },
    setDouble(target, value) {
      if (target.kind !== 'register') return void (target.kind === 'sink' || refuse('target', target));
      if (target.type === 'f64') line(`${name(target)}=${value};`);
      else
        line(`{const d=${value};${name(target)}l=num.lowOfDouble(d);${name(target)}h=num.highOfDouble(d);}`);
    },
    setWide(target, low, high) {
      if (target.kind !== 'register') return void (target.kind === 'sink' || refuse('target', target));
      if (target.type === 'f64') line(`${name(target)}=num.doubleOfBits(${low},${high});`);
      // Both halves are computed before either is stored: the target may be an operand.
      else line(`{const w=${low};${name(target)}h=${high};${name(target)}l=w;}`);
    },
    setWideResult(target, call) {
      line(`${call};`);
      emitter.setWide(target, 'num.result[0]', 'num.result[1]');
    },
    setPredicate(target, value) {
      if (target.kind === 'pair') {
        line(`{const p=${value};`);
        emitter.setPredicate(target.first, 'p');
        emitter.setPredicate(target.second, '1-p');
        line('}');
      } else if (target.kind === 'register') line(`${name(target)}=${value};`);
    },
    unsupported(i) {
      throw new Error(`ptx: the virtual GPU does not know "${i.text}" (PTX line ${i.ptxLine})`);
    },
  };
  return emitter;
}

const specials: Record<string, string> = {
  '%tid.x': 'm.tidX[m.firstThread+l]',
  '%tid.y': 'm.tidY[m.firstThread+l]',
  '%tid.z': 'm.tidZ[m.firstThread+l]',
  '%laneid': 'l',
  '%warpid': '(m.firstThread>>5)',
  '%nwarpid': '32',
  '%smid': '0',
  '%nsmid': '1',
  '%lanemask_eq': '(1<<l)',
  '%lanemask_lt': '((1<<l)-1)',
  '%lanemask_le': '((2<<l)-1)',
  '%lanemask_gt': '~((2<<l)-1)',
  '%lanemask_ge': '~((1<<l)-1)',
  '%dynamic_smem_size': 'm.dynamicBytes',
  '%clock': '(m.clock++|0)',
  '%clock64': '(m.clock++|0)',
  '%globaltimer': '(m.clock++|0)',
  '%cluster_ctarank': 'm.block.rank',
  '%cluster_nctarank': 'm.block.cluster.blocks.length',
  WARP_SZ: '32',
  '%warpsize': '32',
};

/** A special register as an expression over the machine `m` and the lane `l`. */
function special(register: string): string {
  const known = specials[register];
  if (known) return known;
  const vector = /^%(ctaid|ntid|nctaid)\.([xyz])$/.exec(register);
  if (vector) return `m.${vector[1]}[${'xyz'.indexOf(vector[2])}]`;
  // Clusters lie along x.
  const cluster = /^%(cluster_ctaid|cluster_nctaid)\.([xyz])$/.exec(register);
  if (cluster && cluster[2] === 'x')
    return specials[cluster[1] === 'cluster_ctaid' ? '%cluster_ctarank' : '%cluster_nctarank'];
  if (cluster) return cluster[1] === 'cluster_ctaid' ? '0' : '1';
  throw new Error(`ptx: the virtual GPU has no special register ${register}`);
}
