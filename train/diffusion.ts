// Training the UNet, alone or with the text encoders: latents drawn anew each epoch from their cached moments, captions
// chosen each epoch, time ids from the true crop, and the loss of objective.ts. A caption that is left away becomes what the
// model is given without a prompt: zeros (the base model), or the embedding of an empty text.
import { join } from 'node:path';
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import type { Tensors } from '../engine/op.ts';
import { mul } from '../engine/ops/binary.ts';
import { cast } from '../engine/ops/unary.ts';
import { scope } from '../engine/scope.ts';
import { sizeOf, type Tensor, zeros } from '../engine/tensor.ts';
import type { Json, ModelSource } from '../models/checkpoint.ts';
import { parseTextConfig } from '../models/clip.ts';
import { chunksOf, type Encoded, encodeTokens, tokensOf } from '../models/conditioning.ts';
import { joined, samplePosterior } from '../models/latents.ts';
import { loadPipeline, type Pipeline, samplerFor } from '../models/pipeline.ts';
import { parseSchedulerConfig } from '../models/samplers/config.ts';
import {
  captionsAtOnce,
  encodeTexts,
  momentsCache,
  type PictureMoments,
  picturesAtOnce,
  type TextEmbeddings,
  textCache,
} from './cache.ts';
import { allCaptions, captionOf } from './data/caption.ts';
import { timeIdsOf } from './data/picture.ts';
import { draws } from './draws.ts';
import { diffusionLoss, noiseBatch, noisedInputs, objectiveOf, trainedScheduler } from './objective.ts';
import { type Pictures, viewIn } from './pictures.ts';
import { samplePreviews, schedulerOf } from './preview.ts';
import type { Run } from './run.ts';
import {
  component,
  copied,
  type HostTensor,
  lent,
  type PassInputs,
  type Substitute,
  type Task,
  type Weights,
} from './task.ts';
import { adapters, releaseTwin, twinPipeline } from './twin.ts';

