// A run's pictures: which there are, the sizes they are cropped to, and what is done to each in an epoch.
import { createHash } from 'node:crypto';
import { UserError } from '../../io/errors.ts';
import { readPicture } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import type { Size } from '../../models/text/conditioning.ts';
import { hashOfCaptions } from '../data/caption.ts';
import { draws, keyOf } from '../data/draws.ts';
import { openDataset } from '../data/source.ts';
import { type Sample, survey } from '../data/survey.ts';
import { templatesOf } from '../data/templates.ts';
import type { Report } from '../passes/task.ts';
import type { Run } from '../run/run.ts';
import { openBuckets, resolutionsOf } from './buckets.ts';
import { readShown, type View } from './cache.ts';
import { geometryOf, type Reading } from './picture.ts';

export interface Pictures {
  samples: readonly Sample[];
  buckets: readonly Size[];
  /** By sample, the index of its bucket. */
  bucketOf: readonly number[];
  /** Names the samples and their contents: a resumed run must see the same ones. */
  hash: string;
  /** Names their captions, of which it may see others. */
  captionsHash: string;
  /** What previews follow, of a ControlNet, T2I-Adapter or IP-Adapter that is trained, or what an inpainting model paints in. */
  validationImages: readonly Picture[];
}

/** Looks at every picture of a run. Sides will be multiples of `step`. @throws UserError */
export async function openPictures(run: Run, step: number, report: Report): Promise<Pictures> {
  const { path, folder_repeats } = run.dataset;
  if (!path) throw new UserError('the run names no dataset; set dataset.path to a folder or a hub id');
  for (const resolution of resolutionsOf(run.dataset))
    if (resolution % step)
      throw new UserError(
        `dataset.resolution ${resolution} is not divisible by ${step}, which this model needs; ${Math.max(step, resolution - (resolution % step))} is`,
      );
  const found = [...(await ownSamples(run, report)), ...(await priorSamples(run, report))];
  const all = folder_repeats ? found.flatMap(repeated) : found;
  const { buckets, bucketsOf } = openBuckets(run.dataset, step);
  const placed = all.flatMap((sample) =>
    bucketsOf(sample.size).map((bucket, i) => ({
      bucket,
      sample: i === 0 ? sample : again(sample, `at ${buckets[bucket].join('x')}`),
    })),
  );
  const samples = placed.map(({ sample }) => sample);
  const names = samples.map(({ id, hash, beside }) => [id, hash, ...(beside ? [beside.hash] : [])].join(' '));
  return {
    samples,
    buckets,
    bucketOf: placed.map(({ bucket }) => bucket),
    hash: createHash('sha256').update(names.join('\n')).digest('hex'),
    captionsHash: hashOfCaptions(samples),
    validationImages: await Promise.all(run.previews.validation_image.map(readPicture)),
  };
}

/** The pictures that a run learns from, under templates where it has these in the captions' place. */
async function ownSamples({ dataset, textual_inversion }: Run, report: Report): Promise<Sample[]> {
  const { learnable_property, placeholder_token } = textual_inversion;
  const templates = templatesOf(learnable_property, placeholder_token);
  const given = templates ? { ...dataset, instance_prompt: templates[0] } : dataset;
  const { caption_prefix, caption_suffix } = dataset;
  const affixed = (caption: string) =>
    [caption_prefix, caption, caption_suffix].filter((text) => text !== '').join(' ');
  return (await look(given, 'looking at pictures', report)).map((sample) => ({
    ...sample,
    captions: (templates ?? sample.captions).map(affixed),
  }));
}

/** Pictures for prior preservation. Their draws are not those of pictures of the same names. */
async function priorSamples({ dataset }: Run, report: Report): Promise<Sample[]> {
  const { class_data_dir: path, class_prompt: instance_prompt } = dataset;
  if (!path) return [];
  const ofClass = { ...dataset, path, instance_prompt, conditioning_image_column: '' };
  const samples = await look(ofClass, 'looking at pictures of the class', report).catch(refuseClass);
  return samples.map((sample) => {
    const id = `class/${sample.id}`;
    return { ...sample, id, key: keyOf(id), prior: true };
  });
}

/** @throws what was thrown, a mistake of the user's in the words of the class */
function refuseClass(error: unknown): never {
  if (!(error instanceof UserError)) throw error;
  const told = error.message.replaceAll('dataset.instance_prompt', 'dataset.class_prompt');
  throw new UserError(`dataset.class_data_dir: ${told}`);
}

