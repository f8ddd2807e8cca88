// Training the UNet, alone or with the text encoders, or what is put on it or beside it (twin.ts, controlnet.ts): latents drawn anew
// each epoch from their cached moments, captions chosen each epoch, time ids from the true crop, and the loss of objective.ts. A
// caption that is left away becomes what the model is given without a prompt: zeros (the base model), or the embedding of an empty text.
import { join } from 'node:path';
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import type { Tensors } from '../engine/op.ts';
import { scope } from '../engine/scope.ts';
import { sizeOf, type Tensor, zeros } from '../engine/tensor.ts';
import { withPosterior } from '../models/autoencoder.ts';
import type { ModelSource } from '../models/checkpoint.ts';
import { mostChunks } from '../models/conditioning.ts';
import { joined, samplePosterior } from '../models/latents.ts';
import { loadPipeline, type Pipeline } from '../models/pipeline.ts';
import { parseSchedulerConfig } from '../models/samplers/config.ts';
import { momentsCache, type PictureMoments, picturesAtOnce, type View } from './cache.ts';
import { type Control, controlled, uncontrolled, withControlNet } from './controlnet.ts';
import { nearestBucket } from './data/buckets.ts';
import { allCaptions, captionOf } from './data/caption.ts';
import { timeIdsOf } from './data/picture.ts';
import { draws } from './draws.ts';
import { masked } from './mask.ts';
import { diffusionLoss, noiseBatch, noisedInputs, objectiveOf, trainedScheduler } from './objective.ts';
import { type Pictures, viewIn } from './pictures.ts';
import { checkPreviews, rehearsePreviews, samplePreviews } from './preview.ts';
import { previewsOf } from './preview_prompts.ts';
import type { Run } from './run.ts';
import {
  component,
  copied,
  type HostTensor,
  lent,
  type Substitute,
  type Task,
  type Weights,
} from './task.ts';
import { cachedTexts, lazily, textsInPass } from './texts.ts';
import { adapters, releaseTwin, twinPipeline } from './twin.ts';

/** Where a run's weights begin. */
export interface Sources {
  source: ModelSource;
  vaeSource: ModelSource;
  /** A ControlNet to go on with. */
  controlSource?: ModelSource;
  /** The checkpoint that the run goes on from, if it does. */
  checkpoint?: string;
}

export function diffusionTask(run: Run, pictures: Pictures, sources: Sources, device: Device): Task {
  const { source } = sources;
  const { pipeline, components, frozen, added, networks } = partsOf(
    run,
    openPipeline(run, sources, device),
    sources,
  );
  const previews = previewsOf(run.previews, previewSize(run, pictures));
  checkPreviews(pipeline, run.previews, previews);
  const coder = withPosterior(pipeline.vae, sources.vaeSource.path);
  const objective = objectiveOf(run.objective, source.config('scheduler'));
  const control = controlOf(run, pipeline);
  const cacheFolder = run.dataset.cache || join(run.output, 'cache');
  const captions = run.train.text_encoders ? undefined : allCaptions(pictures.samples, run.dataset);
  const configs = networks.texts.map(({ name }) => source.config(name));
  const texts = captions ? cachedTexts(pipeline, captions, configs, cacheFolder) : textsInPass(pipeline);
  // Hashing the VAE reads all its weights.
  const { interpolation, alpha_mask } = run.dataset;
  const reading = alpha_mask ? 'colours' : 'picture';
  const moments = lazily(() => momentsCache(cacheFolder, coder, interpolation, reading));
  const hasPrior = pictures.samples.some(({ prior }) => prior);
  const latentShape = (bucket: number, n: number): number[] => {
    const [h, w] = pictures.buckets[bucket];
    return [n, h / pipeline.ratio, w / pipeline.ratio, pipeline.vae.config.latent_channels];
  };
  const lossOf = (model: Pipeline, inputs: Tensors): Tensor => {
    const { context, pooled } = texts.encoded(model, inputs);
    const conditioning = { context, textEmbeds: pooled, timeIds: inputs.timeIds };
    return diffusionLoss(control.network(model, inputs), objective, inputs, conditioning);
  };
  const twinOf = (substitute: Substitute) => twinPipeline(run, pipeline, networks, added, substitute);
  /** The model with other weights in what is trained; the model itself where there are none. */
  const averaged = (weights: Weights): Pipeline => (weights ? twinOf(lent(weights)).other : pipeline);
  return {
    components,
    frozen,
    async fillCache(report, stop) {
      const heard = (label: string) => (done: number, total: number) => {
        report.progress(label, done, total);
        return !stop.asked;
      };
      const views = Array.from({ length: run.dataset.crops }, (_, variant) =>
        pictures.samples.map((_, i) => viewIn(variant, i, pictures, run)),
      ).flat();
      await moments().fill(views, heard('encoding pictures'));
      if (!stop.asked) await texts.fill(report, heard('encoding captions'));
    },
    async prepare({ bucket, samples }, epoch, signal) {
      const views = samples.map((i) => viewIn(epoch, i, pictures, run));
      const latents = views.map((view) => drawLatents(moments().read(view), view, pipeline, run, epoch));
      const [, height, width] = latentShape(bucket, 1);
      const batch = {
        ids: views.map(({ sample }) => sample.key),
        ...{ epoch, latents: joined(latents), height, width },
        weights: hasPrior ? priorWeights(views, run) : undefined,
      };
      const chosen = views.map(({ sample: { captions: choices, key } }) =>
        captionOf(choices, run.dataset, { seed: run.seed, epoch, key }),
      );
      return {
        ...noisedInputs(noiseBatch(objective, batch, run.seed), run.dtype),
        timeIds: timeIdsInput(views, pipeline, run),
        ...texts.inputs(chosen),
        ...(await control.inputs(views, signal)),
      };
    },
    rehearseCache() {
      const [h, w] = pictures.buckets.reduce((a, b) => (b[0] * b[1] > a[0] * a[1] ? b : a));
      const shape = [picturesAtOnce(h, w, pictures.samples.length), h, w, 3];
      noGrad(() => scope(() => void coder.encode(zeros(shape, { device }))));
      texts.rehearse();
    },
    blank({ bucket, samples }) {
      const n = samples.length;
      const shape = latentShape(bucket, n);
      const nothing = new Float32Array(sizeOf(shape));
      const ids = pipeline.aesthetic ? 5 : 6;
      const noised = { shape, sample: nothing, timesteps: new Float32Array(n), target: nothing };
      return {
        ...noisedInputs(noised, run.dtype),
        timeIds: { shape: [n, ids], values: new Float32Array(n * ids), dtype: 'float32' },
        ...texts.blank(n),
        ...control.blank(n, pictures.buckets[bucket]),
      };
    },
    loss(inputs, weights) {
      const other = averaged(weights);
      try {
        return lossOf(other, inputs);
      } finally {
        releaseTwin(other, pipeline);
      }
    },
    // Pictures and frozen encoders stay where they are: other devices get what these say.
    replicate(further) {
      const { other, weights } = twinOf(copied(further));
      return {
        weights,
        loss: (inputs) => lossOf(other, inputs),
        release: () => releaseTwin(other, pipeline),
      };
    },
    async preview(weights, stop) {
      if (previews.length === 0) return [];
      const other = averaged(weights);
      try {
        return await samplePreviews(other, previews, pictures.validationImages, stop);
      } finally {
        releaseTwin(other, pipeline);
      }
    },
    rehearsePreviews(weights) {
      const other = averaged(weights);
      rehearsePreviews(other, previews, pictures.validationImages);
      releaseTwin(other, pipeline);
    },
    release: () => pipeline.release(),
  };
}

