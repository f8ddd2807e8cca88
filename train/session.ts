// What updates are made of: the task with its weights on the devices, the passes, the optimizer and the moving average; and, to resume,
// all of these as a checkpoint left them.
import { join } from 'node:path';
import type { Device } from '../engine/device.ts';
import { requireGrad } from '../engine/grad.ts';
import type { Parameter } from '../engine/module.ts';
import { built } from '../engine/scope.ts';
import type { Tensor } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import { loadTensors, loadTrained, type Position } from './checkpoint.ts';
import { type Materials, mostPasses, stateOf } from './materials.ts';
import { createOptimizer } from './optimizers/create.ts';
import { type Ema, ema as startEma } from './optimizers/ema.ts';
import type { Optimizer } from './optimizers/rule.ts';
import { openReplicas, type Replicas } from './passes/replicas.ts';
import { type Component, type Task, trainedParameters } from './passes/task.ts';
import { requireAverages } from './run/rules/methods.ts';
import type { Run } from './run/run.ts';
import { autoencoderTask } from './tasks/autoencoder.ts';
import { diffusionTask } from './tasks/diffusion.ts';
import type { Prepared } from './tasks/preparation.ts';

export interface Session extends Materials {
  /** The one that has the whole model: caches and previews are made there. */
  device: Device;
  task: Task;
  /** What is trained, each on the device that moves it. */
  parameters: ReadonlyMap<string, Parameter>;
  passes: Replicas;
  optimizer: Optimizer;
  ema: Ema | undefined;
  /** What is drawn with, measured and finished, where it is other than the weights that are trained: moving averages, or the optimizer's. */
  averages: ReadonlyMap<string, Tensor> | undefined;
  release(): void;
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
    averages: optimizer.averages ?? average?.weights,
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
  if (!run.train.fused_backward_pass || mostPasses(materials) === 1) return;
  throw new UserError(
    `train.fused_backward_pass moves weights in the one pass that an update has, and pictures of ${new Set(pictures.bucketOf).size} sizes share no pass; set batch_size to 1, or give all one size: dataset.aspect_ratio_buckets false, and one dataset.resolution`,
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

/** Puts a session where a checkpoint left it. @throws UserError when the checkpoint is another run's */
export function resumeSession(session: Session, checkpoint: string): Position {
  const { run, task, parameters, passes, optimizer, ema } = session;
  const state = stateOf(run, checkpoint);
  for (const component of task.components) {
    const { name } = component;
    const own = (key: string) => parameters.get(`${name}.${key}`) as Parameter;
    const saved = (key: string) => optimizer.averages?.get(`${name}.${key}`) ?? own(key).tensor;
    loadTrained(component, join(checkpoint, name), saved);
    if (ema)
      loadTrained(
        component,
        join(checkpoint, 'ema', name),
        (key) => ema.weights.get(`${name}.${key}`) as Tensor,
      );
  }
  loadTensors(join(checkpoint, 'optimizer.safetensors'), optimizer.state);
  passes.broadcast();
  return { step: state.step, epoch: state.epoch, update: state.update };
}
