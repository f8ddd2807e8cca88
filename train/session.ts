// Everything a run needs before its first update: the pictures looked at, the model loaded or begun at random, the task, the
// optimizer and the moving average; and, to resume, all of these as a checkpoint left them. The same session on the
// stand-in device, which holds no numbers, tells what memory it will take.
import { existsSync, realpathSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import type { Device } from '../engine/device.ts';
import { requireGrad } from '../engine/grad.ts';
import type { Parameter } from '../engine/module.ts';
import { standInDevice } from '../engine/profile.ts';
import { built } from '../engine/scope.ts';
import type { Tensor } from '../engine/tensor.ts';
import { bytesPerElement } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { makeFolder } from '../io/files.ts';
import { copyFolder, replaceFolderAtomically } from '../io/folders.ts';
import {
  channelsLast,
  type ModelSource,
  openComponent,
  openWeights,
} from '../models/checkpoint/checkpoint.ts';
import { randomModel } from '../models/formats/random_weights.ts';
import type { IPAdapterSource } from '../models/ip_adapter/ip_adapter.ts';
import { parseTextConfig } from '../models/text/clip.ts';
import { autoencoder, withPosterior } from '../models/vae/autoencoder.ts';
import { difference, loadTensors, type Position, readState, type State } from './checkpoint.ts';
import type { IPAdapterBegin } from './controls/ip_adapter.ts';
import { asSeeing } from './controls/seeing.ts';
import { samplesPerEpoch, updatesPerEpoch } from './data/order.ts';
import { openDataset } from './data/source.ts';
import { learnVocabulary, writeTokenizers } from './data/vocabulary.ts';
import { asStudent } from './methods/student.ts';
import { toldGuidance } from './methods/told_guidance.ts';
import { queueNorms } from './optimizers/clip.ts';
import { createOptimizer } from './optimizers/create.ts';
import { type Ema, ema as startEma } from './optimizers/ema.ts';
import { learningRate } from './optimizers/lr_schedule.ts';
import type { Optimizer } from './optimizers/rule.ts';
import { boundNorms } from './parts/max_norm.ts';
import { moveThrough } from './passes/fused.ts';
import { openReplicas, type Replicas } from './passes/replicas.ts';
import { type Component, type Report, type Task, trainedParameters } from './passes/task.ts';
import { openPictures, type Pictures, sideStep } from './pictures/pictures.ts';
import { requireAverages } from './run/rules/methods.ts';
import { followed } from './run/rules/optimizer.ts';
import { usual } from './run/rules/owners.ts';
import type { Run } from './run/run.ts';
import { autoencoderTask } from './tasks/autoencoder.ts';
import { diffusionTask } from './tasks/diffusion.ts';
import { type Prepared, rehearse } from './tasks/preparation.ts';
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

export interface Session extends Materials {
  /** The one that has the whole model: caches and previews are made there. */
  device: Device;
  task: Task;
  /** What is trained, each on the device that moves it. */
  parameters: ReadonlyMap<string, Parameter>;
  passes: Replicas;
  optimizer: Optimizer;
  ema: Ema | undefined;
  release(): void;
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
  if (checkpoint && stateOf(run, checkpoint).dataset !== pictures.hash)
    throw new UserError(
      `${checkpoint} was trained on other pictures than ${run.dataset.path} holds now; put them back, or start anew with another output`,
    );
  const perEpoch = updatesPerEpoch(
    samplesPerEpoch(pictures.samples),
    run.batch_size,
    run.gradient_accumulation_steps,
  );
  const total = run.steps || run.epochs * perEpoch;
  learningRate(run.lr_scheduler, run.optimizer.lr, 0, total); // refuses what cannot be followed, before any work
  const sources = { source, vaeSource, teacherSource, controlSource, ipAdapter, checkpoint };
  return { run, ...sources, pictures, updatesPerEpoch: perEpoch, total };
}

/** The ControlNet or T2I-Adapter to go on with. A checkpoint has the whole of it, and what the run began with may be gone. */
async function openControl(run: Run, locate: Locate, checkpoint?: string): Promise<ModelSource | undefined> {
  const { controlnet_model_name_or_path: controlnet } = run.controlnet;
  const { adapter_model_name_or_path: adapter } = run.t2i_adapter;
  if (!controlnet && !adapter) return undefined;
  if (checkpoint) return openComponent(join(checkpoint, controlnet ? 'controlnet' : 'adapter'));
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
  const theirs = join(dirname(dirname(realpathSync(checkpoint))), 'tokenizers');
  if (!existsSync(theirs))
    throw new UserError(
      `${theirs} is gone, by which ${checkpoint} was trained; put it back, or start anew with another output`,
    );
  if (resolve(theirs) === resolve(tokenizers)) return;
  makeFolder(dirname(tokenizers));
  replaceFolderAtomically(tokenizers, (temporary) => copyFolder(theirs, temporary));
}

/**
 * Loads the weights that passes and previews need onto `device`, and copies of those that passes need onto `further` ones.
 * @throws UserError
 */
export const openSession = (
  materials: Materials,
  prepared: Prepared,
  device: Device,
  further: readonly Device[] = [],
): Session => built(() => startSession(materials, prepared, device, further));

function startSession(
  materials: Materials,
  prepared: Prepared,
  device: Device,
  further: readonly Device[],
): Session {
  const { run, vaeSource, pictures } = materials;
  refuseFused(materials);
  requireAverages(run, 1 + further.length);
  const task: Task =
    run.train.target === 'vae'
      ? autoencoderTask(run, pictures, vaeSource, device)
      : diffusionTask(run, pictures, materials, prepared, device);
  const trained = trainedParameters(task.components);
  if (trained.size === 0) throw new UserError(whyNothing(run));
  for (const parameter of trained.values()) requireGrad(parameter.tensor);
  const passes = openReplicas(task, trained, device, further);
  const { parameters } = passes;
  const optimizer = createOptimizer(parameters, run.optimizer, run.seed, lrFactorOf(run, task.components));
  const average =
    run.ema.decay > 0
      ? startEma(parameters.keys(), (name) => optimizer.weightOf(name), run.ema.decay)
      : undefined;
  if (average) task.follow?.(average.weights);
  return {
    ...materials,
    device,
    task,
    parameters,
    passes,
    optimizer,
    ema: average,
    release() {
      passes.release();
      task.release();
      optimizer.release();
      average?.release();
    },
  };
}

/** @throws UserError where an update has several passes, whose gradients would have to wait for each other */
function refuseFused(materials: Materials): void {
  const { run, pictures } = materials;
  if (!run.train.fused_backward_pass || passesOfUpdate(materials) === 1) return;
  throw new UserError(
    `train.fused_backward_pass moves weights in the one pass that an update has, and pictures of ${new Set(pictures.bucketOf).size} sizes share no pass; set batch_size to 1, or dataset.aspect_ratio_buckets to false`,
  );
}

/** Why no weight is trained. */
function whyNothing({ train: { target, parts }, lora, optimizer }: Run): string {
  if (target === 'lora' && lora.targets.length === 0)
    return 'lora.targets is empty, so nothing would be trained; leave it out, or name layers such as to_q';
  const named =
    target === 'lora' ? 'layers of lora.targets' : `weights of train.parts ${JSON.stringify(parts)}`;
  if (optimizer.block_lr.length > 0)
    return `optimizer.block_lr is 0 for every block that has ${named}, so nothing would be trained; give one of them a rate`;
  return `train.parts ${JSON.stringify(parts)} matches no weight of the UNet; give a part of a key such as attn2`;
}

/** Blocks and text encoders may have learning rates of their own, and B of adapters a multiple. */
function lrFactorOf({ optimizer, lora }: Run, components: readonly Component[]): (name: string) => number {
  const rates = new Map<string, number | undefined>(
    components.flatMap(({ name, trained, lr }) =>
      trained.map((key) => [`${name}.${key}`, lr?.(key)] as const),
    ),
  );
  return (name) => {
    const factor = optimizer.lr ? (rates.get(name) ?? optimizer.lr) / optimizer.lr : 1;
    return /^lora\..*\.lora_B\.weight$/.test(name) ? factor * lora.loraplus_lr_ratio : factor;
  };
}

/** What a checkpoint says of this run. @throws UserError when it is none, or another run's */
export function stateOf(run: Run, checkpoint: string): State {
  const state = readState(checkpoint);
  const { step, epoch, update } = state;
  if (![step, epoch, update].every(Number.isInteger))
    throw new UserError(`${checkpoint} does not say where the run stood, so it is damaged; take another`);
  const then = { ...state.run, lr_scheduler: followed({ ...usual.lr_scheduler, ...state.run.lr_scheduler }) };
  const differs = difference(then, run, usual);
  if (differs) {
    throw new UserError(
      `${checkpoint} is of another run: ${differs}; resume with the run file that wrote it, or start anew with another output`,
    );
  }
  return state;
}

/** Puts a session where a checkpoint left it. @throws UserError when the checkpoint is another run's */
export function resumeSession(session: Session, checkpoint: string): Position {
  const { run, task, parameters, passes, optimizer, ema } = session;
  const state = stateOf(run, checkpoint);
  for (const component of task.components) {
    const { name } = component;
    const own = (key: string) => parameters.get(`${name}.${key}`) as Parameter;
    loadTrained(component, join(checkpoint, name), (key) => own(key).tensor);
    if (ema)
      loadTrained(
        component,
        join(checkpoint, 'ema', name),
        (key) => ema.weights.get(`${name}.${key}`) as Tensor,
      );
  }
  passes.share();
  loadTensors(join(checkpoint, 'optimizer.safetensors'), optimizer.state);
  return { step: state.step, epoch: state.epoch, update: state.update };
}

/** Uploads what a checkpoint has of a component's trained weights into the tensors that `tensorOf` gives. */
function loadTrained(
  { trained, parameters }: Component,
  folder: string,
  tensorOf: (key: string) => Tensor,
): void {
  const source = openWeights(folder);
  try {
    for (const key of trained) {
      const { layout, shape } = parameters.get(key) as Parameter;
      const [tensor, info] = [tensorOf(key), source.info(key)];
      if (info?.dtype !== tensor.dtype || info.shape.join() !== shape.join()) {
        throw new UserError(
          `${folder} does not fit this run: ${key} is ${info ? `${info.dtype} [${info.shape}]` : 'missing'}, not ${tensor.dtype} [${shape}]; resume with the run that wrote it`,
        );
      }
      const bytes = source.bytes(key);
      tensor.upload(layout === 'conv' ? channelsLast(bytes, shape, bytesPerElement[tensor.dtype]) : bytes);
    }
  } finally {
    source.close();
  }
}

/** How many passes an update may have: of each size that is in it, at least one. A device's second finds the gradients of its first. */
function passesOfUpdate({ run, pictures }: Materials): number {
  const { batch_size, gradient_accumulation_steps } = run;
  const samples = Math.min(batch_size * gradient_accumulation_steps, samplesPerEpoch(pictures.samples));
  const sizes = new Set(pictures.bucketOf).size;
  return Math.max(Math.ceil(samples / batch_size), Math.min(sizes, samples));
}

/**
 * The most memory of each device that a run takes (its preparation, the largest pass, backward and step, the largest preview, all run on
 * devices without numbers), and counts.
 */
export function estimate(
  materials: Materials,
  devices: readonly Device[] = [standInDevice()],
): { bytes: number[]; trained: number; all: number } {
  const [device, ...further] = devices;
  const session = openSession(materials, rehearse(materials, device), device, further);
  rehearseUpdate(session, devices);
  session.task.rehearsePreviews?.(session.ema?.weights);
  const sizes = (parameters: Iterable<Parameter>) => [...parameters].reduce((sum, { size }) => sum + size, 0);
  const all = session.task.components.flatMap(({ parameters }) => [...parameters.values()]);
  session.release();
  const bytes = devices.map(({ memory }) => memory.peak);
  return { bytes, trained: sizes(session.parameters.values()), all: sizes(all) };
}

/** An update of the largest pictures, without numbers. */
function rehearseUpdate(session: Session, devices: readonly Device[]): void {
  const { run, pictures, passes, optimizer, task, ema } = session;
  const area = (bucket: number) => pictures.buckets[bucket][0] * pictures.buckets[bucket][1];
  const bucket = pictures.bucketOf.reduce(
    (best, b) => (area(b) > area(best) ? b : best),
    pictures.bucketOf[0],
  );
  const samples = Array<number>(Math.min(run.batch_size, pictures.samples.length)).fill(0);
  const blank = () => task.blank({ bucket, samples });
  if (run.train.fused_backward_pass) {
    const { made, move } = optimizer.begin(run.optimizer.lr);
    moveThrough(session, blank(), move);
    boundNorms(session);
    ema?.step(made);
    return;
  }
  const rounds = passesOfUpdate(session) > devices.length ? 2 : 1;
  const losses = Array.from({ length: rounds * devices.length }, () => passes.queue(blank(), 1));
  passes.gather();
  const norms = queueNorms(session.parameters);
  const { made } = optimizer.step(run.optimizer.lr);
  boundNorms(session);
  for (const held of [norms, ...losses]) held.release();
  passes.share();
  ema?.step(made);
}
