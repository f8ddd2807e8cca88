// Moves, loads, stores, atomics and cp.async as JavaScript. A load or store tests its address against the shadow in line
// and calls `fault` only where something is wrong (it throws the report), then tells the race detector, then moves data.
import type { Emitter } from './emit.ts';
import { unsigned, windows } from './emit.ts';
import type { Address, Instruction, Operand } from './ptx.ts';
import { bytesOf, isWide, spaceOf, typeOf } from './ptx.ts';

/** Names of the memory views in generated code, by space letter: G global, S shared, L local. */
type Space = 'G' | 'S' | 'L';

function addressOf(i: Instruction, position: number): Address {
  const x = i.operands[position];
  if (x?.kind !== 'address') throw new Error(`ptx: operand ${position} of "${i.text}" is no address`);
  return x;
}

/** Opens a brace with the offset `ax`, and the window `ah` where the space is global or generic. */
function openAddress(e: Emitter, address: Address, space: string): void {
  const { base, offset } = address;
  if (space !== 'global' && space !== 'generic') {
    const low = base.kind === 'register' && isWide(base.type) ? e.wide(base)[0] : e.int(base);
    e.line(`{const ax=(${low}+${offset})|0;`);
    return;
  }
  const [low, high] = e.wide(base);
  if (offset === 0) e.line(`{const ax=${low},ah=${high};`);
  else {
    const carry = `(${unsigned('ax')}<${offset >>> 0}?1:0)`;
    e.line(`{const ax=(${low}+${offset})|0,ah=(${high}+${carry}${offset < 0 ? '-1' : ''})|0;`);
  }
}

/** Runs `body` in the space that the address names, or for a generic address in the one its window says. */
function inSpace(e: Emitter, i: Instruction, address: Address, body: (space: Space) => void): void {
  const space = spaceOf(i);
  if (i.modifiers.includes('shared::cluster')) {
    openAddress(e, address, 'shared');
    // The names of the memory views, for the block that the address names.
    e.line(`{const {SI,SF,SH,SB,SS32,SS16,SS8,race,fault,offset}=reach(l,ax,${i.site});{const ax=offset;`);
    body('S');
    e.line('}}');
  } else if (space === 'const') {
    e.line(`{const ax=(${e.int(address.base)}+${address.offset})|0,ah=${windows.global};`);
    body('G');
  } else {
    openAddress(e, address, space);
    if (space === 'generic') {
      e.line(`if(ah===${windows.shared}){`);
      body('S');
      e.line(`}else if(ah===${windows.local}){`);
      body('L');
      e.line('}else{');
      body('G');
      e.line('}');
    } else body(space === 'global' ? 'G' : space === 'shared' ? 'S' : 'L');
  }
  e.line('}');
}

/** Tests bounds, alignment and (for loads) initialisation of `bytes` at ax; marks what is stored as initialised. */
function check(e: Emitter, i: Instruction, space: Space, bytes: number, load: boolean): void {
  const where = space === 'G' ? `ah!==${windows.global}||` : '';
  const [view, index, full, held] =
    bytes >= 4
      ? ['32', 'y>>>2', 0x03030303, 0x01010101]
      : bytes === 2
        ? ['16', 'y>>>1', 0x0303, 0x0101]
        : ['8', 'y', 3, 1];
  const y = space === 'L' ? 'ax+m.localBase+l*m.localStride' : 'ax';
  e.line(`const y=${y},x=${index};`);
  const shadow = `${space}S${view}`;
  const tests = Array.from({ length: Math.max(1, bytes >> 2) }, (_, k) =>
    load ? `${shadow}[x+${k}]!==${full}` : `(${shadow}[x+${k}]&${held})!==${held}`,
  );
  const misaligned = bytes > 1 ? `(ax&${bytes - 1})!==0||` : '';
  const high = space === 'G' ? 'ah' : '0';
  e.line(
    `if(${where}${misaligned}${tests.join('||')})fault.${space}(l,${high},ax,${bytes},${load},${i.site});`,
  );
  if (!load) for (let k = 0; k < tests.length; k++) e.line(`${shadow}[x+${k}]=${full};`);
  const strong = isStrong(i) ? 'Strong' : '';
  if (space === 'G') {
    const kind = !load ? 'Write' : i.modifiers.includes('nc') ? 'ReadOnly' : 'Read';
    e.line(`race.global${kind}${strong}(l,ax,${bytes},${i.site});`);
  }
  if (space === 'S') e.line(`race.shared${load ? 'Read' : 'Write'}${strong}(l,ax,${bytes},${i.site});`);
}

const strongWords = new Set(['volatile', 'relaxed', 'acquire', 'release']);
/** Volatile and memory-model accesses synchronise like atomics: two of them never race. */
const isStrong = (i: Instruction): boolean => i.modifiers.some((word) => strongWords.has(word));

