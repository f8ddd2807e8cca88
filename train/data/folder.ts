// A folder of pictures. A metadata.jsonl or metadata.csv (columns file_name and a caption, as Hugging Face's imagefolder)
// speaks for all pictures at its level and below; where there is none, each picture has its caption in a .txt beside it,
// one choice a line. A file named in several rows has several captions to choose from.
import { readdirSync, readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join, normalize, relative } from 'node:path';
import { asUserError } from '../../io/files.ts';
import type { Dataset } from './dataset.ts';
import { type MetadataRow, readMetadata } from './metadata.ts';

const pictureName = /\.(png|jpe?g|webp)$/i;
const otherPictureName = /\.(gif|bmp|tiff?|avif|heic|jxl|svg)$/i;
const metadataName = /^metadata\.(jsonl|csv)$/;

/** Lists a folder's pictures and captions. @throws UserError when it cannot be read or its metadata is damaged */
export function openFolder(folder: string, captionColumn: string): Dataset {
  const captions = new Map<string, string[]>();
  const problems: string[] = [];
  visit(folder);
  const examples = [...captions].map(([id, choices]) => ({
    id,
    captions: choices,
    read: readerOf(folder, id),
  }));
  return { examples, problems };

  function visit(path: string): void {
    const metadata = list(path).files.find((name) => metadataName.test(name));
    if (metadata) fromMetadata(path, join(path, metadata));
    else fromSidecars(path);
  }

  function fromMetadata(path: string, file: string): void {
    const named = new Set<string>();
    const present = new Set(filesBelow(path));
    for (const row of readMetadata(file, captionColumn)) {
      // Metadata comes from strangers too: a name that leads out of the folder is as good as absent.
      const name = normalize(row.file_name).replaceAll('\\', '/');
      named.add(name);
      const problem = problemOf(row, present.has(name));
      if (problem) problems.push(`${file}:${row.line}: ${problem}`);
      else add(join(path, name), row.captions);
    }
    for (const name of present) {
      if (pictureName.test(name) && !named.has(name))
        problems.push(`${join(path, name)} has no row in ${file}`);
    }
  }

  function fromSidecars(path: string): void {
    const { files, folders } = list(path);
    const stem = (name: string) => name.replace(/\.[^.]*$/, '');
    const pictures = files.filter((name) => pictureName.test(name));
    const stems = new Set(pictures.map(stem));
    const texts = new Map(files.filter((name) => /\.txt$/i.test(name)).map((name) => [stem(name), name]));
    for (const name of files.filter((file) => otherPictureName.test(file))) {
      problems.push(`${join(path, name)} is neither PNG, JPEG nor WebP`);
    }
    for (const name of pictures) {
      const text = texts.get(stem(name));
      const choices = text === undefined ? [] : captionLines(join(path, text));
      if (choices.length > 0) add(join(path, name), choices);
      else problems.push(`${join(path, name)} has no caption${text === undefined ? '' : ` in ${text}`}`);
    }
    for (const [key, name] of texts) {
      if (!stems.has(key)) problems.push(`${join(path, name)} is a caption without a picture`);
    }
    for (const name of folders) visit(join(path, name));
  }

  function add(path: string, choices: readonly string[]): void {
    const id = relative(folder, path).replaceAll('\\', '/');
    captions.set(id, [...(captions.get(id) ?? []), ...choices]);
  }
}

function problemOf({ file_name, captions }: MetadataRow, present: boolean): string | undefined {
  if (!present) return `${file_name} is not there`;
  if (!pictureName.test(file_name)) return `${file_name} is neither PNG, JPEG nor WebP`;
  return captions.length === 0 ? `${file_name} has no caption` : undefined;
}

const readerOf = (folder: string, id: string) => async (): Promise<Uint8Array> => {
  const path = join(folder, id);
  return readFile(path).catch((error: unknown) => {
    throw asUserError(error, path);
  });
};

function captionLines(path: string): string[] {
  try {
    return readFileSync(path, 'utf8')
      .replace(/^\uFEFF/, '')
      .split('\n')
      .map((line) => line.trim())
      .filter((line) => line !== '');
  } catch (error) {
    throw asUserError(error, path);
  }
}

/** The names in a folder, links followed, hidden ones left out, in an order of its own. */
function list(path: string): { files: string[]; folders: string[] } {
  try {
    const entries = readdirSync(path, { withFileTypes: true })
      .filter((entry) => !entry.name.startsWith('.') && entry.name !== '__MACOSX')
      .sort((a, b) => (a.name < b.name ? -1 : 1));
    const folders = entries.filter((entry) => entry.isDirectory()).map((entry) => entry.name);
    return { files: entries.filter((entry) => !entry.isDirectory()).map((entry) => entry.name), folders };
  } catch (error) {
    throw asUserError(error, path);
  }
}

/** All files of a folder and its folders, by their paths from there. */
export function filesBelow(path: string, prefix = ''): string[] {
  const { files, folders } = list(path);
  return [
    ...files.map((name) => prefix + name),
    ...folders.flatMap((name) => filesBelow(join(path, name), `${prefix}${name}/`)),
  ];
}
