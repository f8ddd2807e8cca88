// Which files of a folder or a repository make up a dataset: its parquet files if it has any, else pictures with their
// captions; of one split, where names tell splits apart as Hugging Face's datasets have them (train-00000-of-00002.parquet,
// train/0000.parquet).
import { escapePattern } from '../../models/text/tokenizer.ts';

export interface Chosen {
  kind: 'parquet' | 'pictures';
  names: string[];
}

const splits = ['train', 'test', 'validation', 'valid', 'val', 'dev', 'eval'];

/** Whether `word` stands in `text` by itself. */
const mentions = (text: string, word: string): boolean =>
  new RegExp(`(^|[-_./ ])${escapePattern(word)}([-_./ ]|$)`).test(text);

const mentionsSplit = (text: string, own: string): boolean =>
  [...splits, own].some((word) => mentions(text, word));

const isMetadata = (name: string): boolean => /(^|\/)metadata\.(jsonl|csv)$/.test(name);

const folderOf = (name: string): string => name.slice(0, name.lastIndexOf('/') + 1);

/**
 * The files of `split`; of all splits where no name mentions one. Captions beside pictures have names that end in `extension`. Metadata
 * above folders of splits speaks for all of them, so these are not told apart.
 */
export function chooseFiles(names: readonly string[], split: string, extension = '.txt'): Chosen {
  const parquet = names.filter((name) => name.endsWith('.parquet'));
  if (parquet.length > 0) return { kind: 'parquet', names: ofSplit(parquet, split, (name) => name) };
  const isCaption = (name: string) => name.toLowerCase().endsWith(extension);
  const parts = names.filter(
    (name) => /\.(png|jpe?g|webp)$/i.test(name) || isCaption(name) || isMetadata(name),
  );
  const spokenFor = parts
    .filter(isMetadata)
    .map(folderOf)
    .filter((folder) => !mentionsSplit(folder, split));
  // Of pictures only the folders count: there are pictures of trains and of tests.
  const told = (name: string) =>
    spokenFor.some((folder) => name.startsWith(folder)) ? split : folderOf(name);
  return { kind: 'pictures', names: ofSplit(parts, split, told) };
}

/** Whether pictures lie in a folder for each split, with one for `split`, and no metadata above them. */
export function hasFolderOf(names: readonly string[], split: string): boolean {
  const folders = new Set(names.filter((name) => name.includes('/')).map((name) => name.split('/')[0]));
  const others = splits.filter((word) => word !== split && folders.has(word));
  return folders.has(split) && others.length > 0 && !names.some(isAbove);
}

/** Whether it is metadata of the whole place. */
export const isAbove = (name: string): boolean => isMetadata(name) && !name.includes('/');

function ofSplit(names: readonly string[], split: string, told: (name: string) => string): string[] {
  const divided = names.some((name) => mentionsSplit(told(name), split));
  return names.filter((name) => !divided || mentions(told(name), split));
}