const elements = (x: Operand): readonly Operand[] => (x.kind === 'vector' ? x.elements : [x]);

function load(e: Emitter, i: Instruction): void {
  const type = typeOf(i);
  const size = bytesOf(type);
  const targets = elements(i.operands[0]);
  const address = addressOf(i, 1);
  if (spaceOf(i) === 'param') {
    loadParameter(e, address, targets, type);
    return;
  }
  inSpace(e, i, address, (space) => {
    check(e, i, space, size * targets.length, true);
    targets.forEach((target, k) => {
      if (target.kind === 'sink') return;
      const at = (view: string, shift: number) => `${space}${view}[(y>>>${shift})+${(k * size) >> shift}]`;
      if (size === 8) e.setWide(target, at('I', 2), `${space}I[(y>>>2)+${2 * k + 1}]`);
      else if (size === 4 && target.kind === 'register' && target.type === 'f32')
        e.setFloat(target, at('F', 2));
      else if (size === 4) e.setInt(target, at('I', 2));
      else e.setInt(target, extended(target, type, size === 2 ? at('H', 1) : at('B', 0)));
    });
  });
}

/** A loaded byte or half word, extended to the target register's width as the type says. */
function extended(target: Operand, type: string, value: string): string {
  if (type[0] !== 's') return value;
  const shift = bytesOf(type) === 2 ? 16 : 24;
  const whole = `${value}<<${shift}>>${shift}`;
  return target.kind === 'register' && bytesOf(target.type) === 2 ? `(${whole})&65535` : whole;
}

function loadParameter(e: Emitter, address: Address, targets: readonly Operand[], type: string): void {
  if (address.base.kind === 'symbol' && address.base.name.startsWith('retval')) {
    e.setInt(targets[0], '0');
    return;
  }
  const size = bytesOf(type);
  openAddress(e, address, 'param');
  targets.forEach((target, k) => {
    const at = `ax+${k * size}`;
    if (size === 8) e.setWide(target, `parameters.getInt32(${at},true)`, `parameters.getInt32(${at}+4,true)`);
    else if (size === 4) e.setInt(target, `parameters.getInt32(${at},true)`);
    else if (size === 2) e.setInt(target, extended(target, type, `parameters.getUint16(${at},true)`));
    else e.setInt(target, extended(target, type, `parameters.getUint8(${at})`));
  });
  e.line('}');
}

function store(e: Emitter, i: Instruction): void {
  if (spaceOf(i) === 'param') return; // arguments of printf and assertions
  const type = typeOf(i);
  const size = bytesOf(type);
  const values = elements(i.operands[1]);
  inSpace(e, i, addressOf(i, 0), (space) => {
    check(e, i, space, size * values.length, false);
    values.forEach((value, k) => {
      const at = (view: string, shift: number) => `${space}${view}[(y>>>${shift})+${(k * size) >> shift}]`;
      if (size === 8) {
        const [low, high] = e.wide(value);
        e.line(`${at('I', 2)}=${low};${space}I[(y>>>2)+${2 * k + 1}]=${high};`);
      } else if (size === 4 && value.kind === 'register' && value.type === 'f32') {
        e.line(`${at('F', 2)}=${e.float(value)};`);
      } else if (size === 4) e.line(`${at('I', 2)}=${e.int(value)};`);
      else e.line(`${size === 2 ? at('H', 1) : at('B', 0)}=${e.int(value)};`);
    });
  });
}

/** atom and red call the machine with bits in and bits out; 64-bit ones leave theirs in num.result. */
function atomic(e: Emitter, i: Instruction): void {
  const returns = i.opcode === 'atom';
  const [target, pointer, value, other] = returns ? i.operands : [{ kind: 'sink' } as const, ...i.operands];
  const type = typeOf(i);
  const wide = bytesOf(type) === 8;
  const bits = (x: Operand | undefined) => (x ? (wide ? e.wide(x).join() : `${e.int(x)},0`) : '0,0');
  if (pointer.kind !== 'address' || value.kind === 'vector' || i.modifiers.includes('shared::cluster')) {
    e.unsupported(i);
    return;
  }
  const space = spaceOf(i);
  openAddress(e, pointer, space);
  const high = space === 'shared' ? windows.shared : 'ah';
  const call = `atomic(l,${high},ax,${bits(value)},${bits(other)},${i.site})`;
  if (target.kind === 'sink') e.line(`${call};`);
  else if (wide) e.setWideResult(target, call);
  else e.setInt(target, call);
  e.line('}');
}

/** cp.async.{ca|cg}.shared.global [to], [from], bytes{, source bytes}: begun here, completed by a wait. */
function copyAsync(e: Emitter, i: Instruction): void {
  const [, , bytes, sourceBytes] = i.operands;
  if (bytes.kind !== 'integer') {
    e.unsupported(i);
    return;
  }
  openAddress(e, addressOf(i, 0), 'shared');
  e.line('const to=ax;');
  openAddress(e, addressOf(i, 1), 'global');
  const read = sourceBytes && sourceBytes.kind !== 'sink' ? e.int(sourceBytes) : String(bytes.low);
  e.line(`copyAsync(l,to,ah,ax,${bytes.low},${read},${i.site});}}`);
}

