// What the virtual GPU says when a kernel does something that a GPU would not forgive: one error with the kind of fault,
// and the kernel, block, thread, instruction and source line where it showed.
import { agentOf } from './agents.ts';
import type { Machine } from './machine.ts';
import type { Instruction } from './ptx.ts';

export type ReportKind =
  | 'out of bounds'
  | 'uninitialised'
  | 'misaligned'
  | 'race'
  | 'divergence'
  | 'barrier'
  | 'deadlock'
  | 'timeout'
  | 'trap'
  | 'launch'
  | 'async'
  | 'mbarrier'
  | 'proxy fence'
  | 'tensor map'
  | 'wgmma'
  | 'cluster'
  | 'grid dependency'
  | 'leak'
  | 'invalid free';

/** A fault found in a kernel or in the way it was launched. */
export class GpuReport extends Error {
  override readonly name: string = 'GpuReport';
  readonly kind: ReportKind;

  constructor(kind: ReportKind, detail: string) {
    super(`${kind}: ${detail}`);
    this.kind = kind;
  }
}

/** `"st.shared.f32 [%r4], %f1" (PTX line 80, gemm.cu:31)` */
export function quote(i: Instruction | undefined): string {
  if (!i) return '(unknown)';
  return `"${i.text}" (PTX line ${i.ptxLine}${i.source ? `, ${i.source}` : ''})`;
}

/** The thread of a key of the happens-before order (races.ts). */
export function threadName({ block: { cluster, warps } }: Machine, key: number): string {
  const [agent, lane] = [agentOf(key), key & 31];
  const rank = Math.floor(agent / warps.length);
  const thread = `thread ${(agent % warps.length) * 32 + lane}`;
  return cluster.blocks.length > 1 ? `${thread} of the cluster's block ${rank}` : thread;
}

/** `kernel gemm block (0,1,0) thread (3,0,0) at "..."` for a lane of the warp that runs now. */
export function whereIs(m: Machine, lane: number, at: Instruction | number): string {
  const i = typeof at === 'number' ? m.kernel.source.instructions[at] : at;
  const t = m.firstThread + lane;
  const thread = `(${m.tidX[t]},${m.tidY[t]},${m.tidZ[t]})`;
  return `kernel ${m.kernel.source.name} block (${[...m.ctaid]}) thread ${thread} at ${quote(i)}`;
}

/** Throws the report of a fault of one lane of the warp that runs now. */
export function fail(
  m: Machine,
  kind: ReportKind,
  detail: string,
  lane: number,
  at: Instruction | number,
): never {
  throw new GpuReport(kind, `${detail}, in ${whereIs(m, lane, at)}`);
}
