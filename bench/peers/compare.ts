// Our kernels and whole UNet beside PyTorch's, in one run: `node dist/bench/peers/compare.js SECTION... [options]`. Both
// sides get the same shapes, which the model itself gives, and as many threads; they take turns, so that whatever slows
// the machine slows both, and medians are compared. Nothing is measured where torch is absent.
import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { Command, Option } from 'commander';
import { type Device, type Direction, openDevice } from '../../engine/device.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { writeFileAtomic } from '../../io/files.ts';
import { packageRoot } from '../../io/package_root.ts';
import { presets } from '../../models/formats/presets.ts';
import { flopsOf, type OpCase, opCases, prepareCase, runsWithin, shapesOf } from '../ops.ts';
import { fillRandom, fillSharingBlocks } from '../pool_weights.ts';
import { buildSubject, type SubjectName } from '../subjects.ts';
import { median, stopwatch } from '../timing.ts';
import { openPeer, type Peer } from './peer.ts';
import { type Comparison, markdown, type Row } from './table.ts';

interface Options {
  preset: string;
  width: number;
  height: number;
  batch: number;
  dtypes: FloatDType[];
  subject: SubjectName;
  backward?: boolean;
  shareBlocks?: boolean;
  opponents: Opponent[];
  diffusers?: string;
  rounds: number;
  threads: number;
  python: string;
  out: string;
  name: string;
}

/** The UNet in plain torch, channels last; or diffusers' own, as it comes or channels last. */
const opponents = ['torch', 'diffusers', 'diffusers-channels-last'] as const;
type Opponent = (typeof opponents)[number];

/** The ops of each section; what rides along (bias, residual, activation) is timed with them on both sides. */
const sections: Record<string, readonly string[]> = {
  gemm: ['linear', 'linear_activated'],
  conv: ['conv2d'],
  attention: ['attention'],
  norm: ['group_norm', 'layer_norm'],
  unet: [],
};

const list = (text: string): string[] => text.split(',');

async function compare(names: readonly string[], options: Options): Promise<void> {
  const unknown = options.opponents.find((name) => !opponents.includes(name));
  if (unknown) program.error(`--opponents: ${unknown} is none of ${opponents.join(', ')}`, { exitCode: 2 });
  const theirs = options.opponents.some((name) => name !== 'torch');
  if (theirs && (!options.diffusers || options.preset !== 'sdxl-base'))
    program.error("diffusers' UNet needs --diffusers DIR, where its source lies, and --preset sdxl-base", {
      exitCode: 2,
    });
  const peer = await openPeer(options.python, options.threads);
  if ('reason' in peer) {
    console.log(`skipped: PyTorch could not be started with ${options.python} (${peer.reason})`);
    return;
  }
  const device = openDevice('cpu');
  const rows: Row[] = [];
  const began = new Date();
  for (const section of names)
    for (const dtype of options.dtypes) {
      if (section === 'unet')
        for (const opponent of options.opponents)
          rows.push(await compareUNet(opponent, dtype, options, device, peer));
      else
        for (const each of casesOf(section, dtype, options))
          rows.push(await compareCase(section, each, dtype, options, device, peer));
    }
  peer.close();
  const { width, height, batch, preset, subject, rounds, threads, shareBlocks = false } = options;
  const facts = { preset, subject, width, height, batch, rounds, threads, share_blocks: shareBlocks };
  const record: Comparison = {
    ...facts,
    cpu: cpus()[0].model,
    date: began.toISOString(),
    commit: execFileSync('git', ['-C', packageRoot, 'rev-parse', '--short', 'HEAD'], {
      encoding: 'utf8',
    }).trim(),
    torch: peer.torch,
    node: process.version,
    rows,
  };
  mkdirSync(options.out, { recursive: true });
  writeFileAtomic(join(options.out, `${options.name}.json`), `${JSON.stringify(record, null, 1)}\n`);
  writeFileAtomic(join(options.out, `${options.name}.md`), markdown(record));
}

function casesOf(section: string, dtype: FloatDType, options: Options): OpCase[] {
  const { width, height, batch, preset, subject } = options;
  return opCases(preset, { width, height, batch }, dtype, [subject]).filter(({ record }) =>
    sections[section].includes(record.name),
  );
}

/** Inputs whose gradient costs PyTorch nothing or is not asked for here. */
const passive = ['residual', 'shift'];