/** Looks at the pictures of a dataset, and tells of those that are left out. */
async function look(dataset: Run['dataset'], label: string, report: Report): Promise<Sample[]> {
  const onProgress = (done: number, total: number) => report.progress(label, done, total);
  const { broken } = dataset;
  const { samples, skipped } = await survey(await openDataset(dataset), { broken, onProgress });
  for (const problem of skipped) report.line(`skipped: ${problem}`);
  return samples;
}

/** A picture as often as its topmost folder says, `10_name`: the same file, with draws of its own each time. */
function repeated(sample: Sample): Sample[] {
  const count = Number(/^(?:class\/)?([1-9]\d*)_[^/]*\//.exec(sample.id)?.[1] ?? 1);
  return Array.from({ length: count }, (_, i) => (i === 0 ? sample : again(sample, `(${i + 1})`)));
}

/** A picture once more, with draws of its own. */
function again(sample: Sample, time: string): Sample {
  const id = `${sample.id} ${time}`;
  return { ...sample, id, key: keyOf(id) };
}

/** Pixels that sides divide by: what the VAE shrinks by, times what the UNet halves where that is trained. */
export function sideStep(
  source: ModelSource,
  vaeSource: ModelSource,
  target: Run['train']['target'],
): number {
  const halvings = (component: string, from: ModelSource) =>
    (from.config(component).block_out_channels as number[]).length - 1;
  return 2 ** (halvings('vae', vaeSource) + (target === 'vae' ? 0 : halvings('unet', source)));
}

/** Pixels of a preview that names no size: the square of the run's resolution, of several the largest. */
export function previewSize({ dataset }: Run) {
  const side = Math.max(...resolutionsOf(dataset));
  return { height: side, width: side };
}

function viewOf(index: number, pictures: Pictures, run: Run, variant: number, flip: boolean): View {
  const sample = pictures.samples[index];
  const target = pictures.buckets[pictures.bucketOf[index]];
  const place = { seed: run.seed, key: sample.key, variant, flip };
  return { sample, variant, geometry: geometryOf(sample.size, target, run.dataset, place) };
}

/** How sample `index` is shown in an epoch: its crops in turn, and mirrored as the epoch draws. */
export function viewIn(epoch: number, index: number, pictures: Pictures, run: Run): View {
  const { crops, random_flip } = run.dataset;
  const { key } = pictures.samples[index];
  const flip = random_flip && draws(run.seed, epoch, key, 'flip').uniform() < 0.5;
  return viewOf(index, pictures, run, epoch % crops, flip);
}

/** All views that epochs may show. */
export function viewsOf(pictures: Pictures, run: Run): View[] {
  const { crops, random_flip } = run.dataset;
  return Array.from({ length: crops }, (_, variant) =>
    (random_flip ? [false, true] : [false]).map((flip) =>
      pictures.samples.map((_, i) => viewOf(i, pictures, run, variant, flip)),
    ),
  ).flat(2);
}

/** The view's pixels, [h, w, 3] in [-1, 1], or what else is to be read of its picture. */
export const readView = (
  view: View,
  { dataset }: Run,
  signal?: AbortSignal,
  reading?: Reading,
): Promise<Float32Array> => readShown(view, dataset.interpolation, reading, signal);

/** The conditioning image of the view's picture, done the same to: [h, w, 3] in [0, 1]. */
export const readConditioning = (view: View, run: Run, signal?: AbortSignal): Promise<Float32Array> =>
  readView(besideView(view), run, signal, 'conditioning');

/** The view of the picture beside the view's own, cropped, mirrored and drawn for alike. */
export function besideView(view: View): View {
  const { id, hash, read } = view.sample.beside as NonNullable<Sample['beside']>;
  return { ...view, sample: { ...view.sample, id, hash, read } };
}

/** Behind the views those of the pictures that were rejected for them, if any. */
export const withRejected = (views: readonly View[]): View[] => [
  ...views,
  ...views.filter(({ sample }) => sample.beside?.kind === 'rejected picture').map(besideView),
];

/** `count` entries, evenly spread; all where there are no more. */
export function spread<T>(values: readonly T[], count: number): T[] {
  const length = Math.min(count, values.length);
  return Array.from({ length }, (_, i) => values[Math.floor((i * values.length) / length)]);
}
