// What the frozen models say of the data, kept on disk (cache_entries.ts): the VAE's moments of each picture (mean and log-variance, so
// that latents are drawn anew each epoch), the text encoders' embeddings of each caption and, for an IP-Adapter, a vision encoder's of
// each picture.
import { noGrad } from '../../engine/grad.ts';
import { placeOf } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import { decodePicture, preprocessClip } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ResizeFilter } from '../../io/resize.ts';
import { mostThreads } from '../../io/threads.ts';
import type { VisionEncoder } from '../../models/ip_adapter/clip_vision.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { encodePrompt } from '../../models/prompts.ts';
import { encodePrompts, type PromptEmbeds, type TextStack } from '../../models/text/conditioning.ts';
import { type LatentScale, samplePosterior, scaleLatents, toDevice } from '../../models/vae/latents.ts';
import type { Vae } from '../../models/vae/vae.ts';
import { grouped, slices } from '../data/batches.ts';
import { draws } from '../data/draws.ts';
import { readUnchanged, type Sample } from '../data/survey.ts';
import { entryPath, readEntry, withoutEntry, writeEntry } from './cache_entries.ts';
import type { Frozen } from './frozen.ts';
import type { Geometry, Reading } from './picture.ts';
import { readPixelsAside } from './pixel_threads.ts';

/** One picture, as it is shown in some epoch. */
export interface View {
  sample: Sample;
  /** Which of the versions that a run prepares: what else is drawn of it hangs on that. */
  variant: number;
  geometry: Geometry;
}

/** What the VAE is shown of a view. */
export interface Shown {
  /** All that its pixels depend on. */
  nameOf(view: View): object;
  /** [h, w, 3] in [-1, 1]. */
  read(view: View, signal: AbortSignal): Promise<Float32Array>;
}

/** The picture itself, or with the colours that are stored beneath what is transparent. */
export const shownPicture = (interpolation: ResizeFilter, reading: Reading = 'picture'): Shown => ({
  nameOf: ({ sample, geometry }) => ({
    ...{ picture: sample.hash, geometry, interpolation },
    ...(reading !== 'picture' && { reading }),
  }),
  read: (view, signal) => readShown(view, interpolation, reading, signal),
});

/** A view's pixels, or what else is to be read of its file. @throws UserError where the file is another by now */
export const readShown = async (
  { sample, geometry }: View,
  interpolation: ResizeFilter,
  reading?: Reading,
  signal?: AbortSignal,
): Promise<Float32Array> =>
  readPixelsAside(
    { file: await readUnchanged(sample), name: sample.id, geometry, interpolation, reading },
    signal,
  );

/** What the VAE gives for one view: [h, w, c] each, neither scaled nor clamped. */
export interface PictureMoments {
  mean: Float32Array;
  logvar: Float32Array;
}

/** What an IP-Adapter reads of a vision encoder. */
export type Said = 'image_embeds' | 'penultimate';

/** What the text encoders give for one caption: [77, c] and [p]. */
export interface TextEmbeddings {
  context: Float32Array;
  pooled: Float32Array;
}

/** Scaled latents [h, w, c] drawn from the moments of a view, anew each epoch. */
export function drawLatents(
  { mean, logvar }: PictureMoments,
  { sample }: View,
  scale: LatentScale,
  { seed, epoch }: { seed: number; epoch: number },
  purpose: 'moments' | 'masked_moments' = 'moments',
): Float32Array {
  const noise = draws(seed, epoch, sample.key, purpose).normals(mean.length);
  return scaleLatents(scale, samplePosterior(mean, logvar, noise), 1);
}

export interface Cache<Subject, Value> {
  /**
   * Makes what is not there and says how many that were; signals are heard meanwhile. Stops where `onProgress` returns false:
   * what is made stays. @throws UserError naming the subject that a model fails on
   */
  fill(subjects: readonly Subject[], onProgress?: (done: number, total: number) => unknown): Promise<number>;
  /** What `fill` has made. */
  read(subject: Subject): Value;
}