async function compareCase(
  section: string,
  each: OpCase,
  dtype: FloatDType,
  { rounds, backward }: Options,
  device: Device,
  peer: Peer,
): Promise<Row> {
  const direction: Direction = backward ? 'backward' : 'forward';
  const entries = Object.entries(each.inputs).filter(([name]) => !backward || !passive.includes(name));
  const shown = { ...each, inputs: Object.fromEntries(entries) };
  const ours = prepareCase(shown, direction, device);
  const inputs = Object.fromEntries(entries.map(([name, { shape }]) => [name, shape]));
  await peer.prepare({ op: each.record.name, direction, inputs, attrs: each.attrs, dtype });
  const times = await takeTurns(ours.once, peer, rounds, 0.05);
  ours.release();
  device.memory.trim();
  await peer.drop();
  const row: Row = {
    section,
    op: each.record.name,
    direction,
    dtype,
    shapes: shapesOf(shown) + activationOf(each.attrs),
    count: each.count,
    flops: flopsOf(each, direction),
    bytes: (backward ? 2 : 1) * each.bytes,
    ...times,
  };
  return told(row);
}

/** What both sides apply to the result: "  +silu", or nothing. */
function activationOf(attrs: unknown): string {
  const { silu, activation = 'none' } = attrs as { silu?: boolean; activation?: string };
  const name = silu ? 'silu' : activation;
  return name === 'none' ? '' : `  +${name}`;
}

/** One forward pass of the whole UNet. */
async function compareUNet(
  opponent: Opponent,
  dtype: FloatDType,
  options: Options,
  device: Device,
  peer: Peer,
): Promise<Row> {
  const { preset, width, height, batch, rounds, shareBlocks = false, diffusers: source = '' } = options;
  const sizes = { width, height, batch };
  const fill = shareBlocks ? fillSharingBlocks : fillRandom;
  const ours = buildSubject('unet', presets[preset], sizes, device, dtype, fill);
  await peer.prepare({ unet: { opponent, source, preset, ...sizes, dtype, share_blocks: shareBlocks } });
  const times = await takeTurns(() => stopwatch(() => ours.run(), device), peer, rounds, 0);
  ours.release();
  device.memory.trim();
  await peer.drop();
  const flops = opCases(preset, sizes, dtype, ['unet']).reduce(
    (sum, each) => sum + each.count * each.flops,
    0,
  );
  const beside = opponent === 'torch' ? '' : `, beside ${opponent}`;
  const shapes = `${width}x${height}, batch ${batch}${beside}`;
  return told({
    section: 'unet',
    op: 'unet',
    direction: 'forward',
    dtype,
    shapes,
    count: 1,
    flops,
    bytes: 0,
    ...times,
  });
}

/** Warms both sides up, then alternates: in each round each side runs for about `turn` seconds. Medians over all calls. */
async function takeTurns(once: () => number, peer: Peer, rounds: number, turn: number) {
  once();
  await peer.run(1);
  const ourRuns = turn ? runsWithin(turn, once()) : 1;
  const theirRuns = turn ? runsWithin(turn, (await peer.run(1))[0]) : 1;
  const [ours, theirs]: number[][] = [[], []];
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < ourRuns; i++) ours.push(once());
    await sleep(5);
    theirs.push(...(await peer.run(theirRuns)));
    await sleep(5);
  }
  return {
    ours: median(ours),
    torch: median(theirs),
    ours_best: Math.min(...ours),
    torch_best: Math.min(...theirs),
    runs: ours.length,
  };
}

function told(row: Row): Row {
  const ms = (seconds: number) => `${(seconds * 1000).toFixed(3)} ms`;
  const what = `${row.op} ${row.direction} ${row.shapes}`;
  const [ratio, best] = [row.torch / row.ours, row.torch_best / row.ours_best].map((x) => x.toFixed(2));
  console.log(`${ratio}x (best ${best}x)  ours ${ms(row.ours)}  torch ${ms(row.torch)}  ${what}`);
  return row;
}

const whole = (text: string): number => Number.parseInt(text, 10);

const program = new Command('compare')
  .argument('<sections...>', Object.keys(sections).join(', '))
  .option('--preset <NAME>', 'whose shapes', 'sdxl-base')
  .addOption(new Option('--subject <NAME>', 'the model whose ops are timed').default('unet'))
  .option('--width <N>', 'pixels', whole, 512)
  .option('--height <N>', 'pixels', whole, 512)
  .option('--batch <N>', 'images', whole, 1)
  .option('--dtypes <LIST>', 'by commas', list, ['float32', 'bfloat16'])
  .option('--backward', 'time gradients instead')
  .option('--share-blocks', 'unet: blocks of a transformer share weights on both sides, to fit memory')
  .option('--opponents <LIST>', `unet: ${opponents.join(', ')}, by commas`, list, ['torch'])
  .option('--diffusers <DIR>', "the folder of diffusers' source, for its UNet")
  .option('--rounds <N>', 'turns of each side', whole, 5)
  .option('--threads <N>', 'of each side', whole, cpus().length)
  .option('--python <PATH>', 'a Python that has torch', 'python3')
  .option('--out <DIR>', 'folder of the record', join(packageRoot, 'bench', 'results'))
  .option('--name <NAME>', 'file name of the record', 'cpu-peers')
  .action(compare);

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) await program.parseAsync();
