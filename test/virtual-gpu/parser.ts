// PTX text to kernels. PTX is a list of statements ended by `;`, with lexical scopes in braces (inline assembly repeats
// `{ .reg .pred p; WAIT: ... }`, so registers and labels belong to their scope). Covers what nvcc 13 emits, not all of PTX.
import type { Instruction, Kernel, Label, Operand, Parameter, PtxModule, Register, Variable } from './ptx.ts';
import { bytesOf } from './ptx.ts';

/** Parses a module. Throws an Error that begins `ptx:` on text it does not understand. */
export function parsePtx(text: string): PtxModule {
  const version = /^\s*\.version\s+(\S+)/m.exec(text)?.[1];
  const target = /^\s*\.target\s+(\w+)/m.exec(text)?.[1];
  if (!version || !target) throw new Error('ptx: no .version or .target line: this is not PTX text');
  const files = new Map<string, string>();
  for (const [, id, path] of text.matchAll(/^\s*\.file\s+(\d+)\s+"([^"]*)"/gm)) {
    files.set(id, path.replace(/^.*\//, ''));
  }
  const clean = withoutNoise(text);
  const kernels = new Map<string, Kernel>();
  const entry = /\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{/g;
  let outside = '';
  let last = 0;
  for (let m = entry.exec(clean); m; m = entry.exec(clean)) {
    const end = closingBrace(clean, entry.lastIndex);
    outside += clean.slice(last, m.index).replace(/\.(visible|weak)\s*$/, '');
    const firstLine = clean.slice(0, entry.lastIndex).split('\n').length;
    const body = clean.slice(entry.lastIndex, end);
    kernels.set(m[1], parseKernel(m[1], m[2], m[3], body, firstLine, files));
    entry.lastIndex = last = end + 1;
  }
  outside += clean.slice(last);
  const variables = outside
    .split(';')
    .map((s) => s.trim())
    .filter((s) => s && !/\.func\b/.test(s))
    .map(parseVariable);
  return { version, target, variables, kernels };
}

/** Blanks comments, headers and debug sections, keeping every line where it was; .loc gets the `;` it lacks. */
function withoutNoise(text: string): string {
  const blank = (s: string) => s.replace(/[^\n]/g, ' ');
  return text
    .replace(/\/\*[\s\S]*?\*\//g, blank)
    .replace(/\/\/[^\n]*/g, blank)
    .replace(/^\s*\.section[\s\S]*$/m, blank)
    .replace(/^[ \t]*\.(version|target|address_size|file)\b[^\n]*/gm, blank)
    .replace(/^[ \t]*\.loc\b[^\n]*/gm, (line) => `${line};`);
}

function closingBrace(text: string, from: number): number {
  let depth = 1;
  for (let i = from; i < text.length; i++) {
    if (text[i] === '{') depth++;
    else if (text[i] === '}' && --depth === 0) return i;
  }
  throw new Error('ptx: a kernel body does not end');
}

/** Splits at commas outside brackets. */
function splitList(text: string): string[] {
  const parts: string[] = [];
  let depth = 0;
  let start = 0;
  for (let i = 0; i < text.length; i++) {
    if ('{[('.includes(text[i])) depth++;
    else if ('}])'.includes(text[i])) depth--;
    else if (text[i] === ',' && depth === 0) {
      parts.push(text.slice(start, i).trim());
      start = i + 1;
    }
  }
  parts.push(text.slice(start).trim());
  return parts.filter((part) => part);
}

const variablePattern =
  /^(?:\.(?:visible|extern|weak)\s+)*\.(\w+)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?([\w$%]+)((?:\[\d*\])*)/;

/** `.shared .align 4 .b8 name[128]`, `.param .u64 .ptr .align 1 name`, `.extern .shared .align 16 .b8 raw[]` */
function parseVariable(text: string): Variable {
  const m = variablePattern.exec(text);
  if (!m) throw new Error(`ptx: cannot read the variable: ${text.slice(0, 100)}`);
  const [, space, align, type, name, dims] = m;
  const counts = [...dims.matchAll(/\[(\d*)\]/g)].map(([, n]) => Number(n));
  const bytes = bytesOf(type) * counts.reduce((a, b) => a * b, 1);
  const dynamic = dims.startsWith('[]');
  const initial = /=\s*\{?([^}]*)\}?/
    .exec(text)?.[1]
    .split(',')
    .map((s) => s.trim());
  return { space, align: Number(align ?? bytesOf(type)), type, name, bytes, dynamic, initial };
}

function parseParameters(list: string): { parameters: Parameter[]; bytes: number } {
  let end = 0;
  const parameters = splitList(list).map((text) => {
    const variable = parseVariable(text);
    const offset = Math.ceil(end / variable.align) * variable.align;
    end = offset + variable.bytes;
    return { ...variable, offset };
  });
  return { parameters, bytes: end };
}

/** Registers and labels declared between two braces; a range `%r<20>` declares %r0 to %r19 when they are first met. */
interface Scope {
  readonly outer?: Scope;
  readonly registers: Map<string, Register>;
  readonly ranges: { readonly prefix: string; readonly type: string }[];
  readonly labels: Map<string, Label>;
  readonly tables: Map<string, string[]>;
}

const newScope = (outer?: Scope): Scope => ({
  outer,
  registers: new Map(),
  ranges: [],
  labels: new Map(),
  tables: new Map(),
});

function parseKernel(
  name: string,
  parameterList: string,
  attributes: string,
  body: string,
  firstLine: number,
  files: ReadonlyMap<string, string>,
): Kernel {
  const registers: Register[] = [];
  const variables: Variable[] = [];
  const code: (Instruction | Label)[] = [];
  const instructions: Instruction[] = [];
  const branches: { from: Instruction; to: string; scope: Scope }[] = [];
  let scope = newScope();
  let source: string | undefined;

  const declare = (registerName: string, type: string, into: Scope): Register => {
    const made: Register = { kind: 'register', name: registerName, type, id: registers.length, plane: -1 };
    registers.push(made);
    into.registers.set(registerName, made);
    return made;
  };
  const findRegister = (text: string): Register | undefined => {
    for (let s: Scope | undefined = scope; s; s = s.outer) {
      const known = s.registers.get(text);
      if (known) return known;
      const range = s.ranges.find(
        (r) => text.startsWith(r.prefix) && /^\d+$/.test(text.slice(r.prefix.length)),
      );
      if (range) return declare(text, range.type, s);
    }
    return undefined;
  };

  const operand = (raw: string): Operand => {
    const text = raw.trim();
    if (text[0] === '{') return { kind: 'vector', elements: splitList(text.slice(1, -1)).map(operand) };
    if (text[0] === '[') return address(splitList(text.slice(1, -1)));
    if (text[0] === '!') return { kind: 'not', operand: operand(text.slice(1)) };
    if (text[0] === '-' && !/^-\d/.test(text)) return { kind: 'negated', operand: operand(text.slice(1)) };
    if (text.includes('|')) {
      const [first, second] = text.split('|');
      return { kind: 'pair', first: operand(first), second: operand(second) };
    }
    if (text === '_') return { kind: 'sink' };
    const known = parseNumber(text) ?? findRegister(text);
    if (known) return known;
    return text[0] === '%' || text === 'WARP_SZ'
      ? { kind: 'special', name: text }
      : { kind: 'symbol', name: text };
  };
  const address = ([where, coordinates]: string[]): Operand => {
    const m = /^([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?$/.exec(where);
    if (!m) throw new Error(`ptx: cannot read the address [${where}]`);
    const offset = m[3] ? Number(m[3]) * (m[2] === '-' ? -1 : 1) : 0;
    return {
      kind: 'address',
      base: operand(m[1]),
      offset,
      coordinates: coordinates ? operand(coordinates) : undefined,
    };
  };

  const statement = (raw: string, ptxLine: number): void => {
    let text = raw.trim().replace(/\s+/g, ' ');
    const loc = /^\.loc (\d+) (\d+)/.exec(text);
    if (loc) source = `${files.get(loc[1]) ?? 'source'}:${loc[2]}`;
    const table = /^([\w$]+): ?\.branchtargets (.*)$/.exec(text);
    if (table) scope.tables.set(table[1], splitList(table[2]));
    const declaration = /^\.reg \.(\w+) (.*)$/.exec(text);
    if (declaration) {
      for (const item of splitList(declaration[2])) {
        const range = /^(.*)<\d+>$/.exec(item);
        if (range) scope.ranges.push({ prefix: range[1], type: declaration[1] });
        else declare(item, declaration[1], scope);
      }
    } else if (/^\.(shared|local|global|const|extern)\b/.test(text)) variables.push(parseVariable(text));
    if (!text || text[0] === '.' || table) return;

    const whole = text;
    const guarded = /^@(!?)([\w%$]+) (.*)$/.exec(text);
    let guard: Instruction['guard'];
    if (guarded) {
      const register = findRegister(guarded[2]);
      if (!register) throw new Error(`ptx: unknown predicate in ${text}`);
      guard = { register, negated: guarded[1] === '!' };
      text = guarded[3];
    }
    const space = text.indexOf(' ');
    const [opcode, ...modifiers] = (space < 0 ? text : text.slice(0, space)).split('.');
    const rest = space < 0 ? '' : text.slice(space + 1);
    const operands =
      opcode === 'bra' ? [] : opcode === 'call' ? callOperands(rest) : splitList(rest).map(operand);
    const site = instructions.length;
    const made: Instruction = { opcode, modifiers, guard, operands, text: whole, ptxLine, source, site };
    if (opcode === 'bra') branches.push({ from: made, to: rest.trim(), scope });
    if (opcode === 'brx') branches.push({ from: made, to: splitList(rest)[1], scope });
    code.push(made);
    instructions.push(made);
  };

  scanBody(body, firstLine, {
    open: () => {
      scope = newScope(scope);
    },
    close: () => {
      scope = scope.outer ?? scope;
    },
    label: (text) => {
      const label = { label: text };
      scope.labels.set(text, label);
      code.push(label);
    },
    statement,
  });
  for (const { from, to, scope: at } of branches) from.targets = resolveTargets(from, to, at);
  const { parameters, bytes } = parseParameters(parameterList);
  const limit = /\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?/.exec(attributes.replace(/\s+/g, ' '));
  const maxThreads = limit ? Number(limit[1]) * Number(limit[2] ?? 1) * Number(limit[3] ?? 1) : 1024;
  return {
    ...{ name, parameters, parameterBytes: bytes, variables, registers, code, instructions, maxThreads },
  };
}

interface BodyEvents {
  open(): void;
  close(): void;
  label(text: string): void;
  statement(text: string, line: number): void;
}

/** Walks a kernel body: braces that begin a statement are scopes, `name:` is a label, the rest ends at `;`. */
function scanBody(body: string, firstLine: number, on: BodyEvents): void {
  let line = firstLine;
  let startLine = firstLine;
  let depth = 0;
  /** Where the pending statement begins, or -1 between statements. */
  let start = -1;
  for (let i = 0; i < body.length; i++) {
    const c = body[i];
    if (c === '\n') line++;
    if (start < 0) {
      if (c === '{') on.open();
      else if (c === '}') on.close();
      else if (c !== ';' && c.trim()) {
        start = i;
        startLine = line;
      }
      continue;
    }
    if (c === '{') depth++;
    else if (c === '}') depth--;
    else if (c === ':' && depth === 0 && /^[\w$]+$/.test(body.slice(start, i)) && !isTable(body, i)) {
      on.label(body.slice(start, i));
      start = -1;
    } else if (c === ';') {
      on.statement(body.slice(start, i), startLine);
      start = -1;
    }
  }
}

const isTable = (body: string, colon: number): boolean =>
  /^\s*\.branchtargets/.test(body.slice(colon + 1, colon + 40));

function resolveTargets(from: Instruction, to: string, scope: Scope): Label[] {
  for (let s: Scope | undefined = scope; s; s = s.outer) {
    const label = s.labels.get(to);
    if (label) return [label];
    const table = s.tables.get(to);
    if (table) return table.flatMap((name) => resolveTargets(from, name, scope));
  }
  throw new Error(`ptx: no label ${to} for ${from.text}`);
}

const callOperands = (rest: string): Operand[] => splitList(rest).map((name) => ({ kind: 'symbol', name }));

function parseNumber(text: string): Operand | undefined {
  if (/^0[fF][0-9a-fA-F]{8}$/.test(text)) {
    const bits = Number.parseInt(text.slice(2), 16) | 0;
    return { kind: 'float', bits, value: new Float32Array(Int32Array.of(bits).buffer)[0] };
  }
  if (/^0[dD][0-9a-fA-F]{16}$/.test(text)) {
    const value = new Float64Array(BigUint64Array.of(BigInt(`0x${text.slice(2)}`)).buffer)[0];
    return { kind: 'float', bits: 0, value };
  }
  if (!/^-?(0[xX][0-9a-fA-F]+|\d+)U?$/.test(text)) return undefined;
  const magnitude = BigInt(text.replace(/^-|U$/g, ''));
  const value = BigInt.asIntN(64, text[0] === '-' ? -magnitude : magnitude);
  return { kind: 'integer', value, low: Number(BigInt.asIntN(32, value)) };
}
