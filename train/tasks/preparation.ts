// What the frozen models say, asked before anything that is trained is loaded: the VAE's moments of every picture, the text encoders'
// embeddings of every caption and of the previews' prompts (cache.ts). A model that is asked what the cache has not (frozen.ts) has the
// device to itself and is gone again when it has answered, so that an update shares its memory with none of them: of SDXL's 2.2 GiB,
// and 3.3 that encoding takes.
import { join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { visionEncoder } from '../../models/ip_adapter/clip_vision.ts';
import { type Part, textParts } from '../../models/load_options.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { encodePrompt } from '../../models/prompts.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { mostChunks, type PromptEmbeds } from '../../models/text/conditioning.ts';
import { withPosterior } from '../../models/vae/autoencoder.ts';
import { shownMasked } from '../controls/inpainting.ts';
import { shownOriginal } from '../controls/instruct_pix2pix.ts';
import { type IPAdapterBegin, openImageEncoder, saidFor, visionConfig } from '../controls/ip_adapter.ts';
import { allCaptions } from '../data/caption.ts';
import type { Sample } from '../data/survey.ts';
import { trainedScheduler } from '../objective/objective.ts';
import type { Report, Stop } from '../passes/task.ts';
import {
  captionsAtOnce,
  encodePicture,
  encodeTexts,
  imageCache,
  momentsCache,
  type PictureMoments,
  type PromptPair,
  picturesAtOnce,
  promptCache,
  type Shown,
  shownPicture,
  type TextEmbeddings,
  textCache,
  type View,
} from '../pictures/cache.ts';
import { frozen } from '../pictures/frozen.ts';
import { type Pictures, previewSize, viewsOf, withRejected } from '../pictures/pictures.ts';
import { previewsOf } from '../run/preview_prompts.ts';
import { type Run, trainsEdits, trainsTexts } from '../run/run.ts';

/** What a run is made of, as far as it is asked here. */
interface Subject {
  run: Run;
  pictures: Pictures;
  source: ModelSource;
  vaeSource: ModelSource;
  ipAdapter?: IPAdapterBegin;
}

export interface Prepared {
  moments(view: View): PictureMoments;
  /** Those of the pictures that the UNet sees beside the latents. @throws where it sees none */
  beside(view: View): PictureMoments;
  /** Absent where the text encoders run in the pass: they or a token's vectors are trained, or tags are drawn anew. */
  texts?: PreparedTexts;
  /** What the vision encoder says of a picture, where an IP-Adapter is trained; undefined is one that is left away. */
  images?(sample: Sample | undefined): Float32Array;
}

export interface PreparedTexts {
  /** Those of a caption; undefined is one that is left away. */
  read(caption: string | undefined): TextEmbeddings;
  /** By preview. */
  previews: readonly PromptEmbeds[];
}

/** The run's pipeline with the weights of some parts, which samples by the scheduler that the run trains for. @throws UserError */
export function openParts(
  { run, source, vaeSource }: Omit<Subject, 'pictures'>,
  device: Device,
  only: readonly Part[],
  vaeDtype?: 'float32',
): Pipeline {
  const { gradient_checkpointing: gradientCheckpointing, q8 } = run.train;
  const { dtype } = run;
  const pipeline: Pipeline = {
    ...loadPipeline(source, { device, dtype, only, vaeSource, vaeDtype, gradientCheckpointing, q8 }),
    scheduler: parseSchedulerConfig(trainedScheduler(source.config('scheduler'), run.objective)),
  };
  pipeline.text.chunks = mostChunks(run.dataset.max_token_length);
  return pipeline;
}

/** Of the VAE that makes the moments. */
const VAE_DTYPE = 'float32';

/** All captions, where they are encoded ahead. */
const captionsOf = ({ run, pictures }: Subject): string[] | undefined =>
  trainsTexts(run) ? undefined : allCaptions(pictures.samples, run.dataset);

/** Makes what is not in the cache yet; undefined once `stop.asked`, where what is made stays. @throws UserError */
export async function prepare(
  subject: Subject,
  device: Device,
  report: Report,
  stop: Stop,
): Promise<Prepared | undefined> {
  if (subject.run.train.target === 'vae') return nothing;
  const heard = (label: string) => (done: number, total: number) => {
    report.progress(label, done, total);
    return !stop.asked;
  };
  const encoded = await preparePictures(subject, device, heard);
  const captions = captionsOf(subject);
  const texts =
    captions && !stop.asked
      ? await prepareTexts(subject, device, captions, report, heard('encoding captions'))
      : undefined;
  const { ipAdapter } = subject;
  const images =
    ipAdapter && !stop.asked
      ? await prepareImages(subject, ipAdapter, device, heard('encoding image prompts'))
      : undefined;
  device.memory.trim(); // what follows needs other sizes
  return stop.asked ? undefined : { ...encoded, texts, images };
}

/** Hears how far something is; false has it left. */
type Heard = (done: number, total: number) => boolean;

async function preparePictures(
  subject: Subject,
  device: Device,
  heard: (label: string) => Heard,
): Promise<Pick<Prepared, 'moments' | 'beside'>> {
  const { run, pictures, vaeSource: source } = subject;
  const coder = withPosterior(openParts(subject, device, []).vae, source.path);
  const part = { source, name: 'vae', module: coder.module, config: coder.config };
  const weights = frozen(cacheFolder(run), [part], device, VAE_DTYPE);
  try {
    const { interpolation, alpha_mask } = run.dataset;
    const cacheOf = (shown: Shown) => momentsCache(cacheFolder(run), coder, weights, shown);
    const cache = cacheOf(shownPicture(interpolation, alpha_mask ? 'colours' : 'picture'));
    const views = viewsOf(pictures, run);
    await cache.fill(withRejected(views), heard('encoding pictures'));
    const edits = trainsEdits(run);
    if (!edits && !run.inpainting.mask_mode) return { ...nothing, moments: cache.read };
    const beside = cacheOf(edits ? shownOriginal(run) : shownMasked(run));
    await beside.fill(views, heard(edits ? 'encoding pictures before edits' : 'encoding masked pictures'));
    return { moments: cache.read, beside: beside.read };
  } finally {
    weights.release();
  }
}

async function prepareTexts(
  subject: Subject,
  device: Device,
  captions: readonly string[],
  report: Report,
  heard: Heard,
): Promise<PreparedTexts> {
  const { run, source } = subject;
  const pipeline = openParts(subject, device, []);
  const { encoders } = pipeline.text;
  const parts = textParts(source).map((name, i) => {
    return { source, name, module: encoders[i].encoder, config: source.config(name) };
  });
  const weights = frozen(cacheFolder(run), parts, device, run.dtype);
  try {
    const cache = textCache(cacheFolder(run), pipeline.text, weights);
    await cache.fill(captions, heard);
    for (const text of cache.tooLong(captions))
      report.line(
        `the end of this caption is not seen, it has more tokens than dataset.max_token_length: "${text}"`,
      );
    const prompts = promptCache(cacheFolder(run), pipeline, weights);
    const asked = previewPrompts(subject);
    await prompts.fill(asked);
    return { read: cache.read, previews: asked.map(prompts.read) };
  } finally {
    weights.release();
  }
}

async function prepareImages(
  { run, pictures }: Subject,
  begin: IPAdapterBegin,
  device: Device,
  heard: Heard,
): Promise<NonNullable<Prepared['images']>> {
  const encoder = visionEncoder(visionConfig(begin));
  const part = { source: begin.imageEncoder, name: 'image_encoder', module: encoder, config: encoder.config };
  const weights = frozen(cacheFolder(run), [part], device, run.dtype);
  try {
    const cache = imageCache(cacheFolder(run), encoder, weights, saidFor(run, begin));
    await cache.fill(pictures.samples, heard);
    return cache.read;
  } finally {
    weights.release();
  }
}

const cacheFolder = ({ dataset, output }: Run): string => dataset.cache || join(output, 'cache');

/** What previews are to show, and what not. */
const previewPrompts = ({ run }: Subject): PromptPair[] =>
  previewsOf(run.previews, previewSize(run)).map(({ prompt, negative_prompt }) => ({
    prompt,
    negative_prompt: negative_prompt || undefined,
  }));

/** The most memory that this takes, done once on a device without numbers. */
export function rehearse(subject: Subject, device: Device): Prepared {
  const { run, pictures } = subject;
  if (run.train.target === 'vae') return nothing;
  const coder = openParts(subject, device, ['vae'], VAE_DTYPE);
  const [h, w] = pictures.buckets.reduce((a, b) => (b[0] * b[1] > a[0] * a[1] ? b : a));
  const shape = [picturesAtOnce(h, w, pictures.samples.length), h, w, 3];
  noGrad(() => scope(() => void withPosterior(coder.vae, '').encode(zeros(shape, { device }))));
  coder.release();
  const { ipAdapter } = subject;
  if (ipAdapter) {
    const encoder = openImageEncoder(ipAdapter, device, run.dtype);
    encodePicture(encoder, undefined, 'penultimate');
    unload(encoder);
  }
  const images = ipAdapter && nothing.moments;
  const captions = captionsOf(subject);
  if (!captions) return { ...nothing, images };
  const encoders = openParts(subject, device, textParts(subject.source));
  encodeTexts(encoders.text, captions.slice(0, captionsAtOnce));
  const previews = previewPrompts(subject).map((asked) => encodePrompt(encoders, asked));
  encoders.release();
  return { ...nothing, texts: { read: nothing.moments, previews }, images };
}

const unprepared = (): never => {
  throw new Error('nothing was prepared of this run');
};

const nothing = { moments: unprepared, beside: unprepared };
