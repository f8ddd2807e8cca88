// What `npm run bench:gpu` runs and writes: sections of kernels and models, each measurement kept as it comes, beside a peer's
// where there is one.
import { appendFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Choice } from '../../engine/cuda/plan_sm90.ts';
import { compared, type Peer } from './compare.ts';
import { type BenchGpu, type Measure, withoutPdl } from './gpu.ts';
import { workshop } from './kernels.ts';
import { modelSections } from './models.ts';
import { type BenchRecord, markdown, shortTable } from './report.ts';
import type { Outcome } from './sections.ts';
import { type BenchSection, kernelSections, type Scale } from './shapes.ts';
import { openTimer } from './timer.ts';
import { choicesOf, type Tuned, tuneSection, useChoices } from './tune.ts';

export interface BenchOptions {
  smoke: boolean;
  tune: boolean;
  /** Where false, the UNet's step is timed without programmatic dependent launch as well. */
  pdl: boolean;
  /** A table that a tuning run wrote. */
  choices?: string;
}

const scaleOf = ({ smoke }: BenchOptions): Scale =>
  smoke ? { preset: 'tiny', side: 32, smoke } : { preset: 'sdxl-base', side: 1024, smoke };

const read = (path: string): unknown => JSON.parse(readFileSync(path, 'utf8'));

export function benchSections(open: () => BenchGpu, options: BenchOptions): BenchSection[] {
  const scale = scaleOf(options);
  const prepared = () => {
    if (options.choices) useChoices(read(options.choices) as Record<string, Choice>);
    return open();
  };
  const timerOf = (gpu: BenchGpu) => openTimer(gpu, options.smoke);
  const shop = workshop(prepared, timerOf);
  const plain = options.pdl ? undefined : workshop(() => withoutPdl(prepared()), timerOf);
  if (options.tune) return [tuneSection(shop, scale)];
  const [unet, ...models] = modelSections(shop, scale, plain);
  return [unet, ...kernelSections(shop, scale), ...models];
}

type Described = Pick<BenchRecord, 'gpu' | 'capability' | 'driver' | 'cuda' | 'date' | 'commit' | 'node'>;

/** Takes outcomes one by one; after each, all files in `out` are as complete as they can be. */
export function openRecord(out: string, described: Described, options: BenchOptions, peerPath?: string) {
  const peer = peerPath ? (read(peerPath) as Peer) : undefined;
  const { preset, side } = scaleOf(options);
  const record: BenchRecord = {
    ...described,
    ...{ preset, side, peer: peer?.meta, rows: [], failures: [], notRun: [] },
  };
  const tuned: Tuned[] = [];
  const lines = join(out, 'ours.jsonl');
  writeFileSync(lines, '');
  const json = (name: string, value: unknown) =>
    writeFileSync(join(out, name), `${JSON.stringify(value, null, 1)}\n`);
  return {
    record,
    note(outcome: Outcome<Measure & { tuned?: Tuned }>): void {
      appendFileSync(lines, `${JSON.stringify(outcome)}\n`);
      const where = `${outcome.section}: ${outcome.label}`;
      if (outcome.status === 'not run') record.notRun.push(`${where}: ${outcome.problem}`);
      else if (outcome.status === 'crashed') record.failures.push(`${where}: ${outcome.problem}`);
      else {
        const { result } = outcome;
        // A case that threw has a problem and nothing else.
        if (result.problem) record.failures.push(`${where}: ${result.problem}`);
        if (result.timing) record.rows.push(compared(outcome.section, result, peer));
        if (result.tuned) tuned.push(result.tuned);
      }
      json('ours.json', record);
      if (tuned.length) json('choices.json', choicesOf(tuned));
      writeFileSync(join(out, 'report.md'), markdown(record));
    },
    table: () => shortTable(record.rows),
  };
}
