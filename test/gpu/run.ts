// `npm run test:gpu`: all kernels on a real GPU, against the CPU and the virtual GPU (docs/gpu.md). One command that ends
// within its limit, writes each result as it comes, and prints a table last. `--device virtual` runs the same program on the
// virtual GPU. With --section it is the child that runs one section.
import { appendFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { runCases, runSections } from '../../bench/gpu/sections.ts';
import { checkSections } from './checks.ts';
import { describeGpu, openApi } from './device.ts';
import { chosen, main, type ProgramOptions, programOptions } from './program.ts';
import { type Checked, failuresOf, rowsOf, tableOf } from './table.ts';

interface Options extends ProgramOptions {
  jobs: number;
  pdl: boolean;
}

async function parent(options: Options): Promise<void> {
  const { device, out, limit, caseLimit, jobs, pdl, only, commit } = options;
  const sections = chosen(checkSections(options), only);
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
    args: ['--device', device, ...(pdl ? [] : ['--no-pdl'])],
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
  if (device === 'virtual' && skipped > 0)
    console.log(
      `The virtual GPU leaves out what takes minutes there: ${skipped} cases. A real GPU runs all.`,
    );
  console.log(`${passed} passed, ${failed} failed, ${notRun} not run, ${skipped} skipped`);
  process.exitCode = failed + notRun === 0 && passed > 0 ? 0 : 1;
}

main(async () => {
  const given = programOptions<Options>('test:gpu', (command) =>
    command
      .option('--jobs <count>', 'sections at a time', Number, 4)
      .option('--no-pdl', 'without programmatic dependent launch, to tell whether that is what fails'),
  );
  if (given.section === undefined) return parent(given);
  const section = checkSections(given).find(({ name }) => name === given.section);
  if (section) runCases(section, given.from);
});