function move(e: Emitter, i: Instruction): void {
  const type = typeOf(i);
  const [d, a] = i.operands;
  if (type === 'pred') e.setPredicate(d, e.predicate(a));
  else if (d.kind === 'vector') unpack(e, i, d.elements, a, type);
  else if (a.kind === 'vector') pack(e, i, d, a.elements, type);
  else if (type === 'f32') e.setFloat(d, e.float(a));
  else if (type === 'f64') e.setDouble(d, e.double(a));
  else if (isWide(type)) e.setWide(d, ...e.wide(a));
  else e.setInt(d, bytesOf(type) === 2 ? `${e.int(a)}&65535` : e.int(a));
}

function unpack(e: Emitter, i: Instruction, parts: readonly Operand[], a: Operand, type: string): void {
  if (isWide(type) && parts.length === 4) {
    const [low, high] = e.wide(a);
    e.line(`{const lo=${low},hi=${high};`);
    ['lo&65535', 'lo>>>16', 'hi&65535', 'hi>>>16'].forEach((v, k) => {
      e.setInt(parts[k], v);
    });
  } else {
    const [low, high] = isWide(type) ? e.wide(a) : [`${e.int(a)}&65535`, `${e.int(a)}>>>16`];
    if (parts.length !== 2) e.unsupported(i);
    e.line(`{const lo=${low},hi=${high};`);
    e.setInt(parts[0], 'lo');
    e.setInt(parts[1], 'hi');
  }
  e.line('}');
}

function pack(e: Emitter, i: Instruction, d: Operand, parts: readonly Operand[], type: string): void {
  const v = parts.map((x) => e.int(x));
  const halves = (low: string, high: string) => `(${low}&65535)|(${high}<<16)`;
  if (isWide(type) && v.length === 4) e.setWide(d, halves(v[0], v[1]), halves(v[2], v[3]));
  else if (v.length !== 2) e.unsupported(i);
  else if (isWide(type)) e.setWide(d, v[0], v[1]);
  else e.setInt(d, halves(v[0], v[1]));
}

/** Between a state space's own addresses and generic ones, which for global and param are the same. */
function convertAddress(e: Emitter, i: Instruction): void {
  const space = spaceOf(i);
  const [d, a] = i.operands;
  const [low, high] = e.wide(a);
  if (space === 'global' || space === 'param' || space === 'const') e.setWide(d, low, high);
  else if (i.modifiers[0] === 'to') e.setWide(d, low, '0');
  else e.setWide(d, low, String(windows[space as 'shared' | 'local']));
}

/** mapa.shared::cluster: where a place of this block's shared memory lies in another block's. */
function mapAddress(e: Emitter, i: Instruction): void {
  if (!i.modifiers.includes('shared::cluster') || isWide(typeOf(i))) e.unsupported(i);
  const [to, from, rank] = i.operands;
  e.setInt(to, `mapa(l,${e.int(from)},${e.int(rank)},${i.site})`);
}

/** What only moves lines of the caches. L2 holds no stale ones, and a tensor map is a parameter of the launch. */
function prefetch(e: Emitter, i: Instruction): void {
  const harmless = i.opcode === 'prefetch' && i.modifiers.some((word) => /^(tensormap|L2)/.test(word));
  if (!harmless) e.line(`race.globalPrefetch(l,${i.site});`);
}

/** Opcodes that move data, whatever their type. */
export const memoryInstructions: Readonly<Record<string, (e: Emitter, i: Instruction) => void>> = {
  mov: move,
  mapa: mapAddress,
  cvta: convertAddress,
  ld: load,
  ldu: load,
  st: store,
  atom: atomic,
  red: atomic,
  cp: copyAsync,
  prefetch,
  prefetchu: prefetch,
  discard: prefetch,
  applypriority: prefetch,
  createpolicy: (e, i) => e.setWide(i.operands[0], '0', '0'),
  isspacep: (e, i) => {
    const window = windows[spaceOf(i) as keyof typeof windows];
    e.setPredicate(i.operands[0], `(${e.wide(i.operands[1])[1]}===${window}?1:0)`);
  },
  trap: (e, i) => e.line(`fault.trap(l,${i.site});`),
  brkpt: (e, i) => e.line(`fault.trap(l,${i.site});`),
  call: (e, i) => {
    const name = i.operands.map((x) => (x.kind === 'symbol' ? x.name : '')).join();
    if (name.includes('__assertfail')) e.line(`fault.trap(l,${i.site});`);
    else if (!name.includes('vprintf')) e.unsupported(i);
  },
};
