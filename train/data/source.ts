// Where captioned pictures come from: a folder, parquet files, or a dataset of the Hugging Face hub. A dataset is a list
// of examples that can be read one by one, so its pixels are never in memory together, and a list of what is wrong with
// it: whether that is fatal is the run's decision (survey.ts).
import { existsSync, statSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { listFolder } from '../../io/files.ts';
import {
  type HubProgress,
  looksLikeHubId,
  NothingWantedError,
  OutOfReachError,
  resolveHub,
} from '../../io/hub.ts';
import { besideOf, type Dataset, type DatasetOptions, mainRevision } from './dataset.ts';
import { captionEnding, filesBelow, openFolder } from './folder.ts';
import { openParquetDataset } from './parquet.ts';
import { chooseFiles, hasFolderOf, isAbove } from './split.ts';

/** Lists the examples of a dataset. @throws UserError when it is missing, has no example, or its metadata is damaged */
export async function openDataset(
  options: DatasetOptions,
  onProgress?: (progress: HubProgress) => void,
): Promise<Dataset> {
  const { path } = options;
  const place = looksLikeHubId(path) ? await download(options, onProgress) : path;
  if (!existsSync(place)) {
    throw new UserError(
      `no dataset at ${path}: give a folder of pictures, a .parquet file or a dataset id of the hub`,
    );
  }
  const dataset = await openPlace(place, options);
  if (dataset.examples.length === 0) throw emptyDataset(options, dataset.problems);
  dataset.examples.sort((a, b) => (a.id < b.id ? -1 : 1));
  return dataset;
}

async function openPlace(place: string, options: DatasetOptions): Promise<Dataset> {
  if (!statSync(place).isDirectory()) {
    if (place.endsWith('.parquet')) return openParquetDataset(dirname(place), [basename(place)], options);
    throw new UserError(
      `the dataset ${place} is a file: give the folder that holds its pictures, or a .parquet`,
    );
  }
  const all = filesBelow(place);
  const { kind, names } = chooseFiles(all, options.split, captionEnding(options.caption_extension));
  if (kind === 'pictures') {
    if (options.label_column)
      throw new UserError(
        `dataset.label_column is a column of parquet files, and ${options.path} is a folder of pictures: leave it out, and name the preferred picture first`,
      );
    return openFolder(hasFolderOf(all, options.split) ? join(place, options.split) : place, options);
  }
  if (names.length > 0) return openParquetDataset(place, names, options);
  throw new UserError(
    `${options.path} has no parquet file of the split "${options.split}": check dataset.split`,
  );
}

async function download(
  { path, revision, split, caption_extension }: DatasetOptions,
  onProgress?: (progress: HubProgress) => void,
): Promise<string> {
  const files = (all: readonly string[]) => chooseFiles(all, split, captionEnding(caption_extension)).names;
  const get = (at: string) => resolveHub(path, { repo_type: 'dataset', revision: at, files, onProgress });
  try {
    const folder = await get(revision).catch((error: unknown) => {
      // The hub itself keeps datasets of other formats as parquet files, on a branch of their own. Offline that may be all there is here.
      const elsewhere = error instanceof NothingWantedError || error instanceof OutOfReachError;
      if (!elsewhere || revision !== mainRevision) throw error;
      return get('refs/convert/parquet').catch(() => {
        throw error;
      });
    });
    // With pictures in a folder for each split, only that of this split has been asked for.
    const ofSplit = join(folder, split);
    return existsSync(ofSplit) && !listFolder(folder).some(isAbove) ? ofSplit : folder;
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    throw new UserError(`no folder ${path} is here, and ${error.message}`);
  }
}

function emptyDataset(options: DatasetOptions, problems: readonly string[]): UserError {
  const { path } = options;
  const { column, kind } = besideOf(options);
  const beside = column
    ? `; and for each picture its ${kind} in the column "${column}", or beside NAME.png as NAME.${column}.png`
    : '';
  const found = problems.length > 0 ? ` (${problems[0]})` : '';
  return new UserError(
    `the dataset ${path} has no picture with a caption${column && ` and a ${kind}`}${found}: ` +
      `put pictures there with a metadata.jsonl or metadata.csv (file_name, text), or a .txt beside each, or give them all one caption with dataset.instance_prompt${beside}`,
  );
}