/** The VAE, which is that of `weights`, works in their type; it may be unloaded when all is filled. */
export function momentsCache(
  folder: string,
  vae: Vae,
  weights: Frozen,
  shown: Shown,
): Cache<View, PictureMoments> {
  const [encoder] = weights.hashes;
  const pathOf = (view: View) => entryPath(folder, 'moments', { ...shown.nameOf(view), encoder });
  return {
    read: (view) => readEntry(pathOf(view), ['mean', 'logvar'], view.sample.id),
    async fill(views, onProgress) {
      const missing = withoutEntry(views, pathOf);
      if (missing.length > 0) weights.load();
      const batches = equalSizes(missing.map(([, view]) => view));
      const ahead: Promise<Float32Array[]>[] = [];
      const { abort, signal, heard } = leaving(() => onProgress?.(done, missing.length));
      let done = 0;
      try {
        for (const [i, batch] of batches.entries()) {
          // While the VAE works on these, the next are read, one more than there are threads for it.
          for (const next of batches.slice(i + ahead.length, i + mostThreads + 1)) {
            const pixels = readViews(next, shown, signal, heard);
            pixels.catch(() => undefined); // told when it is awaited
            ahead.push(pixels);
          }
          const pixels = await (ahead.shift() as Promise<Float32Array[]>);
          if (signal.aborted) break;
          encodeViews(vae, batch, pixels).forEach((moments, k) => {
            writeEntry(pathOf(batch[k]), moments, `the VAE's moments of ${batch[k].sample.id}`);
          });
          done += batch.length;
          heard();
          if (signal.aborted) break;
        }
      } catch (error) {
        if (error !== signal.reason) throw error;
      } finally {
        abort(); // pictures that are still waiting to be read
      }
      return done;
    },
  };
}

/** How many pictures of a size the VAE takes at once: no more pixels than one of 1024 x 1024 has. */
export const picturesAtOnce = (height: number, width: number, count: number): number =>
  Math.min(count, Math.max(1, Math.floor(2 ** 20 / (height * width))));

/** How many captions the text encoders take at once. */
export const captionsAtOnce = 16;

/** Batches of one size each. */
const equalSizes = (views: readonly View[]): View[][] =>
  [...grouped(views, ({ geometry }) => geometry.target.join()).values()].flatMap((same) => {
    const [height, width] = same[0].geometry.target;
    return slices(same, picturesAtOnce(height, width, same.length));
  });

/** A signal that is aborted once `progress`, asked by `heard`, says false. */
function leaving(progress: () => unknown) {
  const controller = new AbortController();
  const abort = () => controller.abort();
  return {
    abort,
    signal: controller.signal,
    heard: () => {
      if (progress() === false) abort();
    },
  };
}

/** Calls `heard` after each picture, as those of a batch may take seconds. */
async function readViews(
  views: readonly View[],
  shown: Shown,
  signal: AbortSignal,
  heard: () => void,
): Promise<Float32Array[]> {
  return Promise.all(
    views.map(async (view) => {
      const pixels = await shown.read(view, signal);
      heard();
      return pixels;
    }),
  );
}

function encodeViews(vae: Vae, views: readonly View[], pixels: readonly Float32Array[]): PictureMoments[] {
  const [height, width] = views[0].geometry.target;
  const { device, dtype } = placeOf(vae.module);
  const all = new Float32Array(views.length * height * width * 3);
  pixels.forEach((values, i) => {
    all.set(values, i * values.length);
  });
  return noGrad(() =>
    scope(() => {
      const { mean, logvar } = vae.encode(tensor(all, [views.length, height, width, 3], { device, dtype }));
      const [means, logvars] = [rowsOf(mean), rowsOf(logvar)];
      return views.map((_, i) => ({ mean: means[i], logvar: logvars[i] }));
    }),
  );
}

export interface TextCache extends Cache<string | undefined, TextEmbeddings> {
  /** Those of the captions that have more tokens than are read, and lose their ends. */
  tooLong(captions: readonly string[]): string[];
}

/**
 * A caption left away (undefined) is the model's own unconditional: zeros, or the embeddings of an empty text where
 * `stack.forceZeros` is false. The encoders are those of `weights`.
 */
export function textCache(folder: string, stack: TextStack, weights: Frozen): TextCache {
  const { hashes: encoders } = weights;
  const tokensOf = (text: string) =>
    stack.encoders.map(({ tokenizer }) => tokenizer.encode(text, stack.chunks));
  const pathOf = (text: string) =>
    entryPath(folder, 'text', { tokens: tokensOf(text).map(({ ids }) => [...ids]), encoders });
  const read = (text: string): TextEmbeddings => readEntry(pathOf(text), ['context', 'pooled'], `"${text}"`);
  return {
    tooLong: (captions) =>
      captions.filter((text) => tokensOf(text).some(({ truncated }) => truncated !== '')),
    read(text) {
      const found = read(text ?? '');
      if (text !== undefined || !stack.forceZeros) return found;
      return { context: found.context.fill(0), pooled: found.pooled.fill(0) };
    },
    async fill(texts, onProgress) {
      // The empty text is always there: what is left away takes at least its shape.
      const missing = withoutEntry(['', ...texts.map((text) => text ?? '')], pathOf);
      if (missing.length > 0) weights.load();
      let done = 0;
      for (const batch of slices(missing, captionsAtOnce)) {
        encodeTexts(
          stack,
          batch.map(([, text]) => text),
        ).forEach((embeddings, i) => {
          writeEntry(batch[i][0], embeddings, `the text encoders' embeddings of "${batch[i][1]}"`);
        });
        done += batch.length;
        if (onProgress?.(done, missing.length) === false) break;
        await new Promise((resolve) => setImmediate(resolve));
      }
      return done;
    },
  };
}

