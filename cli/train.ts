// `sdxl train` and `sdxl plan`: a run file to a trained model, or to what training it would take. Runs of one file are
// trained in order. Ctrl-C saves and leaves; a second one leaves at once.
import { existsSync, mkdtempSync, realpathSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Command } from 'commander';
import { type Device, deviceNames, openDevice } from '../engine/device.ts';
import { standInCuda, standInDevice } from '../engine/profile.ts';
import { UserError } from '../io/errors.ts';
import { asUserError } from '../io/files.ts';
import { lockFolder } from '../io/lock.ts';
import { packageRoot } from '../io/package_root.ts';
import { clearOutput, listCheckpoints, readState } from '../train/checkpoint.ts';
import { finalOf, isFinished } from '../train/final.ts';
import { DRIVERS_SHARE, fitInto, tellFit } from '../train/fit.ts';
import { foreseen } from '../train/foreseen.ts';
import { type Locate, type Materials, openMaterials, stateOf } from '../train/materials.ts';
import { requirePasses } from '../train/passes/replicas.ts';
import type { Report } from '../train/passes/task.ts';
import { describe, type Plan, planOf } from '../train/plan.ts';
import { loadRuns } from '../train/run/load_run.ts';
import { requireAverages } from '../train/run/rules/methods.ts';
import type { Run } from '../train/run/run.ts';
import { train } from '../train/trainer.ts';
import { below } from './help.ts';
import { downloadsOn, locatorOf } from './model.ts';
import { bytes, devices, texts } from './option_values.ts';
import { type Bar, progressBar } from './progress.ts';
import { heedingSignals, printable, Stopped, type Terminal } from './terminal.ts';

interface Options {
  set?: string[];
  resume?: boolean | string;
  only?: string;
  json?: boolean;
  device: string;
  quiet?: boolean;
}

interface PlanOptions extends Omit<Options, 'device'> {
  device?: string;
  vram?: number;
}

/** Where the keys are told that a run file may have. */
const keys = `A run file may have the keys of the type Run, which an editor shows at defineRun:
  ${join(packageRoot, 'dist', 'train', 'run', 'run.d.ts')}
sdxl plan RUN.ts --json prints all keys of a run with their values. Recipes to begin with:
  ${join(packageRoot, 'configs')}`;

const trainExamples = `
Examples:
  sdxl train configs/lora.ts --set dataset.path=pictures
  sdxl train configs/lora.ts --set dataset.path=pictures --set steps=2000 --resume
  sdxl train configs/controlnet.ts --set dataset.path=pictures --device cuda:0,cuda:1
  sdxl train several.ts --only my-vae

${keys}`;

const planExamples = `
Examples:
  sdxl plan configs/lora.ts --set dataset.path=pictures
  sdxl plan configs/lora.ts --set dataset.path=pictures --vram 12GiB
  sdxl plan configs/ssd-1b.ts --set dataset.path=pictures --device cuda:0,cuda:1 --json

${keys}`;

export function addTrain(command: Command, terminal: Terminal): void {
  addShared(command)
    .option('--resume [CHECKPOINT]', "continue from a checkpoint (default: the run's newest)")
    .option('--device <NAME>', `${devices}; or several GPUs of this machine, as cuda:0,cuda:1`, 'auto')
    .option('--json', "the log's lines on stdout as they come, and a last one that says what was written")
    .addHelpText('after', below(trainExamples))
    .action((file: string, options: Options) =>
      heedingExit(file, terminal, () => trainAll(file, options, terminal)),
    );
}

export function addPlan(command: Command, terminal: Terminal): void {
  addShared(command)
    .option(
      '--device <NAME>',
      'whose memory to plan: cpu, cuda, or cuda:0,cuda:1; needs no GPU (default: cpu, or cuda with --vram)',
    )
    .option(
      '--vram <SIZE>',
      "a GPU's memory, such as 12GiB: what to set for each run to fit into that",
      bytes('--vram'),
    )
    .option(
      '--json',
      'a JSON object for each run, on a line of its own: all keys, updates, parameters, bytes',
    )
    .addHelpText('after', below(planExamples))
    .action((file: string, options: PlanOptions) =>
      heedingExit(file, terminal, () => planAll(file, options, terminal)),
    );
}

