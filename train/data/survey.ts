// The look at every picture before training starts: each is decoded once, so that a broken one is named now and not in the
// third hour, and its size and the hash of its bytes are noted. What cannot be used is fatal, or skipped and listed, as the
// run says. Few pictures are in memory at a time.
import { createHash } from 'node:crypto';
import { UserError } from '../../io/errors.ts';
import { decodePicture } from '../../io/image.ts';
import type { Size } from '../../models/text/conditioning.ts';
import { type Dataset, type Example, noCaption, type PictureBeside, type PictureFile } from './dataset.ts';
import { keyOf } from './draws.ts';

export interface Sample extends Example {
  /** Names the sample in the keys of random draws. */
  key: number;
  /** SHA-256 of the file's bytes. */
  hash: string;
  beside?: PictureBeside & { hash: string };
  /** Upright, as the picture is seen. */
  size: Size;
  /** Of the subject's class, not of what is to be learnt: for prior preservation. */
  prior?: boolean;
}

export interface SurveyOptions {
  /** What becomes of broken pictures, and of captions without a picture and the reverse. */
  broken: 'fatal' | 'skip';
  onProgress?: (done: number, total: number) => void;
}

const atOnce = 4;

/** Reads every example once. @throws UserError listing what is wrong, where that is fatal, or when nothing is left */
export async function survey(
  dataset: Dataset,
  { broken, onProgress }: SurveyOptions,
): Promise<{ samples: Sample[]; skipped: string[] }> {
  const found: (Sample | string)[] = [];
  let [next, done] = [0, 0];
  const worker = async (): Promise<void> => {
    for (let i = next++; i < dataset.examples.length; i = next++) {
      found[i] = await look(dataset.examples[i]);
      onProgress?.(++done, dataset.examples.length);
    }
  };
  await Promise.all(Array.from({ length: atOnce }, worker));
  const samples = found.filter((entry) => typeof entry !== 'string');
  const skipped = [...dataset.problems, ...found.filter((entry) => typeof entry === 'string')];
  if (skipped.length > 0 && (broken === 'fatal' || samples.length === 0)) {
    throw unusable(skipped, samples.length);
  }
  return { samples, skipped };
}

/** The example with what was found, or what is wrong with it. */
async function look(example: Example): Promise<Sample | string> {
  try {
    const { beside, ...picture } = example;
    const sample = { ...picture, key: keyOf(example.id), ...(await decoded(example)) };
    return beside ? { ...sample, beside: await lookBeside(beside, sample) } : sample;
  } catch (error) {
    if (error instanceof UserError) return error.message;
    throw error;
  }
}

async function decoded({ id, read }: PictureFile): Promise<{ hash: string; size: Size }> {
  const file = await read();
  const { height, width } = await decodePicture(file, id);
  return { hash: contentHash(file), size: [height, width] };
}

/**
 * What is beside a picture, with which it is resized and cropped. A rejected picture may be larger or smaller, as another model's is.
 * @throws UserError where it is of another size or shape
 */
async function lookBeside(image: PictureBeside, picture: Pick<Sample, 'id' | 'size'>) {
  const { hash, size } = await decoded(image);
  const told = ([height, width]: Size): string => `${width}x${height}`;
  const [[height, width], [ownHeight, ownWidth]] = [size, picture.size];
  const scales = image.kind === 'rejected picture';
  if (scales ? height * ownWidth !== width * ownHeight : size.join() !== picture.size.join())
    throw new UserError(
      `the ${image.kind} ${image.id} is ${told(size)} and its picture ${picture.id} ${told(picture.size)}: make it the picture's ${scales ? 'shape' : 'size'}`,
    );
  return { ...image, hash };
}

const contentHash = (file: Uint8Array): string => createHash('sha256').update(file).digest('hex');

/** A file's bytes, which are those that were looked at. @throws UserError where they are others by now */
export async function readUnchanged({ id, hash, read }: PictureFile & { hash: string }): Promise<Uint8Array> {
  const file = await read();
  if (contentHash(file) !== hash)
    throw new UserError(`${id} was changed since it was looked at: put it back, or start anew`);
  return file;
}

function unusable(problems: readonly string[], sound: number): UserError {
  const shown = problems.slice(0, 8).join('; ');
  const more = problems.length > 8 ? `; and ${problems.length - 8} more` : '';
  const caption = problems.some((problem) => problem.includes(noCaption))
    ? 'give those without a caption one by dataset.instance_prompt, '
    : '';
  const mend =
    sound > 0
      ? `mend or remove them, ${caption}or set dataset.broken to "skip"`
      : 'no picture is left to train on';
  const things = problems.length === 1 ? '1 thing' : `${problems.length} things`;
  return new UserError(`the dataset has ${things} that cannot be used (${shown}${more}): ${mend}`);
}
