// The record of a run as a page and as the table it ends with: a table per section, with the sum that the model's call
// counts give, ours beside the peer's.
import type { Compared } from './compare.ts';

export interface BenchRecord {
  gpu: string;
  capability: string;
  driver: string;
  cuda: number;
  date: string;
  commit: string;
  node: string;
  preset: string;
  side: number;
  peer?: Readonly<Record<string, unknown>>;
  rows: Compared[];
  failures: string[];
  notRun: string[];
}

const head = ['', 'calls', 'us', 'peer us', 'ratio', 'TFLOP/s', 'GB/s', 'launched us', 'drift %', 'error'];

const fixed = (x: number | undefined, digits: number): string => (x === undefined ? '' : x.toFixed(digits));

function cells(row: Compared): string[] {
  const flops = row.tflops !== undefined && row.tflops > 0;
  return [
    row.problem ? `${row.name}: WRONG` : row.name,
    row.count ? String(row.count) : '',
    fixed(row.ours_us, row.ours_us < 100 ? 2 : 0),
    fixed(row.theirs_us, (row.theirs_us ?? 0) < 100 ? 2 : 0),
    fixed(row.ratio, 2),
    flops ? fixed(row.tflops, 0) : '',
    flops ? '' : fixed(row.gbps, 0),
    fixed(row.eager_us, 1),
    fixed(row.drift_pct, 1),
    row.rel_err === undefined ? '' : row.rel_err.toExponential(1),
  ];
}

/** All calls of one pass: times weighed by their counts; the peer's only where it has every one. */
export function totalOf(rows: readonly Compared[]): Compared | undefined {
  const counted = rows.filter(({ count }) => count);
  if (counted.length < 2) return undefined;
  const sum = (of: (row: Compared) => number) =>
    counted.reduce((total, row) => total + (row.count as number) * of(row), 0);
  const ours_us = sum((row) => row.ours_us);
  const known = counted.every(({ theirs_us }) => theirs_us !== undefined);
  const theirs_us = known ? sum((row) => row.theirs_us as number) : undefined;
  return {
    section: counted[0].section,
    name: 'all calls of a pass',
    count: sum(() => 1),
    ours_us,
    theirs_us,
    ratio: theirs_us && ours_us / theirs_us,
    tflops: sum((row) => (row.tflops ?? 0) * row.ours_us) / ours_us || undefined,
    gbps: sum((row) => (row.gbps ?? 0) * row.ours_us) / ours_us || undefined,
    drift_pct: Math.max(...counted.map(({ drift_pct }) => drift_pct)),
    problem: counted.find(({ problem }) => problem)?.problem,
  };
}

function sectionsOf(rows: readonly Compared[]): [string, Compared[]][] {
  const found = new Map<string, Compared[]>();
  for (const row of rows) found.set(row.section, [...(found.get(row.section) ?? []), row]);
  return [...found].map(([name, own]) => {
    const total = totalOf(own);
    return [name, total ? [...own, total] : own];
  });
}

export function markdown(record: BenchRecord): string {
  const { gpu, capability, driver, cuda, date, commit, node, preset, side, peer } = record;
  const line = (parts: readonly string[]) => `| ${parts.join(' | ')} |`;
  const table = (rows: readonly Compared[]) =>
    [line(head), line(head.map(() => '---')), ...rows.map((row) => line(cells(row)))].join('\n');
  const figures = record.rows
    .filter(({ more }) => more)
    .map((row) => {
      const each = Object.entries(row.more ?? {}).map(([name, value]) => `${name} ${value.toFixed(2)}`);
      return `- ${row.name}: ${each.join(', ')}`;
    });
  const beside = record.rows.filter(({ theirs }) => theirs).map(({ name, theirs }) => `- ${name}: ${theirs}`);
  const list = (title: string, lines: readonly string[]) =>
    lines.length ? [`## ${title}`, lines.join('\n')] : [];
  return `${[
    `# ${preset} at ${side}x${side} on ${gpu}`,
    [
      `Compute capability ${capability}, driver ${driver}, CUDA ${cuda / 1000}; ${date}, commit ${commit}, Node ${node}.`,
      peer
        ? `Beside it: PyTorch ${peer.torch} on ${peer.gpu ?? 'cpu'}, ${peer.started}.`
        : 'No peer was measured.',
      'Times are medians of device time in microseconds, replayed from a graph where it says nothing else; a ratio below 1',
      'means that we are faster. "launched" is the same call without a graph. The error is against float32 on the device.',
    ].join('\n'),
    ...sectionsOf(record.rows).flatMap(([name, rows]) => [`## ${name}`, table(rows)]),
    ...list('Other figures', figures),
    ...list("Which of the peer's", beside),
    ...list(
      'Failures',
      record.failures.map((each) => `- ${each}`),
    ),
    ...list(
      'Not run',
      record.notRun.map((each) => `- ${each}`),
    ),
  ].join('\n\n')}\n`;
}

/** Sections and their sums for the screen. */
export function shortTable(rows: readonly Compared[]): string {
  const shown = sectionsOf(rows).flatMap(([name, own]) => {
    const total = own.at(-1) as Compared;
    return own.length > 6 && total.name === 'all calls of a pass'
      ? [{ ...total, name: `${name}: all ${total.count} calls of a pass` }]
      : own.map((row) => ({ ...row, name: `${name}: ${row.name}` }));
  });
  const lines = [head, ...shown.map(cells)];
  const widths = head.map((_, i) => Math.max(...lines.map((line) => line[i].length)));
  return lines
    .map((line) => line.map((cell, i) => (i ? cell.padStart(widths[i]) : cell.padEnd(widths[i]))).join('  '))
    .join('\n');
}
