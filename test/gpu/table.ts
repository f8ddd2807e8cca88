// The table that test:gpu ends with: a row per section and storage type, with what passed, failed and was not reached.
import type { Outcome } from '../../bench/gpu/sections.ts';
import type { Check } from './checks.ts';

export type Checked = Outcome<Check> & { type: string };

export interface Row {
  section: string;
  type: string;
  cases: number;
  passed: number;
  failed: number;
  notRun: number;
  skipped: number;
  /** The error nearest to its bound, or farthest over it. */
  error: number;
  seconds: number;
}

const failedIn = (each: Checked): boolean =>
  each.status === 'crashed' || (each.status === 'ran' && each.result.problem !== undefined);

export function rowsOf(outcomes: readonly Checked[]): Row[] {
  const rows = new Map<string, Row & { closeness: number }>();
  for (const each of outcomes) {
    const key = `${each.section} ${each.type}`;
    const empty = {
      cases: 0,
      passed: 0,
      failed: 0,
      notRun: 0,
      skipped: 0,
      error: 0,
      seconds: 0,
      closeness: -1,
    };
    const row = rows.get(key) ?? { section: each.section, type: each.type, ...empty };
    rows.set(key, row);
    const count = (each.status === 'ran' && each.result.count) || 1;
    row.cases += count;
    row.seconds += each.seconds;
    if (each.status === 'not run') row.notRun++;
    else if (failedIn(each)) row.failed++;
    else if (each.status === 'ran' && each.result.skipped) row.skipped++;
    else row.passed += count;
    if (each.status !== 'ran') continue;
    const { error, bound } = each.result;
    const closeness = bound ? error / bound : error;
    if (closeness > row.closeness) Object.assign(row, { error, closeness });
  }
  return [...rows.values()].map(({ closeness: _, ...row }) => row);
}

export function tableOf(rows: readonly Row[]): string {
  const head = [
    'section',
    'type',
    'cases',
    'passed',
    'failed',
    'not run',
    'skipped',
    'worst error',
    'seconds',
  ];
  const cells = rows.map((row) => [
    row.section,
    row.type,
    ...[row.cases, row.passed, row.failed, row.notRun, row.skipped].map(String),
    row.error ? row.error.toExponential(1) : '0',
    row.seconds.toFixed(1),
  ]);
  const widths = head.map((name, i) => Math.max(name.length, ...cells.map((line) => line[i].length)));
  const show = (line: readonly string[]) =>
    line.map((cell, i) => (i < 2 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join('  ');
  return [head, ...cells].map((line) => show(line).trimEnd()).join('\n');
}

/** One line for each failure: what, where, and what is wrong with it. */
export const failuresOf = (outcomes: readonly Checked[]): string[] =>
  outcomes.filter(failedIn).map((each) => {
    const problem =
      each.status === 'ran' ? each.result.problem : each.status === 'crashed' ? each.problem : '';
    return `${each.section}: ${each.label}: ${problem}`;
  });