export function diffusionTask(
  run: Run,
  pictures: Pictures,
  source: ModelSource,
  vaeSource: ModelSource,
  device: Device,
): Task {
  const { parts, text_encoders, gradient_checkpointing: gradientCheckpointing, target } = run.train;
  const pipeline: Pipeline = {
    ...loadPipeline(source, {
      device,
      dtype: run.dtype,
      vaeSource,
      vaeDtype: 'float32',
      gradientCheckpointing,
    }),
    scheduler: parseSchedulerConfig(trainedScheduler(source.config('scheduler'), run.objective)),
  };
  pipeline.text.chunks = chunksOf(run.dataset.max_token_length);
  samplerFor(pipeline, { scheduler: schedulerOf(run.previews) }); // refuses a name that is none now, not at the first preview
  const objective = objectiveOf(run.objective, source.config('scheduler'));
  const names = pipeline.text.encoders.length === 2 ? ['text_encoder', 'text_encoder_2'] : ['text_encoder_2'];
  const configs = names.map((name) => source.config(name));
  const isTrained = (key: string) => parts.length === 0 || parts.some((part) => key.includes(part));
  const net = component('unet', source.config('unet'), pipeline.unet, isTrained);
  const texts = pipeline.text.encoders.map(({ encoder }, i) => component(names[i], configs[i], encoder));
  const coder = component('vae', vaeSource.config('vae'), pipeline.vae.module);
  // Adapters are made last: what is listed above is the model alone.
  const trained = target === 'lora' ? adapters(run, pipeline, { net, texts }) : net;
  const [components, frozen] =
    target === 'lora'
      ? [[trained], [net, coder, ...texts]]
      : text_encoders
        ? [[trained, ...texts], [coder]]
        : [[trained], [coder, ...texts]];

  const cacheFolder = run.dataset.cache || join(run.output, 'cache');
  const captions = text_encoders ? undefined : allCaptions(pictures.samples, run.dataset);
  // Hashing the encoders reads all their weights, so the caches are made when they are first asked for.
  const moments = lazily(() => momentsCache(cacheFolder, pipeline.vae, run.dataset.interpolation));
  const embeddings = lazily(() => textCache(cacheFolder, pipeline.text, configs));

  const hasPrior = pictures.samples.some(({ prior }) => prior);
  const latentShape = (bucket: number, n: number): number[] => {
    const [h, w] = pictures.buckets[bucket];
    return [n, h / pipeline.ratio, w / pipeline.ratio, pipeline.vae.config.latent_channels];
  };
  const lossOf = (model: Pipeline, inputs: Tensors): Tensor => {
    const { context, pooled } = captions ? inputs : encoded(model, inputs);
    const conditioning = { context, textEmbeds: pooled, timeIds: inputs.timeIds };
    return diffusionLoss(model.unet, objective, inputs, conditioning);
  };
  const twinOf = (substitute: Substitute) => twinPipeline(run, pipeline, { net, texts }, trained, substitute);
  /** The model with other weights in what is trained; the model itself where there are none. */
  const averaged = (weights: Weights): Pipeline => (weights ? twinOf(lent(weights)).other : pipeline);
  return {
    components,
    frozen,
    async fillCache(report, stop) {
      const tell = (label: string) => (done: number, total: number) => {
        report.progress(label, done, total);
        return !stop.asked;
      };
      const views = Array.from({ length: run.dataset.crops }, (_, variant) =>
        pictures.samples.map((_, i) => viewIn(variant, i, pictures, run)),
      ).flat();
      await moments().fill(views, tell('encoding pictures'));
      if (!captions || stop.asked) return;
      await embeddings().fill(captions, tell('encoding captions'));
      for (const text of embeddings().tooLong(captions))
        report.line(
          `the end of this caption is not seen, it has more tokens than dataset.max_token_length: "${text}"`,
        );
    },
    async prepare({ bucket, samples }, epoch) {
      const views = samples.map((i) => viewIn(epoch, i, pictures, run));
      const ids = views.map(({ sample }) => sample.key);
      const latents = views.map((view) =>
        drawLatents(
          moments().read(view),
          pipeline.vae.config.scaling_factor,
          run.seed,
          epoch,
          view.sample.key,
        ),
      );
      const chosen = views.map(({ sample: { captions: choices, key } }) =>
        captionOf(choices, run.dataset, { seed: run.seed, epoch, key }),
      );
      const [, height, width] = latentShape(bucket, 1);
      const weights = hasPrior
        ? Float32Array.from(views, ({ sample }) => (sample.prior ? run.objective.prior_loss_weight : 1))
        : undefined;
      const batch = { ids, epoch, latents: joined(latents), height, width, weights };
      const timeIds = views.map(({ geometry }) =>
        timeIdsOf(geometry, pipeline.aesthetic ? run.dataset.aesthetic_score : undefined),
      );
      return {
        ...noisedInputs(noiseBatch(objective, batch, run.seed), run.dtype),
        timeIds: {
          shape: [timeIds.length, timeIds[0].length],
          values: Float32Array.from(timeIds.flat()),
          dtype: 'float32',
        },
        ...(captions
          ? embeddedInputs(
              pipeline,
              chosen.map((caption) => embeddings().read(caption)),
            )
          : tokenInputs(pipeline, chosen)),
      };
    },
    rehearseCache() {
      const [h, w] = pictures.buckets.reduce((a, b) => (b[0] * b[1] > a[0] * a[1] ? b : a));
      const shape = [picturesAtOnce(h, w, pictures.samples.length), h, w, 3];
      noGrad(() => scope(() => void pipeline.vae.encode(zeros(shape, { device }))));
      if (captions)
        noGrad(() => scope(() => void encodeTexts(pipeline.text, captions.slice(0, captionsAtOnce))));
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
        ...(captions
          ? blankEmbeddings(pipeline, configs, n)
          : tokenInputs(pipeline, Array<string>(n).fill(''))),
      };
    },
    loss(inputs, weights) {
      const other = averaged(weights);
      const loss = lossOf(other, inputs);
      releaseTwin(other, pipeline);
      return loss;
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
      if (run.previews.prompts.length === 0) return [];
      const [height, width] = pictures.buckets[0];
      const other = averaged(weights);
      try {
        return await samplePreviews(other, run.previews, { height, width }, stop);
      } finally {
        releaseTwin(other, pipeline);
      }
    },
    release: () => pipeline.release(),
  };
}

