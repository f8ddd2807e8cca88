// The record of a comparison as a page: a table per section and type, with the sum that the model's call counts give.
import type { Direction } from '../../engine/device.ts';
import type { FloatDType } from '../../io/dtype.ts';

export interface Row {
  section: string;
  op: string;
  direction: Direction;
  dtype: FloatDType;
  shapes: string;
  /** Calls in one pass of the model. */
  count: number;
  flops: number;
  bytes: number;
  /** Median seconds of a call. */
  ours: number;
  torch: number;
  /** Fastest calls, which a busy machine disturbs less. */
  ours_best: number;
  torch_best: number;
  runs: number;
}

export interface Comparison {
  preset: string;
  subject: string;
  width: number;
  height: number;
  batch: number;
  rounds: number;
  threads: number;
  share_blocks: boolean;
  cpu: string;
  date: string;
  commit: string;
  torch: string;
  node: string;
  rows: Row[];
}

export function markdown(record: Comparison): string {
  const { preset, subject, width, height, batch, threads, rounds, cpu, date, commit, torch, node } = record;
  const groups = new Map<string, Row[]>();
  for (const row of record.rows) {
    const key = `${row.section} ${row.direction}, ${row.dtype}`;
    groups.set(key, [...(groups.get(key) ?? []), row]);
  }
  const head = [
    `# ${preset} ${subject}, ${width}x${height}, batch ${batch}: sdxl beside PyTorch`,
    '',
    `${cpu}, ${threads} threads each; ${date.slice(0, 10)}, commit ${commit}; PyTorch ${torch}, Node ${node}.`,
    `Both sides take turns in one run (${rounds} rounds) after a warm-up; times are medians of a call in milliseconds, and`,
    'the ratio is PyTorch\'s time over ours: above 1 we are faster. "calls" is how often one pass makes the call, and the',
    'last row of a table weighs each call by it. "of best" is the ratio of the fastest calls, which other work on the',
    'machine disturbs less.',
  ];
  if (record.share_blocks)
    head.push(
      '',
      "The blocks of a transformer share their weights here, on both sides, so that two models fit in memory: a block's",
      'weights are several times the last-level cache, so each block still reads its own from memory.',
    );
  const tables = [...groups].map(([title, rows]) => `## ${title}\n\n${table(rows)}`);
  return `${[head.join('\n'), ...tables].join('\n\n')}\n`;
}

function table(rows: readonly Row[]): string {
  const flops = rows.some((row) => row.flops > 0);
  const rate = (row: { flops: number; bytes: number }, seconds: number) =>
    ((flops ? row.flops : row.bytes) / seconds / 1e9).toFixed(flops ? 0 : 1);
  const unit = flops ? 'GFLOP/s' : 'GB/s';
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const cells = (name: string, calls: number, row: Omit<Row, 'shapes'>) => [
    name,
    String(calls),
    (row.ours * 1000).toFixed(3),
    (row.torch * 1000).toFixed(3),
    rate(row, row.ours),
    rate(row, row.torch),
    (row.torch / row.ours).toFixed(2),
    (row.torch_best / row.ours_best).toFixed(2),
  ];
  const total = (name: string, of: readonly Row[]) => {
    const sum = (what: (row: Row) => number) => of.reduce((all, row) => all + row.count * what(row), 0);
    const all = {
      ...of[0],
      flops: sum((r) => r.flops),
      bytes: sum((r) => r.bytes),
      ours: sum((r) => r.ours),
      torch: sum((r) => r.torch),
      ours_best: sum((r) => r.ours_best),
      torch_best: sum((r) => r.torch_best),
    };
    const calls = sum(() => 1);
    return line(cells(name, calls, all));
  };
  const body = rows.map((row) => line(cells(brief(row), row.count, row)));
  const silu = rows.filter((row) => row.shapes.endsWith('+silu'));
  if (silu.length > 1) body.push(total('**all calls with SiLU**', silu));
  if (rows.length > 1) body.push(total('**all calls of a pass**', rows));
  const head = [
    'shapes',
    'calls',
    'ours ms',
    'torch ms',
    `ours ${unit}`,
    `torch ${unit}`,
    'ratio',
    'of best',
  ];
  return [line(head), line(head.map(() => '---')), ...body].join('\n');
}

/** Shapes without the type that the table's title has, nor what vectors add. */
const brief = ({ op, shapes, dtype }: Row): string =>
  `${op} ${shapes.replaceAll(` ${dtype}`, '').replace(/ {2}bias \[\d+\]/, ' +bias')}`;
