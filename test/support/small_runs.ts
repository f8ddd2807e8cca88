// Runs of training in this process, on the tiny golden model and a folder of six small pictures that is gone at the end: what
// the tests of training share.
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Device, openDevice } from '../../engine/device.ts';
import { writePng } from '../../io/image.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import { locateControlNet, locateT2IAdapter } from '../../models/locate/locate.ts';
import { locateImageEncoder, locateIPAdapter } from '../../models/locate/locate_ip_adapter.ts';
import { locateUNet, withUNet } from '../../models/locate/locate_unet.ts';
import { listCheckpoints, readState } from '../../train/checkpoint.ts';
import { readLog } from '../../train/log/log.ts';
import { type Locate, type Materials, openMaterials } from '../../train/materials.ts';
import type { Report } from '../../train/passes/task.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { openSession, type Session } from '../../train/session.ts';
import { type Prepared, prepare } from '../../train/tasks/preparation.ts';
import { type Outcome, train } from '../../train/trainer.ts';
import { sdxl } from './command_line.ts';
import { picture } from './controlnet_golden.ts';
import { goldenFolder } from './golden.ts';

export const device = openDevice('auto');
export const model = join(goldenFolder, 'tiny-sdxl');
export const folder = mkdtempSync(join(tmpdir(), 'sdxl-train-'));
export const pictures = join(folder, 'pictures');
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

mkdirSync(pictures);
for (let i = 0; i < 6; i++) {
  const data = Uint8Array.from({ length: 3 * 40 * 48 }, (_, at) => (at * (i + 3)) % 251);
  writePng(join(pictures, `${i}.png`), { width: 48, height: 40, channels: 3, data });
  writeFileSync(join(pictures, `${i}.txt`), `picture ${i}\nstripes, number ${i}, colours\n`);
}

/** The same kind of folder for ControlNets: a conditioning image beside each picture. */
export const controlled = join(folder, 'controlled');
mkdirSync(controlled);
for (let i = 0; i < 6; i++) {
  writePng(join(controlled, `${i}.png`), picture(i, 48, 40));
  writePng(join(controlled, `${i}.conditioning_image.png`), picture(9 - i, 48, 40));
  writeFileSync(join(controlled, `${i}.txt`), `picture ${i}\n`);
}

/** And for preferences: a rejected picture beside each. */
export const paired = join(folder, 'paired');
mkdirSync(paired);
for (let i = 0; i < 6; i++) {
  writePng(join(paired, `${i}.png`), picture(i, 48, 40));
  writePng(join(paired, `${i}.rejected.png`), picture(9 - i, 48, 40));
  writeFileSync(join(paired, `${i}.txt`), `picture ${i}\n`);
}

export const silent = { line() {}, progress() {} };
export const locate = {
  model: async (path: string, unet: string) => (unet ? withUNet(openModel(path), unet) : openModel(path)),
  unet: (path: string, model: ModelSource) => locateUNet(path, model, {}),
  vae: async (path: string) => openModel(path),
  controlnet: (path: string) => locateControlNet(path),
  adapter: (path: string) => locateT2IAdapter(path),
  ipAdapter: (path: string) => locateIPAdapter(path),
  imageEncoder: (path: string) => locateImageEncoder(path),
};

/** What `basic` has to be given for a small ControlNet. */
export const control: RunInput = {
  train: { target: 'controlnet' },
  controlnet: { transformer_layers_per_block: [0, 0, 0] },
  dataset: { path: controlled, resolution: 32, crops: 2, random_flip: true, cache: join(folder, 'cache') },
};

interface How {
  /** Asks to stop at that step. */
  until?: number;
  during?: string;
  /** Called as the run tells how far it is. */
  meanwhile?: (label: string, done: number, total: number) => void;
  checkpoint?: string;
  /** Devices that take passes in turn with the first. */
  further?: readonly Device[];
  /** Where models are found by what a run names. */
  locate?: Locate;
}

export const opened = (input: RunInput): Promise<Materials> =>
  openMaterials(resolveRun(input, 'test', 'test'), locate, silent);

/** A run's session, with what is prepared for it. */
export async function sessionOf(materials: Materials, report: Report = silent): Promise<Session> {
  const prepared = await prepare(materials, device, report, { asked: false });
  return openSession(materials, prepared as Prepared, device);
}

/** Trains in this process. */
export async function run(
  input: RunInput,
  { until, during = 'training', meanwhile, checkpoint, further, locate: places = locate }: How = {},
): Promise<Outcome> {
  const resolved = resolveRun(input, 'test', 'test');
  const materials = await openMaterials(resolved, places, silent, { checkpoint });
  const stop = { asked: false };
  const progress = (label: string, done: number, total: number) => {
    meanwhile?.(label, done, total);
    if (label === during && until !== undefined && done >= until) stop.asked = true;
  };
  return train(materials, [device, ...(further ?? [])], { ...silent, progress }, stop);
}

/** What the log says of each update: step, loss, validation loss. */
export const losses = (output: string) =>
  readLog(join(output, 'log.jsonl')).map(({ step, loss, validation_loss }) => [step, loss, validation_loss]);

/** Everything that decides how a run goes on: weights, averages, optimizer. */
export function digest(checkpoint: string): string {
  const hash = createHash('sha256');
  for (const name of readdirSync(checkpoint, { recursive: true, encoding: 'utf8' }).sort())
    if (name.endsWith('.safetensors')) hash.update(name).update(readFileSync(join(checkpoint, name)));
  return hash.digest('hex');
}

export const basic = (output: string): RunInput => ({
  output: join(folder, output),
  model,
  seed: 3,
  steps: 5,
  batch_size: 2,
  gradient_accumulation_steps: 2,
  dataset: {
    path: pictures,
    resolution: 32,
    random_flip: true,
    crops: 2,
    caption_dropout_rate: 0.3,
    cache: join(folder, 'cache'),
  },
  optimizer: { lr: 1e-3 },
  lr_scheduler: { name: 'cosine', warmup_steps: 1 },
  ema: { decay: 0.9 },
  checkpoints: { every_steps: 2, keep: 2 },
});

/** Trains a run whole, and again from its first update on, in another folder: the same checkpoint, or the names that differ. */
export async function resumes(
  t: { equal(a: unknown, b: unknown, message: string): unknown },
  name: string,
  more: RunInput,
) {
  const checkpoints = { every_steps: 1, keep: 3 };
  const input = (output: string): RunInput => ({ ...basic(output), steps: 3, ...more, checkpoints });
  const whole = await run(input(`${name}-whole`));
  const saved = (end: string) => listCheckpoints(join(folder, `${name}-${end}`));
  const [checkpoint] = saved('whole');
  t.equal(readState(checkpoint).step, 1, `${name}: from its first update`);
  await run(input(`${name}-resumed`), { checkpoint });
  const [a, b] = ['whole', 'resumed'].map((end) => digest(saved(end).at(-1) as string));
  t.equal(a, b, `${name}: resumed bit for bit`);
  return whole.folder;
}

/** What `sdxl sample` makes of the model in two steps, with more flags. */
export async function drawn(
  t: { equal(a: unknown, b: unknown, message: string): unknown },
  name: string,
  ...more: string[]
): Promise<Buffer> {
  const output = join(folder, `${name}.png`);
  const { status, err } = await sdxl(
    ...['sample', '--model', model, '--prompt', 'stripes', '--steps', '2', '--seed', '1', '--quiet'],
    ...['--width', '64', '--height', '64', '--output', output, ...more],
  );
  t.equal(status, 0, `${name} ${err}`);
  return readFileSync(output);
}
