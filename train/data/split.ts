// Which files of a folder or a repository make up a dataset: its parquet files if it has any, else pictures with their
// captions; of one split, where names tell splits apart as Hugging Face's datasets have them (train-00000-of-00002.parquet,
// train/0000.parquet).

export interface Chosen {
  kind: 'parquet' | 'pictures';
  names: string[];
}

const splits = ['train', 'test', 'validation', 'valid', 'val', 'dev', 'eval'];

/** Whether `word` stands in `text` by itself. */
const mentions = (text: string, word: string): boolean =>
  new RegExp(`(^|[-_./ ])${word}([-_./ ]|$)`).test(text);

const folderOf = (name: string): string => name.slice(0, name.lastIndexOf('/') + 1);

/** The files of `split`; of all splits where no name mentions one. */
export function chooseFiles(names: readonly string[], split: string): Chosen {
  const parquet = names.filter((name) => name.endsWith('.parquet'));
  if (parquet.length > 0) return { kind: 'parquet', names: ofSplit(parquet, split, (name) => name) };
  const isPart = (name: string) => /\.(png|jpe?g|webp|txt)$|(^|\/)metadata\.(jsonl|csv)$/i.test(name);
  // Of pictures only the folders count: there are pictures of trains and of tests.
  return { kind: 'pictures', names: ofSplit(names.filter(isPart), split, folderOf) };
}

/**
 * Whether pictures lie in a folder for each split, with one for `split`. Metadata above the folders speaks for all of them, so these
 * are not told apart.
 */
export function hasFolderOf(names: readonly string[], split: string): boolean {
  const folders = new Set(names.filter((name) => name.includes('/')).map((name) => name.split('/')[0]));
  const others = splits.filter((word) => word !== split && folders.has(word));
  const isAbove = (name: string) => /^metadata\.(jsonl|csv)$/.test(name);
  return folders.has(split) && others.length > 0 && !names.some(isAbove);
}

function ofSplit(names: readonly string[], split: string, told: (name: string) => string): string[] {
  const divided = names.some((name) => [...splits, split].some((word) => mentions(told(name), word)));
  return names.filter((name) => !divided || mentions(told(name), split));
}
