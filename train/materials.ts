// What a run is made of before any weight is on a device: its pictures looked at, and its models found, or begun at random; of a
// resumed run, what its checkpoint says of them.
import { existsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { UserError } from '../io/errors.ts';
import { makeFolder } from '../io/files.ts';
import { copyFolder, replaceFolderAtomically } from '../io/folders.ts';
import { type ModelSource, openComponent } from '../models/checkpoint/checkpoint.ts';
import { openControlNetFolder } from '../models/control/controlnet_kinds.ts';
import { randomModel } from '../models/formats/random_weights.ts';
import type { IPAdapterSource } from '../models/ip_adapter/ip_adapter.ts';
import { parseTextConfig } from '../models/text/clip.ts';
import { autoencoder, withPosterior } from '../models/vae/autoencoder.ts';
import { readState, type State, tokenizersOf } from './checkpoint.ts';
import type { IPAdapterBegin } from './controls/ip_adapter.ts';
import { asSeeing } from './controls/seeing.ts';
import { passesPerUpdate, samplesPerEpoch, updatesPerEpoch } from './data/order.ts';
import { openDataset } from './data/source.ts';
import { learnVocabulary, writeTokenizers } from './data/vocabulary.ts';
import { asStudent } from './methods/student.ts';
import { toldGuidance } from './methods/told_guidance.ts';
import { learningRate } from './optimizers/lr_schedule.ts';
import type { Report } from './passes/task.ts';
import { openPictures, type Pictures, sideStep } from './pictures/pictures.ts';
import { differenceFrom } from './run/rules/resuming.ts';
import type { Run } from './run/run.ts';
import type { Sources } from './tasks/trained_parts.ts';

/** How models are found by what the user wrote: the command line brings downloads. */
export interface Locate {
  /** With the UNet at `unet` in its own one's place, where that names one. */
  model(path: string, unet: string): Promise<ModelSource>;
  /** A UNet alone, or a model's; `model` lends a file without a config its own. */
  unet(path: string, model: ModelSource): Promise<ModelSource>;
  vae(path: string): Promise<ModelSource>;
  controlnet(path: string): Promise<ModelSource>;
  adapter(path: string): Promise<ModelSource>;
  ipAdapter(path: string): Promise<IPAdapterSource>;
  imageEncoder(path: string): Promise<ModelSource>;
}

/** What a run is made of, before any weight is on a device. */
export interface Materials extends Sources {
  run: Run;
  pictures: Pictures;
  updatesPerEpoch: number;
  /** Updates in all. */
  total: number;
}

interface MaterialOptions {
  /** The checkpoint that will be gone on from. */
  checkpoint?: string;
  /** Where a preset's tokenizers are written: the run's output, if absent. */
  tokenizers?: string;
  /** The run that has yet to make the model, which is planned from what that one begins with. */
  maker?: Run;
}

/** The model as a run trains it: its UNet may get further layers or channels first, or a teacher's weights. */
const shaped = (run: Run, source: ModelSource, teacher?: ModelSource): ModelSource =>
  asStudent(run, toldGuidance(run, asSeeing(run, source)), teacher);

/** @throws UserError for whatever is missing or unfit */
export async function openMaterials(
  run: Run,
  locate: Locate,
  report: Report,
  { checkpoint, tokenizers = join(run.output, 'tokenizers'), maker }: MaterialOptions = {},
): Promise<Materials> {
  const opened = await openSource(run, locate, tokenizers, checkpoint);
  const { pretrained_teacher_model: teacher } = run.distillation;
  const teacherSource = teacher ? await locate.unet(teacher, opened) : undefined;
  const source = shaped(run, maker ? shaped(maker, opened) : opened, teacherSource);
  const vaeSource = run.vae ? await locate.vae(run.vae) : source;
  const controlSource = await openControl(run, locate, checkpoint);
  const ipAdapter = await openIPAdapter(run, locate);
  withPosterior(autoencoder(vaeSource.config('vae')), vaeSource.path); // refused before pictures are read
  const pictures = await openPictures(run, sideStep(source, vaeSource, run.train.target), report);
  const perEpoch = updatesPerEpoch(
    samplesPerEpoch(pictures.samples),
    run.batch_size,
    run.gradient_accumulation_steps,
  );
  const total = run.steps || run.epochs * perEpoch;
  if (checkpoint) checkFollows(checkpoint, { run, pictures, total }, report);
  learningRate(run.lr_scheduler, run.optimizer.lr, 0, total); // refuses what cannot be followed, before any work
  const sources = { source, vaeSource, teacherSource, controlSource, ipAdapter, checkpoint };
  return { run, ...sources, pictures, updatesPerEpoch: perEpoch, total };
}

/** Tells of captions that are others now. @throws UserError where the run cannot go on from there */
function checkFollows(
  checkpoint: string,
  { run, pictures, total }: Pick<Materials, 'run' | 'pictures' | 'total'>,
  report: Report,
): void {
  const { step, dataset, captions } = stateOf(run, checkpoint);
  if (dataset !== pictures.hash)
    throw new UserError(
      `${checkpoint} was trained on other pictures than ${run.dataset.path} holds now; put them back, or start anew with another output`,
    );
  if (step > total)
    throw new UserError(
      `${checkpoint} has ${step} updates behind it, and the run is to have ${total}; ask for more with steps or epochs, or resume from an earlier checkpoint`,
    );
  if (run.train.target !== 'vae' && captions !== undefined && captions !== pictures.captionsHash)
    report.line(
      `warning: ${checkpoint} was trained with other captions than ${run.dataset.path} holds now; the run goes on with these`,
    );
}

/** The ControlNet or T2I-Adapter to go on with. A checkpoint has the whole of it, and what the run began with may be gone. */
async function openControl(run: Run, locate: Locate, checkpoint?: string): Promise<ModelSource | undefined> {
  const { controlnet_model_name_or_path: controlnet } = run.controlnet;
  const { adapter_model_name_or_path: adapter } = run.t2i_adapter;
  if (!controlnet && !adapter) return undefined;
  if (checkpoint)
    return controlnet
      ? openControlNetFolder(join(checkpoint, 'controlnet'))
      : openComponent(join(checkpoint, 'adapter'));
  return controlnet ? locate.controlnet(controlnet) : locate.adapter(adapter);
}

/** What an IP-Adapter is made from. */
async function openIPAdapter(run: Run, locate: Locate): Promise<IPAdapterBegin | undefined> {
  const { pretrained_ip_adapter_path: path, image_encoder_path: encoder } = run.ip_adapter;
  if (path) return locate.ipAdapter(path);
  return encoder ? { imageEncoder: await locate.imageEncoder(encoder) } : undefined;
}

/** Of each part of a preset, a key that none can do without: files that no compiler saw may lack it. */
const wanted = [
  ['unet', 'block_out_channels'],
  ['vae', 'block_out_channels'],
  ['text_encoder_2', 'hidden_size'],
  ['scheduler', '_class_name'],
] as const;

/** The model that a run starts from: what its path holds, or a preset's random weights with tokenizers from its captions. */
async function openSource(
  run: Run,
  locate: Locate,
  tokenizers: string,
  checkpoint?: string,
): Promise<ModelSource> {
  if (run.model === '')
    throw new UserError(
      'the run names no model; set model to a folder, a .safetensors or .gguf file, a hub id or a preset',
    );
  if (typeof run.model === 'string') return locate.model(run.model, run.unet);
  const parts = run.model as unknown as Record<string, Record<string, unknown> | undefined>;
  const lacking = wanted.filter(([part, key]) => parts[part]?.[key] === undefined);
  if (lacking.length)
    throw new UserError(
      `the preset that the run gives as its model lacks ${lacking.map((each) => each.join('.')).join(', ')}; begin with one of the package's: { ...presets.tiny, ... }`,
    );
  if (run.train.target === 'vae') return randomModel(run.model, { seed: run.seed, tokenizers });
  if (checkpoint) keepTokenizers(tokenizers, checkpoint);
  else {
    const { vocab_size, max_position_embeddings: length } = parseTextConfig({ ...run.model.text_encoder_2 });
    const { examples } = await openDataset(run.dataset);
    const captions = examples.flatMap((example) => example.captions);
    writeTokenizers(tokenizers, learnVocabulary(captions, vocab_size), length);
  }
  return randomModel(run.model, { seed: run.seed, tokenizers });
}

/** A resumed run keeps the tokenizers that its weights were trained with, whatever the captions are now. @throws UserError */
function keepTokenizers(tokenizers: string, checkpoint: string): void {
  const theirs = tokenizersOf(checkpoint);
  if (!existsSync(theirs))
    throw new UserError(
      `${theirs} is gone, by which ${checkpoint} was trained; put it back, or start anew with another output`,
    );
  if (resolve(theirs) === resolve(tokenizers)) return;
  makeFolder(dirname(tokenizers));
  replaceFolderAtomically(tokenizers, (temporary) => copyFolder(theirs, temporary));
}

/** The most passes that an update of the run can have. */
export function mostPasses({ run, pictures }: Pick<Materials, 'run' | 'pictures'>): number {
  const { batch_size: batch, gradient_accumulation_steps: accumulation } = run;
  const sizes = new Set(pictures.bucketOf).size;
  return passesPerUpdate(samplesPerEpoch(pictures.samples), sizes, { batch, accumulation });
}

/** What a checkpoint says of this run. @throws UserError when it is none, or another run's */
export function stateOf(run: Run, checkpoint: string): State {
  const state = readState(checkpoint);
  const { step, epoch, update } = state;
  if (![step, epoch, update].every(Number.isInteger))
    throw new UserError(`${checkpoint} does not say where the run stood, so it is damaged; take another`);
  const differs = differenceFrom(state.run, run);
  if (differs) {
    throw new UserError(
      `${checkpoint} is of another run: ${differs}; resume with the run file that wrote it, or start anew with another output`,
    );
  }
  return state;
}
