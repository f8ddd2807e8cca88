// From a parsed module to kernels ready to run: control flow, places of shared, local and global variables. Shared
// variables are placed as awkwardly as their declared alignment allows, because ptxas may do the same.
import { analyse, type Flow } from './flow.ts';
import { type LoadedKernel, type Machine, sharedStart } from './machine.ts';
import { allocated, initialised } from './memory.ts';
import type { Kernel, Operand, PtxModule, Variable } from './ptx.ts';
import { bytesOf, sizeOf } from './ptx.ts';

/** Loads a module's kernels and allocates its global variables; `globals` lists those allocations. */
export function loadModule(
  m: Machine,
  ptx: PtxModule,
): { kernels: Map<string, LoadedKernel>; globals: bigint[] } {
  const places = new Map<string, number>();
  const globals: bigint[] = [];
  for (const v of ptx.variables) {
    if (v.space !== 'global' && v.space !== 'const') continue;
    const address = m.arena.allocate(v.bytes);
    if (address === undefined) throw new Error(`the virtual GPU has no room for variable ${v.name}`);
    globals.push(address);
    const offset = Number(address & 0xffffffffn);
    places.set(v.name, offset);
    initialise(m, v, offset);
  }
  const kernels = new Map<string, LoadedKernel>();
  for (const [name, kernel] of ptx.kernels) kernels.set(name, loadKernel(kernel, ptx, places));
  return { kernels, globals };
}

function initialise(m: Machine, v: Variable, offset: number): void {
  const size = bytesOf(v.type);
  const view = new DataView(m.global.u8.buffer);
  v.initial?.forEach((text, k) => {
    if (!/^-?(0[xX][\da-fA-F]+|\d+)U?$/.test(text)) {
      const float = /^0[fF]([\da-fA-F]{8})$/.exec(text);
      if (!float) throw new Error(`ptx: cannot read the initial value ${text} of ${v.name}`);
      view.setUint32(offset + k * size, Number.parseInt(float[1], 16), true);
      return;
    }
    const value = BigInt(text.replace(/^-|U$/g, '')) * (text[0] === '-' ? -1n : 1n);
    if (size === 8) view.setBigUint64(offset + k * 8, BigInt.asUintN(64, value), true);
    else if (size === 4) view.setUint32(offset + k * 4, Number(BigInt.asUintN(32, value)), true);
    else if (size === 2) view.setUint16(offset + k * 2, Number(BigInt.asUintN(16, value)), true);
    else view.setUint8(offset + k, Number(BigInt.asUintN(8, value)));
  });
  m.global.shadow8.fill(allocated | initialised, offset, offset + v.bytes);
}

/** A kernel that several machines load is analysed once. */
const flows = new WeakMap<Kernel, Flow>();

function flowOf(kernel: Kernel): Flow {
  const flow = flows.get(kernel) ?? analyse(kernel);
  flows.set(kernel, flow);
  return flow;
}

function loadKernel(kernel: Kernel, ptx: PtxModule, globals: ReadonlyMap<string, number>): LoadedKernel {
  const named = symbolsOf(kernel);
  const candidates = [...kernel.variables, ...ptx.variables].filter((v) => named.has(v.name));
  const shared = new Map<string, number>();
  let staticEnd = sharedStart;
  for (const v of candidates.filter((c) => c.space === 'shared' && !c.dynamic)) {
    staticEnd = Math.ceil(staticEnd / v.align) * v.align;
    if (staticEnd % (v.align * 2) === 0) staticEnd += v.align;
    shared.set(v.name, staticEnd);
    staticEnd += v.bytes;
  }
  // Dynamic shared memory is promised 16-byte alignment, whatever its declaration says.
  let dynamicStart = Math.ceil(staticEnd / 16) * 16;
  if (dynamicStart % 32 === 0) dynamicStart += 16;
  const dynamic = candidates.filter((c) => c.dynamic);
  for (const v of dynamic) shared.set(v.name, dynamicStart);
  // ptxas rounds what is static up to where it has dynamic shared memory begin.
  const alignment = Math.max(1, ...dynamic.map((v) => v.align));
  const staticBytes = Math.ceil((staticEnd - sharedStart) / alignment) * alignment;

  const local = new Map<string, number>();
  let localBytes = 0;
  for (const v of kernel.variables.filter((c) => c.space === 'local')) {
    localBytes = Math.ceil(localBytes / v.align) * v.align;
    local.set(v.name, localBytes);
    localBytes += v.bytes;
  }
  const flow = flowOf(kernel);
  return {
    ...{ source: kernel, flow, staticEnd, staticBytes, dynamicStart, localBytes },
    chunks: [],
    visits: new Int32Array(flow.blocks.length),
    sharedGrain: grainOf(kernel, 'shared'),
    globalGrain: grainOf(kernel, 'global'),
    locate: (name) => {
      const parameter = kernel.parameters.find((p) => p.name === name);
      if (parameter) return { space: 'param', offset: parameter.offset };
      for (const [space, map] of [
        ['shared', shared],
        ['local', local],
        ['global', globals],
      ] as const) {
        const offset = map.get(name);
        if (offset !== undefined) return { space, offset };
      }
      throw new Error(`ptx: kernel ${kernel.name} names the unknown symbol ${name}`);
    },
  };
}

/** The names of all symbols in a kernel's operands. */
function symbolsOf(kernel: Kernel): Set<string> {
  const names = new Set<string>();
  const visit = (x: Operand): void => {
    if (x.kind === 'symbol') names.add(x.name);
    else if (x.kind === 'address') visit(x.base);
    else if (x.kind === 'vector') x.elements.forEach(visit);
  };
  for (const i of kernel.instructions) i.operands.forEach(visit);
  return names;
}

/** log2 of the smallest access of a kernel to a space, at most 16 bytes: so many move TMA, ldmatrix and stmatrix at a time. */
function grainOf(kernel: Kernel, space: 'shared' | 'global'): number {
  let smallest = 16;
  for (const i of kernel.instructions) {
    const [size] = i.opcode === 'cp' && i.modifiers[1] !== 'bulk' ? i.operands.slice(2) : [];
    if (size?.kind === 'integer') smallest = Math.min(smallest, size.low);
    if (!['ld', 'st', 'atom', 'red', 'ldu'].includes(i.opcode)) continue;
    const words = i.modifiers.map((word) => word.split('::')[0]);
    const other = ['param', 'local', 'const', space === 'shared' ? 'global' : 'shared'];
    if (words.some((word) => other.includes(word))) continue;
    const type = i.modifiers.findLast((word) => sizeOf(word)) ?? 'b8';
    const count = Math.max(...i.operands.map((x) => (x.kind === 'vector' ? x.elements.length : 1)));
    smallest = Math.min(smallest, bytesOf(type) * count);
  }
  return Math.log2(smallest);
}