const addShared = (command: Command): Command =>
  command
    .option(
      '--set <KEY=VALUE>',
      'override a key of the run, such as optimizer.lr=5e-6; may be given more than once',
      texts,
    )
    .option('--only <NAME>', 'of several runs in the file, this one')
    .option('--quiet', 'no progress');

/** Does `work`. Where the run file ends the program meanwhile, as scripts do when they are done, that is not to look like success. */
async function heedingExit(file: string, terminal: Terminal, work: () => Promise<void>): Promise<void> {
  const tell = (status: number) => {
    if (status >= 128) return; // by a signal
    terminal.err(`error: ${file} ends the program before its work is done; take process.exit out of it\n`);
    process.exitCode = 2;
  };
  const leaveToNode = () => void process.off('exit', tell); // a bug, which shows its stack
  process.once('exit', tell);
  process.once('uncaughtExceptionMonitor', leaveToNode);
  try {
    await work();
  } finally {
    process.off('exit', tell);
    process.off('uncaughtExceptionMonitor', leaveToNode);
  }
}

/** The runs of a file that are asked for, which have work for so many GPUs. */
async function chosenRuns(
  file: string,
  { set, only }: Pick<Options, 'set' | 'only'>,
  gpus: number,
): Promise<Run[]> {
  const runs = await loadRuns(file, set, only);
  for (const run of runs) {
    requirePasses(run, gpus);
    requireAverages(run, gpus);
  }
  return runs;
}

async function planAll(file: string, options: PlanOptions, terminal: Terminal): Promise<void> {
  const { locate, report } = tools(terminal, options.quiet);
  const { vram, device = vram === undefined ? 'cpu' : 'cuda' } = options;
  const planned = deviceNames(device).map(standIn);
  const runs = await chosenRuns(file, options, planned.length);
  // A plan leaves nothing in the run's folder.
  const tokenizers = temporaryFolder();
  try {
    const earlier: Run[] = [];
    for (const given of runs) {
      const { run, maker } = foreseen(given, earlier);
      earlier.push(run);
      const materials = await openMaterials(run, locate, report, { tokenizers, maker });
      const made = planOf(materials, planned);
      const model = run.model === given.model ? made.model : String(given.model);
      const plan = { ...made, run: given, model };
      const fit = vram === undefined ? undefined : fitInto(materials, planned, made, vram - DRIVERS_SHARE);
      const lines = [...describe(plan), ...(fit ? [`vram        ${tellFit(fit)}`] : [])];
      terminal.out(`${options.json ? JSON.stringify({ ...plan, fit }) : printable(lines.join('\n'))}\n`);
    }
  } finally {
    rmSync(tokenizers, { recursive: true });
  }
}

function temporaryFolder(): string {
  try {
    return mkdtempSync(join(tmpdir(), 'sdxl-plan-'));
  } catch (error) {
    throw asUserError(error, tmpdir());
  }
}

/** @throws UserError for a device whose memory is not planned */
function standIn(name: string): Device {
  if (name === 'cpu') return standInDevice();
  if (/^cuda(:\d+)?$/.test(name)) return standInCuda();
  throw new UserError(`the memory of "${name}" is not planned; the devices are cpu, cuda, and cuda:0,cuda:1`);
}

async function trainAll(file: string, options: Options, terminal: Terminal): Promise<void> {
  const names = deviceNames(options.device);
  const runs = await chosenRuns(file, options, names.length);
  if (typeof options.resume === 'string' && runs.length > 1)
    throw new UserError(
      `--resume ${options.resume}: ${file} has several runs; say with --only which one it belongs to`,
    );
  const opened = names.map((name) => openDevice(name, (line) => terminal.err(`warning: ${line}\n`)));
  const told = tools(terminal, options.quiet, options.json);
  for (const run of runs) {
    const unlock = lockFolder(run.output);
    try {
      const { by, ...made } = await trainOne(run, options, opened, told);
      if (options.json) terminal.out(`${JSON.stringify({ name: run.name, ...made })}\n`);
      if (by) throw new Stopped(by);
    } finally {
      unlock();
    }
  }
}

