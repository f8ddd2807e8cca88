// A checkpoint is a folder: the trained components as diffusers keeps them (unet/, vae/, text_encoder/, adapters in lora/, or vectors
// in textual_inversion/), the same with averaged weights under ema/, the optimizer's tensors in optimizer.safetensors, and state.json,
// which says where the run stood and holds the run itself. It is written beside the others, synced and renamed; then the oldest are
// removed.
import { existsSync, realpathSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import type { Tensor } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import { listFolder, makeFolder } from '../io/files.ts';
import { clearUnfinished, removeFolder, replaceFolderAtomically } from '../io/folders.ts';
import { isRecord, readJsonObject } from '../io/json.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../io/safetensors.ts';
import { type SavedComponent, saveComponent, writeJson } from '../models/checkpoint/save.ts';
import type { Run } from './run/run.ts';
import { previewFolder } from './tasks/preview.ts';

/** Where a run stands between two updates. Draws are keyed by it, so nothing else needs to be kept. */
export interface Position {
  /** Updates made. */
  step: number;
  epoch: number;
  /** Updates of this epoch that are done. */
  update: number;
}

export interface State extends Position {
  run: Run;
  /** Names the samples: a resumed run must see the same ones. */
  dataset: string;
  /** Names the captions, of which a resumed run may see others; absent where an older program wrote it. */
  captions?: string;
}

/** A trained component, with averaged weights too where there is an EMA. */
export interface TrainedComponent extends SavedComponent {
  ema?: readonly TensorEntry[];
}

const folderPattern = /^step-(\d{8})$/;

const checkpointsOf = (output: string): string => join(output, 'checkpoints');

export const stateFile = (checkpoint: string): string => join(checkpoint, 'state.json');

/** Where a run from random weights keeps the tokenizers that it learnt: beside its checkpoints, whatever way one of these is named. */
export const tokenizersOf = (checkpoint: string): string =>
  join(dirname(dirname(realpathSync(checkpoint))), 'tokenizers');

/** The complete checkpoints of a run, oldest first. A folder that was being written has another name. */
export function listCheckpoints(output: string): string[] {
  const folder = checkpointsOf(output);
  if (!existsSync(folder)) return [];
  return listFolder(folder)
    .filter((name) => folderPattern.test(name) && existsSync(stateFile(join(folder, name))))
    .map((name) => join(folder, name));
}

/** Clears away what killed programs left half-written in a run's folder, among its checkpoints and its previews. */
export function clearOutput(output: string): void {
  for (const folder of [output, checkpointsOf(output), previewFolder(output)])
    if (existsSync(folder)) clearUnfinished(folder);
}

/** Removes the checkpoints of later steps, the newest first: at every moment those that are left are of one course of training. */
export function removeLater(output: string, step: number): void {
  for (const path of listCheckpoints(output).reverse())
    if (Number(folderPattern.exec(basename(path))?.[1]) > step) removeFolder(path);
}

/**
 * Saves a checkpoint and returns its folder; of the older ones it then keeps the newest, `keep` with this one.
 * @throws UserError; all stay
 */
export function saveCheckpoint(
  output: string,
  state: State,
  components: readonly TrainedComponent[],
  optimizer: ReadonlyMap<string, Tensor>,
  keep: number,
): string {
  const folder = checkpointsOf(output);
  const path = join(folder, `step-${String(state.step).padStart(8, '0')}`);
  makeFolder(folder);
  replaceFolderAtomically(path, (temporary) => {
    for (const component of components) {
      const { name, ema } = component;
      saveComponent(join(temporary, name), component);
      if (ema) saveComponent(join(temporary, 'ema', name), { ...component, weights: ema });
    }
    writeSafetensors(join(temporary, 'optimizer.safetensors'), entriesOf(optimizer));
    writeJson(stateFile(temporary), state);
  });
  const all = listCheckpoints(output);
  for (const older of all.slice(0, all.indexOf(path) + 1).slice(0, -keep)) removeFolder(older);
  return path;
}

const entriesOf = (state: ReadonlyMap<string, Tensor>): TensorEntry[] =>
  [...state].map(([name, tensor]) => ({
    name,
    dtype: tensor.dtype,
    shape: tensor.shape,
    bytes: () => tensor.bytes(),
  }));

/** state.json of a checkpoint. @throws UserError when `path` is no checkpoint */
export function readState(path: string): State {
  const file = stateFile(path);
  if (!existsSync(file)) {
    throw new UserError(
      `${path} is not a checkpoint of a training run (it has no state.json); give a folder such as runs/NAME/checkpoints/step-00000200`,
    );
  }
  const state = readJsonObject(file);
  if (!isRecord(state.run))
    throw new UserError(`${file} does not say what run it is of, so it is damaged; take another checkpoint`);
  return state as unknown as State;
}

/** Fills tensors by name from a file of a checkpoint. @throws UserError when names or sizes differ */
export function loadTensors(path: string, into: ReadonlyMap<string, Tensor>): void {
  const file = openSafetensors(path);
  try {
    for (const [name, tensor] of into) {
      const info = file.tensors.get(name);
      if (!info || info.dtype !== tensor.dtype || info.shape.join() !== tensor.shape.join()) {
        throw new UserError(
          `${path} does not fit this run: ${name} is ${info ? `${info.dtype} [${info.shape}]` : 'missing'}, not ${tensor.dtype} [${tensor.shape}]; resume with the run that wrote it`,
        );
      }
      tensor.upload(file.read(name));
    }
  } finally {
    file.close();
  }
}

/**
 * Keys that may change between the run that saved and the run that resumes: they touch no number of the training, but that
 * another end gives a schedule that falls another shape from there on, and that a rate which led to NaN may be lowered. Pictures
 * are compared by content, not by path.
 */
const free = [
  'train.fused_backward_pass',
  'optimizer.lr',
  'name',
  'output',
  'epochs',
  'steps',
  'checkpoints',
  'previews',
  'validation',
  'log_every',
  'max_nonfinite',
  'dataset.cache',
  'dataset.broken',
  'dataset.path',
  'dataset.class_data_dir',
];

/** Of a key that may change but in a part, that part: which blocks and text encoders are not trained. */
const held: Readonly<Record<string, (value: unknown) => unknown>> = {
  'optimizer.block_lr': (rates) => zerosOf(rates as number[]),
  // Of one rate 0 is that of the run.
  'optimizer.text_encoder_lr': (rates) => (Array.isArray(rates) && rates.length > 1 ? zerosOf(rates) : []),
};

const zerosOf = (rates: readonly number[]): number[] =>
  rates.flatMap((rate, place) => (rate === 0 ? [place] : []));

/**
 * The first key in which two runs would train differently, with both values; undefined where there is none. A key that the first lacks,
 * as an older program knew it not, has its `usual` value.
 */
export function difference(then: unknown, b: unknown, usual: unknown, path = ''): string | undefined {
  if (free.includes(path)) return undefined;
  const a = then === undefined ? usual : then;
  if (isRecord(a) && isRecord(b)) {
    for (const key of new Set([...Object.keys(a), ...Object.keys(b)])) {
      const own = isRecord(usual) ? usual[key] : undefined;
      const found = difference(a[key], b[key], own, path ? `${path}.${key}` : key);
      if (found) return found;
    }
    return undefined;
  }
  const part = held[path] ?? ((value) => value);
  if (JSON.stringify(part(a)) === JSON.stringify(part(b))) return undefined;
  return `${path} was ${JSON.stringify(a)} and is ${JSON.stringify(b)}`;
}