/** A preview's text, and what it is not to show. */
export interface PromptPair {
  prompt: string;
  negative_prompt?: string;
}

/** The same of prompts by themselves, each in a pass of its own, as sampling reads them. */
export function promptCache(
  folder: string,
  pipeline: Pipeline,
  weights: Frozen,
): Cache<PromptPair, PromptEmbeds> {
  const { encoders, chunks, forceZeros } = pipeline.text;
  const tokensOf = (text: string) => encoders.map(({ tokenizer }) => [...tokenizer.encode(text, chunks).ids]);
  const pathOf = ({ prompt, negative_prompt: negative }: PromptPair) =>
    entryPath(folder, 'prompts', {
      ...{ tokens: tokensOf(prompt), negative: negative === undefined ? negative : tokensOf(negative) },
      ...{ forceZeros, encoders: weights.hashes },
    });
  return {
    read(asked) {
      const entry = readEntry(pathOf(asked), promptParts, `"${asked.prompt}"`);
      const width = pipeline.unetConfig.cross_attention_dim;
      const embeds = promptParts.map((name) => {
        const { length } = entry[name];
        const shape = name.includes('pooled') ? [1, length] : [1, length / width, width];
        return [name, { shape, data: entry[name] }];
      });
      return Object.fromEntries(embeds) as Required<PromptEmbeds>;
    },
    async fill(prompts) {
      const missing = withoutEntry(prompts, pathOf);
      if (missing.length > 0) weights.load();
      for (const [path, asked] of missing) {
        const embeds = encodePrompt(pipeline, asked);
        const values = Object.fromEntries(promptParts.map((name) => [name, embeds[name].data]));
        writeEntry(path, values, `the text encoders' embeddings of "${asked.prompt}"`);
      }
      return missing.length;
    },
  };
}

const promptParts = [
  'prompt_embeds',
  'pooled_prompt_embeds',
  'negative_prompt_embeds',
  'negative_pooled_prompt_embeds',
] as const;

/** Captions through the encoders, in the type of their weights. */
export function encodeTexts(stack: TextStack, texts: readonly string[]): TextEmbeddings[] {
  const { device, dtype } = placeOf(stack.encoders[0].encoder);
  return noGrad(() =>
    scope(() => {
      const options = { guided: false, copies: 1, device, dtype };
      const { context, pooled } = encodePrompts(stack, { prompt: texts }, options);
      const [contexts, pools] = [rowsOf(context), rowsOf(pooled)];
      return texts.map((_, i) => ({ context: contexts[i], pooled: pools[i] }));
    }),
  );
}

/**
 * What a vision encoder says of whole pictures, as an IP-Adapter reads it; a picture that is left away (undefined) is zeros: of an embedding
 * itself, else pixels of zeros.
 */
export function imageCache(
  folder: string,
  encoder: VisionEncoder,
  weights: Frozen,
  wanted: Said,
): Cache<Sample | undefined, Float32Array> {
  const [hash] = weights.hashes;
  const pathOf = (sample: Sample | undefined) =>
    entryPath(folder, 'images', { picture: sample?.hash ?? '', encoder: hash, wanted });
  const nameOf = (sample: Sample | undefined) => sample?.id ?? 'no picture';
  return {
    read: (sample) => readEntry(pathOf(sample), ['said'], nameOf(sample)).said,
    async fill(samples, onProgress) {
      const missing = withoutEntry([undefined, ...samples], pathOf);
      if (missing.length > 0) weights.load();
      let done = 0;
      for (const [path, sample] of missing) {
        const picture =
          sample && (await decodePicture(await readUnchanged(sample), sample.id, { onWhite: true }));
        const said = encodePicture(encoder, picture, wanted);
        writeEntry(path, { said }, `what the image encoder says of ${nameOf(sample)}`);
        if (onProgress?.(++done, missing.length) === false) break;
      }
      return done;
    },
  };
}

/** A picture through the encoder, in the type of its weights. */
export function encodePicture(
  encoder: VisionEncoder,
  picture: Picture | undefined,
  wanted: Said,
): Float32Array<ArrayBuffer> {
  const { image_size: side, projection_dim } = encoder.config;
  if (!picture && wanted === 'image_embeds') return new Float32Array(projection_dim);
  const { device, dtype } = placeOf(encoder);
  return noGrad(() =>
    scope(() => {
      const pixels = picture
        ? toDevice(preprocessClip(picture, side), device, dtype)
        : zeros([1, side, side, 3], { device, dtype });
      return new Float32Array(encoder(pixels, wanted).floats());
    }),
  );
}

/** The rows of the first axis, each an array of its own. */
function rowsOf(t: Tensor): Float32Array[] {
  const values = t.floats();
  const size = values.length / t.shape[0];
  return Array.from({ length: t.shape[0] }, (_, i) => values.slice(i * size, (i + 1) * size));
}
