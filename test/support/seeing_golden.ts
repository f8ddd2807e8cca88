// The gradients of a pass of training of a UNet that sees more than latents, from files on, against diffusers'
// (golden/inpainting_training.jsonl): what train_inpainting.test.ts and train_instruct_pix2pix.test.ts share.
import { join } from 'node:path';
import type { Test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { namedParameters } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { toDevice } from '../../models/vae/latents.ts';
import type { Control } from '../../train/controls/control.ts';
import type { RandomMask } from '../../train/data/random_mask.ts';
import { diffusionLoss, objectiveOf } from '../../train/objective/objective.ts';
import { momentsCache, type PictureMoments, type Shown, type View } from '../../train/pictures/cache.ts';
import { openPictures, viewIn } from '../../train/pictures/pictures.ts';
import type { Run } from '../../train/run/run.ts';
import { numbers } from './controlnet_golden.ts';
import { goldenLines, permuted } from './golden.ts';
import { loaded } from './loaded.ts';
import { device, folder, silent } from './small_runs.ts';

interface Drawing {
  mode: RandomMask;
  size: [number, number];
  mean: number;
  deviation: number;
  rates: number[];
}
type Told = { model: string; loss: number };
type Gradient = [model: string, key: string, part: number, norm: number, sum: number];
export const seeingGolden = goldenLines<Drawing | Told | Gradient>('inpainting_training');

interface Subject {
  own: Run;
  model: string;
  shown: Shown;
  controlOf(run: Run, pipeline: Pipeline, moments: (view: View) => PictureMoments): Control;
}

/** `name` is the golden model's; the run's two pictures are of 64 x 64. */
export async function gradients(t: Test, name: string, { own, model, shown, controlOf }: Subject) {
  const before = device.memory.storages;
  own.dataset.random_flip = false;
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  const pictures = await openPictures(own, 32, silent);
  const views = [0, 1].map((i) => viewIn(0, i, pictures, own));
  const { vae } = pipeline;
  if (!vae.posterior) throw new Error('the golden model has a VAE');
  const cache = momentsCache(join(folder, `${name}-cache`), vae, loaded([vae.module, vae.config]), shown);
  t.equal(await cache.fill(views), 2);
  t.equal(await cache.fill(views), 0);
  // Next to no variance: the posterior's mode.
  const control = controlOf(own, pipeline, (view) => {
    const { mean } = cache.read(view);
    return { mean, logvar: new Float32Array(mean.length).fill(-30) };
  });
  const { beside } = await control.inputs(views, 0);
  t.same(
    [beside.shape, beside.dtype],
    [[2, 8, 8, pipeline.unetConfig.in_channels - 4], 'float32'],
    'what it sees',
  );
  t.same(control.blank(2, [64, 64]).beside.shape, beside.shape);
  const parameters = namedParameters(pipeline.unet);
  for (const { tensor: weight } of parameters.values()) requireGrad(weight);
  scope(() => {
    const given = (key: string, ...shape: number[]) =>
      tensor(numbers(`${name}.${key}`, shape), shape, { device });
    const latents = (key: string) =>
      toDevice({ shape: [2, 4, 8, 8], data: numbers(`${name}.${key}`, [2, 4, 8, 8]) }, device, 'float32');
    const inputs = {
      ...{ sample: latents('sample'), target: latents('target') },
      timesteps: tensor([7, 803], [2], { device }),
      beside: tensor(beside.values as Float32Array, beside.shape, { device }),
    };
    const ids = [64, 64, 0, 0, 64, 64];
    const conditioning = {
      context: given('encoder_hidden_states', 2, 77, 80),
      textEmbeds: given('text_embeds', 2, 40),
      timeIds: tensor([...ids, ...ids], [2, 6], { device }),
    };
    const objective = objectiveOf(own.objective, openModel(model).config('scheduler'));
    const loss = diffusionLoss(control.network(pipeline, inputs), objective, inputs, conditioning);
    const told = seeingGolden.find((each): each is Told => 'loss' in each && each.model === name);
    const [got] = loss.floats();
    t.ok(Math.abs(got / Number(told?.loss) - 1) < 3e-6, `the loss ${got}, diffusers' ${told?.loss}`);
    backward(loss);
  });
  const wanted = seeingGolden.filter((each): each is Gradient => Array.isArray(each) && each[0] === name);
  t.ok(wanted.length > 40, `${wanted.length}`);
  let worst = { key: '', error: 0 };
  for (const [, key, part, norm, sum] of wanted) {
    const parameter = parameters.get(key);
    const values = scope(() => parameter && gradOf(parameter.tensor)?.floats());
    if (!parameter || !values) throw new Error(`${key} has no gradient`);
    const [, i = 1, ...taps] = parameter.shape;
    const laid = parameter.layout === 'conv' ? permuted(values, parameter.memoryShape, [0, 3, 1, 2]) : values;
    const area = taps.reduce((product, side) => product * side, 1);
    // Of the first convolution a channel of what it reads.
    const of = key === 'conv_in.weight' ? laid.filter((_, at) => Math.floor(at / area) % i === part) : laid;
    const factors = numbers(key, [of.length]);
    const ownNorm = Math.sqrt(of.reduce((total, x) => total + x * x, 0));
    const ownSum = of.reduce((total, x, at) => total + x * factors[at], 0);
    const error = Math.max(Math.abs(ownNorm - norm), Math.abs(ownSum - sum) / 1.15) / norm;
    if (error > worst.error) worst = { key, error };
  }
  t.ok(worst.error < 1e-4, `${worst.key} is ${worst.error} off`);
  for (const { tensor: weight } of parameters.values()) clearGrad(weight);
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
}
