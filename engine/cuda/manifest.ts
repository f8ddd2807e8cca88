// A PTX file is its own manifest: each .entry lists its parameters. Here they are read, and a call's arguments are packed
// into the block that cuLaunchKernel takes. The driver never checks that block, so count and kind are checked here.
import { mismatch } from '../signature.ts';

/** p a 64-bit pointer, i a 32-bit integer, f a float32, d a float64, b bytes by value (a tensor map or a struct). */
export type ParameterKind = 'p' | 'i' | 'f' | 'd' | 'b';

export interface Parameter {
  readonly kind: ParameterKind;
  readonly offset: number;
  readonly bytes: number;
}

export interface Entry {
  readonly name: string;
  readonly parameters: readonly Parameter[];
  /** Size of the packed block. */
  readonly bytes: number;
  /** Whether it waits for the kernel before it by itself, and may thus be launched before that has ended. */
  readonly waits: boolean;
}

/** Where its parameters lie. */
export type Layout = Omit<Entry, 'waits'>;

export type KernelArgument = bigint | number | Uint8Array;

const sizes: Record<string, number> = {
  u8: 1,
  b8: 1,
  s8: 1,
  u32: 4,
  s32: 4,
  b32: 4,
  f32: 4,
  f64: 8,
  u64: 8,
  s64: 8,
  b64: 8,
};
const parameterPattern =
  /\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?[\w$]+(?:\[(\d+)\])?/;

/** The entries of a PTX module by name. Throws on a parameter type that no kernel of ours may have. */
export function readManifest(ptx: string): Map<string, Entry> {
  const entries = new Map<string, Entry>();
  for (const text of ptx.split(/\.entry\s+/).slice(1)) {
    const [, name, list] = /^([\w$]+)\s*\(([^)]*)\)/.exec(text) ?? [];
    if (!name) continue;
    const parameters: Parameter[] = [];
    let end = 0;
    for (const parameter of list.split(',').filter((part) => part.trim())) {
      const [, align, type, count] = parameterPattern.exec(parameter) ?? [];
      const size = sizes[type];
      if (!size) throw new Error(`kernel ${name} has a parameter of unknown type: ${parameter.trim()}`);
      const alignment = Math.max(size, Number(align ?? 1));
      const offset = Math.ceil(end / alignment) * alignment;
      const bytes = size * Number(count ?? 1);
      parameters.push({ kind: kindOf(type, count), offset, bytes });
      end = offset + bytes;
    }
    entries.set(name, { name, parameters, bytes: end, waits: text.includes('griddepcontrol.wait;') });
  }
  return entries;
}

function kindOf(type: string, count: string | undefined): ParameterKind {
  if (count !== undefined) return 'b';
  if (type === 'f32') return 'f';
  if (type === 'f64') return 'd';
  return sizes[type] === 8 ? 'p' : 'i';
}

/** Packs a call's arguments; a wrong count or kind is an error that shows both lists. */
export function packParameters(entry: Layout, args: readonly KernelArgument[]): Uint8Array {
  const block = new Uint8Array(entry.bytes);
  packAt(new DataView(block.buffer), 0, entry, args);
  return block;
}

function packAt(view: DataView, start: number, entry: Layout, args: readonly KernelArgument[]): void {
  const { parameters } = entry;
  if (args.length !== parameters.length) throw refused(entry, args);
  for (let i = 0; i < args.length; i++) {
    const { kind, offset, bytes } = parameters[i];
    const [at, value] = [start + offset, args[i]];
    if (typeof value === 'bigint') {
      if (kind !== 'p') throw refused(entry, args);
      view.setBigUint64(at, value, true);
    } else if (typeof value === 'number') {
      if (kind === 'f') view.setFloat32(at, value, true);
      else if (kind === 'd') view.setFloat64(at, value, true);
      else if (kind !== 'i') throw refused(entry, args);
      else if ((value | 0) === value) view.setInt32(at, value, true);
      else throw new Error(`${entry.name}: argument ${i} is ${value}, not a 32-bit integer`);
    } else {
      if (kind !== 'b') throw refused(entry, args);
      if (value.length !== bytes)
        throw new Error(`${entry.name}: argument ${i} has ${value.length} bytes, not ${bytes}`);
      new Uint8Array(view.buffer).set(value, at);
    }
  }
}

const refused = ({ name, parameters }: Layout, args: readonly KernelArgument[]): Error =>
  mismatch(name, parameters.map(({ kind }) => kind).join(''), args);

/** Where a C struct of 8-byte pointers (p), ints (i), floats (f) and doubles (d) has them; its size is a multiple of 8 bytes. */
export function structLayout(signature: string): Layout {
  const parameters: Parameter[] = [];
  let end = 0;
  for (const kind of signature as Iterable<ParameterKind>) {
    const bytes = kind === 'p' || kind === 'd' ? 8 : 4;
    const offset = Math.ceil(end / bytes) * bytes;
    parameters.push({ kind, offset, bytes });
    end = offset + bytes;
  }
  return { name: 'a row', parameters, bytes: Math.ceil(end / 8) * 8 };
}

/** Argument lists as an array of such structs. */
export function packRows(row: Layout, rows: readonly (readonly KernelArgument[])[]): Uint8Array {
  const packed = new Uint8Array(rows.length * row.bytes);
  const view = new DataView(packed.buffer);
  for (let i = 0; i < rows.length; i++) packAt(view, i * row.bytes, row, rows[i]);
  return packed;
}