/** What comes of a run: a folder, if it has saved one, and whether it was stopped, by which signal. */
interface Trained {
  folder?: string;
  stopped: boolean;
  by?: NodeJS.Signals;
}

async function trainOne(
  run: Run,
  { resume }: Options,
  devices: readonly Device[],
  { locate, report }: ReturnType<typeof tools>,
): Promise<Trained> {
  clearOutput(run.output);
  if (resume === true && isFinished(run)) {
    report.line(`${run.name} is finished: ${finalOf(run.output)}`);
    return { folder: finalOf(run.output), stopped: false };
  }
  const checkpoint = startOf(run, resume);
  const before = checkpoint && stateOf(run, checkpoint).run.optimizer.lr;
  const materials = await openMaterials(run, locate, report, { checkpoint });
  const plan = planOf(materials, devices);
  for (const line of describe(plan, devices)) report.line(line);
  warnOfMemory(plan, materials, devices, report);
  const { lr } = run.optimizer;
  if (checkpoint)
    report.line(`resuming from ${checkpoint}${before === lr ? '' : `, with lr ${lr} instead of ${before}`}`);
  if (resume === true && !checkpoint) report.line(`no checkpoint in ${run.output} yet: beginning anew`);
  const stop: { asked: boolean; by?: NodeJS.Signals } = { asked: false };
  const ask = (signal: NodeJS.Signals): void => {
    Object.assign(stop, { asked: true, by: signal });
    report.line('stopping after this update and saving; once more to leave at once');
  };
  const { folder, stopped } = await heedingSignals(ask, () => train(materials, devices, report, stop));
  const saved = stopped ? `stopped; saved ${folder}: --resume goes on` : `done: ${folder}`;
  report.line(folder ? saved : 'stopped before the first update; what is prepared is kept');
  return { folder, stopped, by: stop.by };
}

/** Tells what would help where a run that begins takes more than is free: it may end before its first update. */
function warnOfMemory(plan: Plan, materials: Materials, devices: readonly Device[], report: Report): void {
  const free = devices.map(({ driver }) => driver.room?.().free ?? Number.POSITIVE_INFINITY);
  if (materials.checkpoint || plan.memory_bytes.every((bytes, i) => bytes <= free[i])) return;
  report.line(
    `warning: that is more than is free; ${tellFit(fitInto(materials, devices, plan, Math.min(...free)))}`,
  );
}

/** The checkpoint to go on from. @throws UserError rather than train over what an earlier run has left */
function startOf({ output }: Run, resume: Options['resume'] = false): string | undefined {
  const own = listCheckpoints(output);
  if (resume === true && own.length > 0) return own.at(-1);
  const holds = own.length > 0 || existsSync(finalOf(output));
  if (typeof resume === 'string') {
    readState(resume); // refuses what is no checkpoint
    if (!holds || own.some((each) => realpathSync(each) === realpathSync(resume))) return resume;
  }
  if (!holds) return undefined;
  const elsewhere = 'remove it, or train elsewhere with --set output=FOLDER';
  throw new UserError(
    resume === false
      ? `${output} holds a run already; go on with --resume, ${elsewhere}`
      : resume === true
        ? `${output} holds a finished model and no checkpoint to go on from; ${elsewhere}`
        : `${output} holds a run of which ${resume} is no checkpoint; name one of its own, ${elsewhere}`,
  );
}

function tools(terminal: Terminal, quiet = false, json = false): { locate: Locate; report: Report } {
  let bar: { label: string; bar: Bar } | undefined;
  const end = () => {
    bar?.bar.end();
    bar = undefined;
  };
  return {
    locate: locatorOf({ onProgress: downloadsOn(terminal, quiet) }),
    report: {
      line(text) {
        end();
        terminal.err(`${printable(text)}\n`);
      },
      progress(label, done, total, note) {
        if (bar?.label !== label) {
          end();
          bar = { label, bar: progressBar(terminal, label, quiet) };
        }
        bar.bar.update(done, total, note);
        if (done === total) end();
      },
      entry(entry) {
        if (json) terminal.out(`${JSON.stringify(entry)}\n`);
      },
    },
  };
}
