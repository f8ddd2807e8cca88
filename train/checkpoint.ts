// A checkpoint is a folder: the trained components as diffusers keeps them (unet/, vae/, text_encoder/, adapters in lora/, or vectors
// in textual_inversion/), the same with averaged weights under ema/, the optimizer's tensors in optimizer.safetensors, and state.json,
// which says where the run stood and holds the run itself. Where the optimizer has the mean of the weights (Schedule-Free), that is the
// components, and what gradients are taken at is the optimizer's. It is written beside the others, synced and renamed; then the oldest
// are removed.
import { existsSync, realpathSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Parameter } from '../engine/module.ts';
import type { Tensor } from '../engine/tensor.ts';
import { bytesPerElement } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { makeFolder } from '../io/files.ts';
import { clearUnfinished, removeFolder, replaceFolderAtomically } from '../io/folders.ts';
import { isRecord, readJsonObject } from '../io/json.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../io/safetensors.ts';
import { openWeights } from '../models/checkpoint/checkpoint.ts';
import { type SavedComponent, saveComponent, writeJson } from '../models/checkpoint/save.ts';
import { filled, sourceOf, toMemoryLayout } from '../models/checkpoint/weights.ts';
import { previewFolder } from './log/preview_files.ts';
import { stepFolder, stepFolders } from './log/step_folders.ts';
import type { Component } from './passes/task.ts';
import type { Run } from './run/run.ts';

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

const checkpointsOf = (output: string): string => join(output, 'checkpoints');

export const stateFile = (checkpoint: string): string => join(checkpoint, 'state.json');

/** Where a run from random weights keeps the tokenizers that it learnt: beside its checkpoints, whatever way one of these is named. */
export const tokenizersOf = (checkpoint: string): string =>
  join(dirname(dirname(realpathSync(checkpoint))), 'tokenizers');

const completeOnes = (output: string): ReturnType<typeof stepFolders> =>
  stepFolders(checkpointsOf(output)).filter(({ path }) => existsSync(stateFile(path)));

/** The complete checkpoints of a run, oldest first. */
export const listCheckpoints = (output: string): string[] => completeOnes(output).map(({ path }) => path);

/** Clears away what killed programs left half-written in a run's folder, among its checkpoints and its previews. */
export function clearOutput(output: string): void {
  for (const folder of [output, checkpointsOf(output), previewFolder(output)])
    if (existsSync(folder)) clearUnfinished(folder);
}

/** Removes the checkpoints of later steps, the newest first: at every moment those that are left are of one course of training. */
export function removeLater(output: string, step: number): void {
  for (const each of completeOnes(output).reverse()) if (each.step > step) removeFolder(each.path);
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
  const path = stepFolder(folder, state.step);
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
  const source = sourceOf(path, [openSafetensors(path)]);
  try {
    for (const [name, tensor] of into) {
      requireFit(path, name, source.info(name), tensor);
      filled(tensor, source, name);
    }
  } finally {
    source.close();
  }
}

/** Fills the tensors that `tensorOf` gives for a component's trained weights from its folder. @throws UserError when names or sizes differ */
export function loadTrained(
  { trained, parameters }: Component,
  folder: string,
  tensorOf: (key: string) => Tensor,
): void {
  const source = openWeights(folder);
  try {
    for (const key of trained) {
      const { layout, shape } = parameters.get(key) as Parameter;
      const tensor = tensorOf(key);
      requireFit(folder, key, source.info(key), { dtype: tensor.dtype, shape });
      if (layout !== 'conv') filled(tensor, source, key);
      else tensor.upload(toMemoryLayout(source.bytes(key), shape, bytesPerElement[tensor.dtype]));
    }
  } finally {
    source.close();
  }
}

type TensorKind = Pick<TensorEntry, 'shape'> & { dtype: string };

/** @throws UserError where what a checkpoint has under a name is not what the run wants */
function requireFit(path: string, name: string, found: TensorKind | undefined, wanted: TensorKind): void {
  const told = ({ dtype, shape }: TensorKind): string => `${dtype} [${shape}]`;
  if (found && told(found) === told(wanted)) return;
  throw new UserError(
    `${path} does not fit this run: ${name} is ${found ? told(found) : 'missing'}, not ${told(wanted)}; resume with the run that wrote it`,
  );
}
