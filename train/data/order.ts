// The order of an epoch: every sample once (of those for prior preservation, some in turn), cut into updates. It is a pure
// function of seed, epoch and the samples' keys, and the update is cut before the batches are: batch 8 and batch 4 with two
// accumulation steps see the same samples in the same update. An update is of one bucket where the bucket can fill it; what
// is left over in all buckets is pooled, so no sample is dropped and only an epoch's last update can be short.
import { grouped, slices } from './batches.ts';
import { draws } from './draws.ts';

export interface MicroBatch {
  bucket: number;
  /** Indices into the samples; all of one bucket. */
  samples: number[];
}

/** One optimizer step. Its loss is the mean over all its samples: weigh each batch by its share of them. */
export type Update = MicroBatch[];

export interface Placed {
  /** `keyOf` the id. */
  key: number;
  bucket: number;
  /** For prior preservation: an epoch has as many of these as of the others, or all. */
  prior?: boolean;
}

/** An update of an epoch. */
export interface Turn {
  update: Update;
  epoch: number;
}

interface Sizes {
  seed: number;
  batch: number;
  accumulation: number;
}

/** All updates of all epochs, from the `first` of an epoch on; whether it is its epoch's last is told beside each. */
export function* turnsFrom(
  samples: readonly Placed[],
  sizes: Sizes,
  from: { epoch: number; update: number },
): Generator<Turn & { endsEpoch: boolean }, never> {
  for (let { epoch, update: first } = from; ; epoch++, first = 0) {
    const updates = planEpoch(samples, { ...sizes, epoch });
    for (let i = first; i < updates.length; i++)
      yield { update: updates[i], epoch, endsEpoch: i + 1 === updates.length };
  }
}

/** The updates of an epoch. `batch` samples at most go through the model at once, `batch * accumulation` into an update. */
export function planEpoch(
  samples: readonly Placed[],
  { seed, epoch, batch, accumulation }: Sizes & { epoch: number },
): Update[] {
  const size = batch * accumulation;
  const places = samples.map(({ key }) => {
    const random = draws(seed, epoch, key, 'order');
    return { sample: random.uniform(), update: random.uniform() };
  });
  const order = membersOf(samples, seed, epoch).sort((a, b) => places[a].sample - places[b].sample);
  const full: number[][] = [];
  const waiting = new Map<number, number[]>();
  for (const i of order) {
    const queue = waiting.get(samples[i].bucket) ?? [];
    queue.push(i);
    waiting.set(samples[i].bucket, queue);
    if (queue.length === size) {
      full.push(queue);
      waiting.delete(samples[i].bucket);
    }
  }
  const left = [...waiting.entries()].sort(([a], [b]) => a - b).flatMap(([, queue]) => queue);
  while (left.length >= size) full.push(left.splice(0, size));
  // A bucket's updates fill up late where it is rare; shuffled anew, rare sizes are not kept for the end.
  full.sort((a, b) => places[a[0]].update - places[b[0]].update);
  if (left.length > 0) full.push(left);
  const bucketOf = samples.map(({ bucket }) => bucket);
  return full.map((update) => passesOf(update, bucketOf, batch));
}

/** How many of the samples an epoch has: all, but no more for prior preservation than others. */
export function samplesPerEpoch(samples: readonly Pick<Placed, 'prior'>[]): number {
  const prior = samples.filter((each) => each.prior).length;
  return samples.length - prior + Math.min(prior, samples.length - prior);
}

/** The samples of an epoch: of those for prior preservation the next ones, in an order that the seed draws once. */
function membersOf(samples: readonly Placed[], seed: number, epoch: number): number[] {
  const all = samples.map((_, i) => i);
  const own = all.filter((i) => !samples[i].prior);
  const prior = all
    .filter((i) => samples[i].prior)
    .map((i) => ({ i, place: draws(seed, 0, samples[i].key, 'class').uniform() }))
    .sort((a, b) => a.place - b.place)
    .map(({ i }) => i);
  const count = Math.min(prior.length, own.length);
  return [...own, ...Array.from({ length: count }, (_, i) => prior[(epoch * count + i) % prior.length])];
}

/** Samples by bucket and then by batch, in the order they come. */
export const passesOf = (
  samples: readonly number[],
  bucketOf: readonly number[],
  batch: number,
): MicroBatch[] =>
  [...grouped(samples, (i) => bucketOf[i])].flatMap(([bucket, members]) =>
    slices(members, batch).map((samples) => ({ bucket, samples })),
  );

/** How many optimizer steps an epoch has. */
export const updatesPerEpoch = (samples: number, batch: number, accumulation: number): number =>
  Math.ceil(samples / (batch * accumulation));

/** The most passes that an update can have: of pictures of each size there may be one, and beside them batches that are full. */
export function passesPerUpdate(
  samples: number,
  sizes: number,
  { batch, accumulation }: Pick<Sizes, 'batch' | 'accumulation'>,
): number {
  const all = Math.min(batch * accumulation, samples);
  const alone = Math.min(sizes, all);
  return alone + Math.floor((all - alone) / batch);
}