/** Pixels of a preview that names no size: the bucket of a square picture. */
function previewSize({ dataset: { resolution } }: Run, { buckets }: Pictures) {
  const [height, width] = buckets[nearestBucket([resolution, resolution], buckets)];
  return { height, width };
}

/** The model, which samples previews by the scheduler that it is trained for. @throws UserError */
function openPipeline(run: Run, { source, vaeSource }: Sources, device: Device): Pipeline {
  const { gradient_checkpointing: gradientCheckpointing, q8 } = run.train;
  const { dtype } = run;
  const pipeline: Pipeline = {
    ...loadPipeline(source, { device, dtype, vaeSource, vaeDtype: 'float32', gradientCheckpointing, q8 }),
    scheduler: parseSchedulerConfig(trainedScheduler(source.config('scheduler'), run.objective)),
  };
  pipeline.text.chunks = mostChunks(run.dataset.max_token_length);
  return pipeline;
}

/** What becomes of a run's conditioning images. */
function controlOf(run: Run, { ratio }: Pipeline): Control {
  if (run.train.target === 'controlnet') return controlled(run);
  return run.objective.masked_loss ? masked(run, ratio) : uncontrolled;
}

/** What the model is made of, which of it a run trains, and the pipeline with what that puts on it. */
function partsOf(run: Run, pipeline: Pipeline, sources: Sources) {
  const { source, vaeSource, controlSource, checkpoint } = sources;
  const { parts, text_encoders, target } = run.train;
  const { encoders } = pipeline.text;
  const names = encoders.length === 2 ? ['text_encoder', 'text_encoder_2'] : ['text_encoder_2'];
  const isTrained = (key: string) => parts.length === 0 || parts.some((part) => key.includes(part));
  const net = component('unet', source.config('unet'), pipeline.unet, isTrained);
  const texts = encoders.map(({ encoder }, i) => component(names[i], source.config(names[i]), encoder));
  const coder = component('vae', vaeSource.config('vae'), pipeline.vae.module);
  const networks = { net, texts };
  if (target === 'unet') {
    const beside = text_encoders ? texts : [];
    const frozen = [coder, ...texts.filter((each) => !beside.includes(each))];
    return { pipeline, networks, components: [net, ...beside], frozen };
  }
  // Made last: what is listed above is the model alone.
  const { other, added } =
    target === 'lora'
      ? { other: pipeline, added: adapters(run, pipeline, networks, checkpoint !== undefined) }
      : withControlNet(run, pipeline, source, controlSource);
  const frozen = [net, coder, ...texts];
  return { pipeline: other, networks, added, components: [added.component], frozen };
}

/** Scaled latents [h, w, c] drawn from the moments of a picture's view, anew each epoch. */
function drawLatents(
  { mean, logvar }: PictureMoments,
  { sample }: View,
  { vae }: Pipeline,
  { seed }: Run,
  epoch: number,
): Float32Array {
  const noise = draws(seed, epoch, sample.key, 'moments').normals(mean.length);
  return samplePosterior(mean, logvar, noise).map((z) => z * vae.config.scaling_factor);
}

/** What each picture's loss weighs beside those for prior preservation. */
const priorWeights = (views: readonly View[], { objective }: Run): Float32Array =>
  Float32Array.from(views, ({ sample }) => (sample.prior ? objective.prior_loss_weight : 1));

function timeIdsInput(views: readonly View[], { aesthetic }: Pipeline, { dataset }: Run): HostTensor {
  const rows = views.map(({ geometry }) =>
    timeIdsOf(geometry, aesthetic ? dataset.aesthetic_score : undefined),
  );
  return {
    shape: [rows.length, rows[0].length],
    values: Float32Array.from(rows.flat()),
    dtype: 'float32',
  };
}