function lazily<T>(make: () => T): () => T {
  let made: T | undefined;
  return () => (made ??= make());
}

/** Scaled latents [h, w, c] drawn from the moments, anew each epoch. */
function drawLatents(
  { mean, logvar }: PictureMoments,
  scaling: number,
  seed: number,
  epoch: number,
  key: number,
): Float32Array {
  const noise = draws(seed, epoch, key, 'moments').normals(mean.length);
  return samplePosterior(mean, logvar, noise).map((z) => z * scaling);
}

/** What the cache has of captions, as inputs [n, 77, c] and [n, p]. */
function embeddedInputs({ dtype, unetConfig }: Pipeline, found: readonly TextEmbeddings[]): PassInputs {
  const n = found.length;
  const context = joined(found.map((row) => row.context));
  const pooled = joined(found.map((row) => row.pooled));
  const width = unetConfig.cross_attention_dim;
  return {
    context: { shape: [n, context.length / (n * width), width], values: context, dtype },
    pooled: { shape: [n, pooled.length / n], values: pooled, dtype },
  };
}

/** Inputs of their shapes without a caption. */
function blankEmbeddings(
  { text, dtype, unetConfig }: Pipeline,
  configs: readonly Json[],
  n: number,
): PassInputs {
  const tokens = tokensOf(text.encoders[0], [''], text.chunks).ids.values.length;
  const { projection_dim = 0 } = parseTextConfig(configs[configs.length - 1]);
  const blank = (...shape: number[]): HostTensor => ({
    shape,
    values: new Float32Array(sizeOf(shape)),
    dtype,
  });
  return { context: blank(n, tokens, unetConfig.cross_attention_dim), pooled: blank(n, projection_dim) };
}

/** Captions for encoders that run in the pass: their tokens, and masks where a model wants zeros for those left away. */
function tokenInputs({ text, dtype }: Pipeline, captions: readonly (string | undefined)[]): PassInputs {
  const n = captions.length;
  const texts = captions.map((caption) => caption ?? '');
  const tokens = text.encoders.flatMap((encoder, i) => {
    const { ids, ends } = tokensOf(encoder, texts, text.chunks);
    return [
      [`ids_${i}`, { ...ids, dtype: 'int32' }] as const,
      [`ends_${i}`, { ...ends, dtype: 'int32' }] as const,
    ];
  });
  const masked = text.forceZeros && captions.includes(undefined);
  const kept = Float32Array.from(captions, (caption) => (caption === undefined ? 0 : 1));
  return { ...Object.fromEntries(tokens), ...(masked && { kept: { shape: [n], values: kept, dtype } }) };
}

/** Those captions through the encoders; the rows of those left away are zero. */
function encoded({ text, dtype }: Pipeline, inputs: Tensors): Encoded {
  const states = encodeTokens(
    text,
    text.encoders.map((_, i) => ({ ids: inputs[`ids_${i}`], ends: inputs[`ends_${i}`] })),
  );
  const [context, pooled] = [cast(states.context, dtype), cast(states.pooled, dtype)];
  const { kept } = inputs;
  if (!kept) return { context, pooled };
  return { context: mul(context, kept.reshape(-1, 1, 1)), pooled: mul(pooled, kept.reshape(-1, 1)) };
}
