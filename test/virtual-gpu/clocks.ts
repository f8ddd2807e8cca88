// Who has waited for whom, among virtual GPUs: work is done there when it is queued, so that copies between GPUs wait for each
// other is kept account of. Each GPU counts its work (all its streams are taken for one), and knows how far it has waited for the
// others. Of a copy it is known where it reads and writes; other work may be anywhere. A copy that may come before what is
// queued on its source, and work that may come before a copy from where it writes has been made, are reports.
import { GpuReport } from './report.ts';

/** How much of each GPU's work is known to be done. */
export type Clock = number[];

/** Bytes from `begin` to before `end` of a GPU's memory. */
export interface Span {
  readonly begin: bigint;
  readonly end: bigint;
}

/** A copy: of which GPU's work it is the `at`-th, and what it reads or writes. */
interface Access extends Span {
  readonly index: number;
  readonly at: number;
}

export interface Account {
  readonly index: number;
  /** What its next work comes after; at its own place, how much it has queued. */
  readonly clock: Clock;
  /** Counts work that may change any of its memory. */
  work(call: string): void;
  /** Counts a copy into its memory from another's. */
  fetch(call: string, to: Span, other: Account, from: Span): void;
  /** Copies into its memory since its last work of another kind, which is the `settled`-th. */
  readonly arrived: Access[];
  settled: number;
  /** Copies of other GPUs from its memory. */
  readers: Access[];
}

const meet = (a: Span, b: Span): boolean => a.begin < b.end && b.begin < a.end;

export const join = (into: Clock, from: Clock): void => {
  for (const [i, at] of from.entries()) into[i] = Math.max(into[i], at);
};

export function openAccount(index: number, count: number): Account {
  const clock = Array<number>(count).fill(0);
  const mayWrite = (call: string, readers: readonly Access[]): void => {
    const early = readers.find((reader) => clock[reader.index] < reader.at);
    if (early)
      throw new GpuReport('race', `${call} on GPU ${index} does not wait for GPU ${early.index}'s copy`);
  };
  const account: Account = {
    index,
    clock,
    arrived: [],
    settled: 0,
    readers: [],
    work(call) {
      mayWrite(call, account.readers);
      account.readers = [];
      account.arrived.length = 0;
      account.settled = ++clock[index];
    },
    fetch(call, to, other, from) {
      const writers = other.arrived.filter((span) => meet(span, from)).map(({ at }) => at);
      if (clock[other.index] < Math.max(other.settled, ...writers))
        throw new GpuReport('race', `${call} does not wait for what is queued on GPU ${other.index}`);
      mayWrite(
        call,
        account.readers.filter((span) => meet(span, to)),
      );
      const at = ++clock[index];
      account.arrived.push({ ...to, index, at });
      other.readers.push({ ...from, index, at });
    },
  };
  return account;
}
