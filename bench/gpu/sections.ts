// A long program on a GPU, cut into sections that each run in a process of their own: an illegal address, a hang or a killed
// process costs the case that made it, not the rest. The child tells of each case on file descriptor 3 before it begins and
// after it ends, so the parent can name the culprit, begin again behind it, and say what the time did not reach.
import { type ChildProcess, spawn } from 'node:child_process';
import { writeSync } from 'node:fs';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { stickyResults } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';

/** What a child's case gives. `problem` is what is wrong, in a sentence; absent where nothing is. */
export interface Result {
  problem?: string;
}

export interface Case<R extends Result> {
  readonly label: string;
  run(): R;
}

export interface Section<R extends Result> {
  readonly name: string;
  /** Seconds for a case, where that is less than the run's own: what hangs should cost no more. */
  readonly caseLimit?: number;
  /** The same list in parent and child; the parent reads the labels alone. */
  cases(): readonly Case<R>[];
}

export type Outcome<R extends Result> = { section: string; label: string; seconds: number } & (
  | { status: 'ran'; result: R }
  /** The child's process ended, or was ended, within this case. */
  | { status: 'crashed'; problem: string }
  | { status: 'not run'; problem: string }
);

export interface Run<R extends Result> {
  /** The child's program, and what it is called with before `--limit S --case-limit S --section NAME --from N`. */
  readonly script: string;
  readonly args: readonly string[];
  readonly sections: readonly Section<R>[];
  /** Sections at a time. */
  readonly jobs: number;
  /** Seconds for all, and for one case. */
  readonly limit: number;
  readonly caseLimit: number;
  note(outcome: Outcome<R>): void;
}

/** Crashes after which a section's other cases are left. */
const patience = 4;

type Message<R> = { begin: number } | { end: number; result: R };

/** Runs every section; each case is noted once, in order within its section. */
export async function runSections<R extends Result>(run: Run<R>): Promise<void> {
  const deadline = performance.now() + run.limit * 1000;
  const waiting = [...run.sections];
  const work = async () => {
    for (let section = waiting.shift(); section; section = waiting.shift())
      await runSection(run, section, deadline);
  };
  await Promise.all(Array.from({ length: run.jobs }, work));
}

async function runSection<R extends Result>(
  run: Run<R>,
  section: Section<R>,
  deadline: number,
): Promise<void> {
  const labels = section.cases().map(({ label }) => label);
  const name = section.name;
  const caseLimit = Math.min(run.caseLimit, section.caseLimit ?? run.caseLimit);
  let crashes = 0;
  for (let next = 0; next < labels.length; ) {
    const left = deadline - performance.now();
    if (left <= 0 || crashes === patience) {
      const problem = left <= 0 ? `${run.limit} seconds were over` : `${patience} crashes in this section`;
      for (const label of labels.slice(next))
        run.note({ section: name, label, seconds: 0, status: 'not run', problem });
      return;
    }
    const limits = ['--limit', String(left / 1000), '--case-limit', String(caseLimit)];
    const args = [run.script, ...run.args, ...limits, '--section', name, '--from', String(next)];
    const { ended, why, seconds } = await watch<R>(args, left, caseLimit, (index, result, took) => {
      if (index !== next) throw new Error(`${name}: the child tells of case ${index}, not ${next}`);
      run.note({ section: name, label: labels[next++], seconds: took, status: 'ran', result });
    });
    if (next === labels.length || ended === 'out of time') continue;
    // A child that told of a lost context has noted its case; any other end is the fault of the case it was in.
    crashes++;
    if (ended === 'context lost') continue;
    run.note({ section: name, label: labels[next++], seconds, status: 'crashed', problem: why });
  }
}

interface Ending {
  ended: 'out of time' | 'context lost' | 'died';
  why: string;
  /** Since the last case began. */
  seconds: number;
}

const LOST_CONTEXT = 70;
/** Seconds that a process may take to begin its first case. */
const START = 60;

/** Starts a child and hears it out, until it ends or is ended. */
function watch<R>(
  args: readonly string[],
  left: number,
  caseLimit: number,
  onResult: (index: number, result: R, seconds: number) => void,
): Promise<Ending> {
  const child: ChildProcess = spawn(process.execPath, args, { stdio: ['ignore', 'inherit', 'pipe', 'pipe'] });
  let began = performance.now();
  let stopped: string | undefined;
  let errors = '';
  const limits = startLimits(left, caseLimit, (why) => {
    stopped ??= why;
    child.kill('SIGKILL');
  });
  child.stderr?.on('data', (chunk: Buffer) => {
    errors = (errors + chunk).slice(-2000);
  });
  const lines = createInterface({ input: child.stdio[3] as Readable });
  lines.on('line', (line) => {
    const message = JSON.parse(line) as Message<R>;
    if ('end' in message) onResult(message.end, message.result, (performance.now() - began) / 1000);
    began = performance.now();
    limits.rewind();
  });
  return new Promise((resolve) => {
    let code: number | null = null;
    let signal: NodeJS.Signals | null = null;
    let open = 2;
    const close = () => {
      if (--open) return;
      limits.end();
      const seconds = (performance.now() - began) / 1000;
      const said = errors.trim().split('\n').at(-1);
      const how = signal ? `ended by ${signal}` : `ended with status ${code}`;
      const ended =
        stopped === 'out of time' ? 'out of time' : code === LOST_CONTEXT ? 'context lost' : 'died';
      resolve({ ended, why: stopped ?? `its process ${how}${said ? `: ${said}` : ''}`, seconds });
    };
    lines.on('close', close);
    child.on('close', (status, by) => {
      [code, signal] = [status, by];
      close();
    });
    child.on('error', (error) => {
      errors += error.message;
    });
  });
}

/** Calls `stop` when all the time is over, or that of a case, which begins anew with each rewind. */
function startLimits(left: number, caseLimit: number, stop: (why: string) => void) {
  let stall: NodeJS.Timeout;
  const rewind = (start = 0) => {
    clearTimeout(stall);
    stall = setTimeout(() => stop(`no end after ${caseLimit} seconds`), (start + caseLimit) * 1000);
  };
  rewind(START);
  const overall = setTimeout(() => stop('out of time'), left);
  return {
    rewind: () => rewind(),
    end() {
      clearTimeout(stall);
      clearTimeout(overall);
    },
  };
}

/** The child's side: runs the cases of a section from the `from`-th on, telling the parent of each. */
export function runCases<R extends Result>(section: Section<R>, from: number): void {
  const tell = (message: Message<R | Result>) => writeSync(3, `${JSON.stringify(message)}\n`);
  section.cases().forEach(({ run }, i) => {
    if (i < from) return;
    tell({ begin: i });
    try {
      tell({ end: i, result: run() });
    } catch (error) {
      const problem = error instanceof Error ? `${error.name}: ${error.message}` : String(error);
      tell({ end: i, result: { problem } });
      if (error instanceof CudaError && stickyResults.has(error.result)) process.exit(LOST_CONTEXT);
    }
  });
}
