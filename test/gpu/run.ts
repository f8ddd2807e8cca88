// `npm run test:gpu`: all kernels on a real GPU, against the CPU and the virtual GPU (docs/gpu.md). One command that ends
// within its limit, writes each result as it comes, and prints a table last. `--device virtual` runs the same program on the
// virtual GPU. With --section it is the child that runs one section.
import { appendFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command } from 'commander';
import { runCases, runSections } from '../../bench/gpu/sections.ts';
import { UserError } from '../../io/errors.ts';
import { type CheckSection, checkSections } from './checks.ts';
import { describeGpu, openApi } from './device.ts';
import { type Checked, failuresOf, rowsOf, tableOf } from './table.ts';

interface Options {
  device: string;
  out: string;
  limit: number;
  caseLimit: number;
  jobs: number;
  only?: string;
  commit?: string;
  section?: string;
  from: number;
}

function options(): Options {
  const command = new Command('test:gpu')
    .option('--device <name>', 'cuda, cuda:N, or virtual', 'cuda:0')
    .option('--out <folder>', 'where test-gpu.json and test-gpu.jsonl go', 'gpu-out')
    .option('--limit <seconds>', 'for all; what is left then is told as not run', Number, 460)
    .option('--case-limit <seconds>', 'for one case, before its process is ended', Number, 120)
    .option('--jobs <count>', 'sections at a time', Number, 4)
    .option(
      '--only <names>',
      'sections whose names begin with one of these, comma-separated: micro,op linear,golden',
    )
    .option('--commit <name>', 'for the record, where git is not at hand')
    .option('--section <name>')
    .option('--from <case>', '', Number, 0)
    .helpOption('--help');
  for (const hidden of command.options.slice(-2)) hidden.hideHelp();
  return command.parse().opts<Options>();
}

function chosen(sections: readonly CheckSection[], only: string | undefined): CheckSection[] {
  const names = only?.split(',').map((name) => name.trim());
  const found = sections.filter(({ name }) => !names || names.some((prefix) => name.startsWith(prefix)));
  const unknown = names?.find((prefix) => !sections.some(({ name }) => name.startsWith(prefix)));
  if (unknown !== undefined) {
    const known = sections.map(({ name }) => name).join(', ');
    throw new UserError(`no section begins with "${unknown}"; there are ${known}`);
  }
  return found;
}

async function parent({ device, out, limit, caseLimit, jobs, only, commit }: Options): Promise<void> {
  const sections = chosen(checkSections(device), only);
  const gpu = describeGpu(openApi(device, 2 ** 16), commit);
  console.log(gpu.text);
  mkdirSync(out, { recursive: true });
  const lines = join(out, 'test-gpu.jsonl');
  writeFileSync(lines, '');
  const types = new Map(
    sections.flatMap(({ name, cases }) =>
      cases().map(({ label, type }) => [`${name} ${label}`, type] as const),
    ),
  );
  const outcomes: Checked[] = [];
  await runSections({
    script: fileURLToPath(import.meta.url),
    args: ['--device', device],
    sections,
    jobs,
    limit,
    caseLimit,
    note(outcome) {
      const checked = { ...outcome, type: types.get(`${outcome.section} ${outcome.label}`) ?? '' };
      outcomes.push(checked);
      appendFileSync(lines, `${JSON.stringify(checked)}\n`);
      for (const line of failuresOf([checked])) console.log(line);
    },
  });
  const order = sections.map(({ name }) => name);
  const rows = rowsOf(outcomes).sort((a, b) => order.indexOf(a.section) - order.indexOf(b.section));
  const failures = failuresOf(outcomes);
  const sum = (of: 'passed' | 'failed' | 'notRun' | 'skipped') =>
    rows.reduce((total, row) => total + row[of], 0);
  const totals = {
    passed: sum('passed'),
    failed: sum('failed'),
    notRun: sum('notRun'),
    skipped: sum('skipped'),
  };
  const record = { ...gpu, totals, rows, failures };
  writeFileSync(join(out, 'test-gpu.json'), `${JSON.stringify(record, null, 1)}\n`);
  console.log(tableOf(rows));
  const { passed, failed, notRun, skipped } = totals;
  console.log(`${passed} passed, ${failed} failed, ${notRun} not run, ${skipped} skipped`);
  process.exitCode = failed + notRun === 0 && passed > 0 ? 0 : 1;
}

async function main(): Promise<void> {
  const given = options();
  if (given.section === undefined) return parent(given);
  const section = checkSections(given.device).find(({ name }) => name === given.section);
  if (section) runCases(section, given.from);
}

main().catch((error) => {
  console.error(error instanceof UserError ? error.message : error);
  process.exitCode = error instanceof UserError ? 2 : 1;
});
