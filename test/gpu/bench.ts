// `npm run bench:gpu`: kernels and whole models timed on a real GPU, beside PyTorch's times where --peer names them
// (docs/gpu.md). One command that ends within its limit, writes each result as it comes, and prints a table last.
import { mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { benchSections, openRecord } from '../../bench/gpu/program.ts';
import { runCases, runSections } from '../../bench/gpu/sections.ts';
import { describeGpu, openApi, openGpu } from './device.ts';
import { chosen, main, type ProgramOptions, programOptions } from './program.ts';

interface Options extends ProgramOptions {
  peer?: string;
  choices?: string;
  smoke?: boolean;
  tune?: boolean;
  pdl: boolean;
}

main(async () => {
  const given = programOptions<Options>('bench:gpu', (command) =>
    command
      .option('--peer <file>', 'the JSON of a benchmark of PyTorch at the same shapes')
      .option('--tune', 'time every tile that a plan could choose, and write the fastest to choices.json')
      .option('--choices <file>', 'run with the choices that --tune wrote')
      .option('--no-pdl', "time the UNet's step without programmatic dependent launch as well")
      .option('--smoke', 'tiny shapes and few samples, to prove the program'),
  );
  const {
    device,
    out,
    limit,
    caseLimit,
    only,
    commit,
    peer,
    choices,
    smoke = false,
    tune = false,
    pdl,
  } = given;
  const options = { smoke, tune, choices, pdl };
  const sections = benchSections(() => openGpu(device), options);
  if (given.section !== undefined) {
    const section = sections.find(({ name }) => name === given.section);
    if (section) runCases(section, given.from);
    return;
  }
  const wanted = chosen(sections, only);
  const described = describeGpu(openApi(device, 2 ** 16), commit);
  console.log(described.text);
  mkdirSync(out, { recursive: true });
  const { record, note, table } = openRecord(out, described, options, peer);
  const flags = [smoke && '--smoke', tune && '--tune', !pdl && '--no-pdl'].filter((flag) => flag !== false);
  await runSections({
    script: fileURLToPath(import.meta.url),
    args: ['--device', device, ...flags, ...(choices ? ['--choices', choices] : [])],
    sections: wanted,
    jobs: 1,
    limit,
    caseLimit,
    note(outcome) {
      note(outcome);
      const took = `${outcome.section}: ${outcome.label.slice(0, 90)}: ${outcome.seconds.toFixed(1)} s`;
      console.log(outcome.status === 'ran' ? took : `${took}, ${outcome.status}: ${outcome.problem}`);
    },
  });
  for (const line of record.failures) console.log(`FAILED ${line}`);
  console.log(table());
  const { rows, failures, notRun } = record;
  console.log(`${rows.length} measured, ${failures.length} failed, ${notRun.length} not run`);
  process.exitCode = failures.length + notRun.length === 0 && rows.length > 0 ? 0 : 1;
});
