// What the parser makes of PTX text: modules, kernels, instructions and their operands. Types are PTX's own names
// without the dot; `pred` is a register type of its own.

const sizes: Record<string, number> = {
  ...{ b8: 1, s8: 1, u8: 1, b16: 2, s16: 2, u16: 2, f16: 2, bf16: 2 },
  ...{ b32: 4, s32: 4, u32: 4, f32: 4, f16x2: 4, bf16x2: 4, tf32: 4, pred: 4 },
  ...{ b64: 8, s64: 8, u64: 8, f64: 8, b128: 16 },
};

/** Bytes of a PTX type, undefined for a word that is no type. */
export const sizeOf = (type: string): number | undefined => sizes[type];

/** Bytes of a word that must be a type. */
export function bytesOf(type: string): number {
  const bytes = sizes[type];
  if (!bytes) throw new Error(`ptx: unknown type .${type}`);
  return bytes;
}

export const isWide = (type: string): boolean => type === 'b64' || type === 's64' || type === 'u64';
export const isSigned = (type: string): boolean => type[0] === 's';

export interface Register {
  readonly kind: 'register';
  readonly name: string;
  readonly type: string;
  readonly id: number;
  /** Index of its first word in a warp's register file; a register has 32 lanes a word. Set by the compiler. */
  plane: number;
}

export interface Integer {
  readonly kind: 'integer';
  readonly value: bigint;
  /** The low 32 bits, signed. */
  readonly low: number;
}

export interface Float {
  readonly kind: 'float';
  readonly value: number;
  /** The bits of a 32-bit literal (0f...). */
  readonly bits: number;
}

export interface Address {
  readonly kind: 'address';
  readonly base: Operand;
  readonly offset: number;
  /** `[map, {x, y}]` of the tensor copies. */
  readonly coordinates?: Operand;
}

export type Operand =
  | Register
  | Integer
  | Float
  | Address
  | { readonly kind: 'special'; readonly name: string }
  | { readonly kind: 'symbol'; readonly name: string }
  | { readonly kind: 'vector'; readonly elements: readonly Operand[] }
  | { readonly kind: 'not'; readonly operand: Operand }
  | { readonly kind: 'negated'; readonly operand: Operand }
  | { readonly kind: 'pair'; readonly first: Operand; readonly second: Operand }
  | { readonly kind: 'sink' };

export interface Guard {
  readonly register: Register;
  readonly negated: boolean;
}

export interface Label {
  readonly label: string;
}

export interface Instruction {
  readonly opcode: string;
  readonly modifiers: readonly string[];
  readonly guard?: Guard;
  readonly operands: readonly Operand[];
  /** As written, for reports. */
  readonly text: string;
  /** Line in the PTX text, and `file:line` of the source where a .loc told it. */
  readonly ptxLine: number;
  readonly source?: string;
  /** Where a branch goes; several for brx.idx. */
  targets?: readonly Label[];
  /** Index in the kernel's list of instructions, by which memory accesses name their place. */
  readonly site: number;
}

export interface Variable {
  readonly space: string;
  readonly align: number;
  readonly type: string;
  readonly name: string;
  readonly bytes: number;
  /** `extern .shared x[]`: sized at launch. */
  readonly dynamic: boolean;
  readonly initial?: readonly string[];
}

export interface Parameter extends Variable {
  readonly offset: number;
}

export interface Kernel {
  readonly name: string;
  readonly parameters: readonly Parameter[];
  readonly parameterBytes: number;
  readonly variables: readonly Variable[];
  readonly registers: readonly Register[];
  readonly code: readonly (Instruction | Label)[];
  readonly instructions: readonly Instruction[];
  /** Product of .maxntid, or 1024. */
  readonly maxThreads: number;
}

export interface PtxModule {
  readonly version: string;
  readonly target: string;
  readonly variables: readonly Variable[];
  readonly kernels: ReadonlyMap<string, Kernel>;
}

export const isLabel = (x: Instruction | Label): x is Label => 'label' in x;

/** The state space an instruction addresses, `generic` where it names none. */
export function spaceOf(i: Instruction): string {
  for (const word of i.modifiers) {
    const space = word.split('::')[0];
    if (spaces.has(space)) return space;
  }
  return 'generic';
}
const spaces = new Set(['global', 'shared', 'local', 'param', 'const']);

/** The last type among an instruction's modifiers: what it operates on. */
export function typeOf(i: Instruction): string {
  const type = i.modifiers.findLast((word) => sizes[word]);
  if (!type) throw new Error(`ptx: no type in ${i.text}`);
  return type;
}

/** The registers of an operand, in order. */
export function registersOf(x: Operand | undefined): Register[] {
  switch (x?.kind) {
    case 'register':
      return [x];
    case 'vector':
      return x.elements.flatMap(registersOf);
    case 'address':
      return [...registersOf(x.base), ...registersOf(x.coordinates)];
    case 'not':
    case 'negated':
      return registersOf(x.operand);
    case 'pair':
      return [...registersOf(x.first), ...registersOf(x.second)];
    default:
      return [];
  }
}
