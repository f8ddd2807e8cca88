// Where captioned pictures come from: a folder, parquet files, or a dataset of the Hugging Face hub. A dataset is a list
// of examples that can be read one by one, so its pixels are never in memory together, and a list of what is wrong with
// it: whether that is fatal is the run's decision (survey.ts).
import { createHash } from 'node:crypto';
import { existsSync, statSync } from 'node:fs';
import { UserError } from '../../io/errors.ts';
import { openFolder } from './folder.ts';

export interface Example {
  /** The picture's path within the dataset, or its row; names it in messages. */
  id: string;
  /** The choices for its caption, at least one. */
  captions: string[];
  /** The bytes of its PNG, JPEG or WebP file. @throws UserError */
  read(): Promise<Uint8Array>;
}

export interface Dataset {
  /** Sorted by id, so that the order does not depend on the disk. */
  examples: Example[];
  /** Captions without a picture and the reverse, one sentence each. */
  problems: string[];
}

export interface DatasetOptions {
  /** A folder, a .parquet file, a folder of .parquet files, or owner/name on the Hugging Face hub. */
  path: string;
  /** Hub: a branch, tag or commit. */
  revision: string;
  /** Hub: which part of the dataset. */
  split: string;
  image_column: string;
  caption_column: string;
}

export const datasetDefaults: Omit<DatasetOptions, 'path'> = {
  revision: 'main',
  split: 'train',
  image_column: 'image',
  caption_column: 'text',
};

/** Lists the examples of a dataset. @throws UserError when it is missing, has no example, or its metadata is damaged */
export async function openDataset(given: Partial<DatasetOptions> & { path: string }): Promise<Dataset> {
  const options = { ...datasetDefaults, ...given };
  const { path } = options;
  if (!existsSync(path)) {
    throw new UserError(
      `no dataset at ${path}: give a folder of pictures, a .parquet file or a dataset id of the hub`,
    );
  }
  if (!statSync(path).isDirectory())
    throw new UserError(`the dataset ${path} is a file: give the folder that holds its pictures`);
  const dataset = openFolder(path, options.caption_column);
  if (dataset.examples.length === 0) throw emptyDataset(path, dataset.problems);
  dataset.examples.sort((a, b) => (a.id < b.id ? -1 : 1));
  return dataset;
}

function emptyDataset(path: string, problems: readonly string[]): UserError {
  const found = problems.length > 0 ? ` (${problems[0]})` : '';
  return new UserError(
    `the dataset ${path} has no picture with a caption${found}: ` +
      'put pictures there with a metadata.jsonl or metadata.csv (file_name, text), or a .txt beside each',
  );
}

/**
 * The number under which an example's random draws are made. It hangs on the id alone, so another picture added or taken
 * away changes no draw of this one.
 */
export const keyOf = (id: string): number => createHash('sha256').update(id).digest().readUInt32LE(0);
