// Training a VAE (Kingma & Welling 2013; Rombach et al. 2022, without their discriminator): pictures through encoder, one
// draw of the posterior and decoder, and the loss of vae_objective.ts. At the end the latents' spread is measured over the
// pictures and becomes scaling_factor, so that a UNet trained on them sees unit variance.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { holding } from '../../engine/memory.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { add, mul } from '../../engine/ops/binary.ts';
import { cast, exp, scale } from '../../engine/ops/unary.ts';
import { built, scope } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import { grid } from '../../io/grid.ts';
import { toPictures } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { joined, toHost } from '../../models/vae/latents.ts';
import { parseVaeConfig, type Vae, vae } from '../../models/vae/vae.ts';
import { draws } from '../data/draws.ts';
import { vaeLoss } from '../objective/vae_objective.ts';
import {
  type Component,
  component,
  copied,
  lent,
  type Substitute,
  type Task,
  twin,
  type Weights,
} from '../passes/task.ts';
import { type Pictures, readView, spread, viewIn } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';

/** Pictures shown in a preview, and measured for the scale. */
const shown = 8;
const measured = 256;

/** What a run trains, and on what. */
interface TrainedVae {
  run: Run;
  pictures: Pictures;
  coder: Vae;
  component: Component;
  device: Device;
}

export function autoencoderTask(run: Run, pictures: Pictures, source: ModelSource, device: Device): Task {
  const config = { ...source.config('vae') };
  const coder = vae(parseVaeConfig(config));
  holding('vae', () => source.load('vae', coder.module, device, run.dtype));
  const trained: TrainedVae = {
    run,
    pictures,
    coder,
    component: component('vae', config, coder.module),
    device,
  };
  return {
    components: [trained.component],
    ...inputsOf(trained),
    loss(inputs, weights) {
      const used = weights ? twinOf(trained, lent(weights)).other : coder;
      try {
        return lossOf(run, used, inputs);
      } finally {
        if (used !== coder) unload(used.module);
      }
    },
    replicate(further) {
      const { other, weights } = twinOf(trained, copied(further));
      return {
        weights: new Map(weights),
        loss: (inputs) => lossOf(run, other, inputs),
        release: () => unload(other.module),
      };
    },
    preview: (weights) => beforeAndAfter(trained, weights),
    async finish(weights) {
      const meanOf = (i: number) =>
        throughVae(trained, i, weights, (other, x) => cast(other.encode(x).mean, 'float32').floats());
      config.scaling_factor = await scalingFactor(spread(placesOf(pictures), measured), meanOf);
      for (const each of ['latents_mean', 'latents_std']) delete config[each]; // the former latents'
    },
    release: () => unload(coder.module),
  };
}

/** The VAE with other weights, to be unloaded. */
const twinOf = ({ coder, component }: TrainedVae, substitute: Substitute) =>
  built(() => {
    const other = vae(coder.config);
    return { other, weights: twin(component, namedParameters(other.module), substitute) };
  });

/** Of `n` pictures of a bucket. */
function shapesOf({ pictures, coder: { config } }: TrainedVae, bucket: number, n: number) {
  const [h, w] = pictures.buckets[bucket];
  const ratio = 2 ** (config.block_out_channels.length - 1);
  return { picture: [n, h, w, 3], latent: [n, h / ratio, w / ratio, config.latent_channels] };
}

/** Pictures, and the noise by which their latents are drawn. */
function inputsOf(trained: TrainedVae): Pick<Task, 'prepare' | 'blank'> {
  const { run, pictures } = trained;
  const { dtype } = run;
  return {
    async prepare({ bucket, samples }, epoch, signal) {
      const pixels = samples.map((i) => readView(viewIn(epoch, i, pictures, run), run, signal));
      const { picture, latent } = shapesOf(trained, bucket, samples.length);
      const noise = samples.map((i) => {
        const { key } = pictures.samples[i];
        return draws(run.seed, epoch, key, 'moments').normals(sizeOf(latent) / samples.length);
      });
      return {
        pictures: { shape: picture, values: joined(await Promise.all(pixels)), dtype },
        noise: { shape: latent, values: joined(noise), dtype },
      };
    },
    blank({ bucket, samples }) {
      const { picture, latent } = shapesOf(trained, bucket, samples.length);
      const zeros = (shape: readonly number[]) => ({ shape, values: new Float32Array(sizeOf(shape)), dtype });
      return { pictures: zeros(picture), noise: zeros(latent) };
    },
  };
}

/** What `fn` makes of one picture and the VAE, with other weights where these are given. */
async function throughVae<R>(
  trained: TrainedVae,
  index: number,
  weights: Weights,
  fn: (vae: Vae, x: Tensor) => R,
): Promise<R> {
  const { run, pictures, device } = trained;
  const picture = await readView(viewIn(0, index, pictures, run), run);
  const { other } = twinOf(trained, lent(weights));
  const { picture: shape } = shapesOf(trained, pictures.bucketOf[index], 1);
  try {
    return noGrad(() => scope(() => fn(other, tensor(picture, shape, { device, dtype: run.dtype }))));
  } finally {
    unload(other.module);
  }
}

const placesOf = ({ samples }: Pictures): number[] => samples.map((_, i) => i);

/** Columns of a picture above what the VAE makes of it. */
async function beforeAndAfter(trained: TrainedVae, weights: Weights): Promise<Picture[]> {
  const columns: Picture[] = [];
  for (const i of spread(placesOf(trained.pictures), shown)) {
    const pair = await throughVae(trained, i, weights, (other, x) =>
      [x, other.decode(other.encode(x).mean)].map(toHost),
    );
    columns.push(grid(pair.map(({ data, shape }) => toPictures(data, shape))));
  }
  return columns;
}

/** The loss of pictures that go through a VAE, by a draw of what it makes of them. */
function lossOf({ vae_objective }: Run, used: Vae, given: Tensors): Tensor {
  const { pictures, noise } = given;
  const moments = used.encode(pictures);
  const z = add(moments.mean, mul(exp(scale(moments.logvar, 0.5)), noise));
  return vaeLoss(vae_objective, used.decode(z), pictures, moments);
}

/** What brings the latents of these pictures to a variance of 1. */
async function scalingFactor(
  pictures: readonly number[],
  meanOf: (index: number) => Promise<Float32Array | Int32Array>,
): Promise<number> {
  let [sum, squares, count] = [0, 0, 0];
  for (const i of pictures)
    for (const value of await meanOf(i))
      [sum, squares, count] = [sum + value, squares + value * value, count + 1];
  const variance = squares / count - (sum / count) ** 2;
  return Number((1 / Math.sqrt(variance)).toPrecision(6));
}
