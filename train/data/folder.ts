// A folder of pictures. A metadata.jsonl or metadata.csv (columns file_name and a caption, as Hugging Face's imagefolder)
// speaks for all pictures at its level and below; where there is none, each picture has its caption in a .txt (or
// caption_extension) beside it, one choice a line. A file named in several rows has several captions to choose from.
// Conditioning images, or rejected pictures, are named in their column of the metadata; where there is none, that of NAME.png lies
// beside it as NAME.conditioning_image.png, if the column is called so.
import { type Dirent, readdirSync, statSync } from 'node:fs';
import { join, normalize, relative, sep } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { asUserError, readBytesAside, readLines } from '../../io/files.ts';
import { besideOf, type Dataset, type DatasetOptions, type Example } from './dataset.ts';
import { type MetadataRow, readMetadata } from './metadata.ts';

const pictureName = /\.(png|jpe?g|webp)$/i;
const otherPictureName = /\.(gif|bmp|tiff?|avif|heic|jxl|svg)$/i;
const metadataName = /^metadata\.(jsonl|csv)$/;

/** Lists a folder's pictures and captions. @throws UserError when it cannot be read or its metadata is damaged */
export function openFolder(
  folder: string,
  options: Omit<DatasetOptions, 'path' | 'revision' | 'split'>,
): Dataset {
  const { caption_column, caption_extension, instance_prompt } = options;
  const { column, kind } = besideOf(options);
  const extension = captionEnding(caption_extension);
  const otherwise = instance_prompt ? [instance_prompt] : [];
  const captions = new Map<string, string[]>();
  const seconds = new Map<string, string>();
  const problems: string[] = [];
  visit(folder);
  const fileOf = (id: string) => ({ id, read: readerOf(folder, id) });
  const examples = [...captions].map(([id, choices]): Example => {
    const beside = seconds.get(id);
    return {
      ...fileOf(id),
      captions: choices,
      ...(beside !== undefined && { beside: { ...fileOf(beside), kind } }),
    };
  });
  return { examples, problems };

  function visit(path: string): void {
    const [metadata, other] = list(path).files.filter((name) => metadataName.test(name));
    if (other) problems.push(`${path} has ${metadata} and ${other}, of which one counts: leave one there`);
    if (metadata) fromMetadata(path, join(path, metadata));
    else fromSidecars(path);
  }

  function fromMetadata(path: string, file: string): void {
    const named = new Set<string>();
    const present = new Set(filesBelow(path));
    // Metadata comes from strangers too: a name that leads out of the folder is as good as absent.
    const plain = (name: string) => normalize(name).replaceAll('\\', '/');
    for (const row of readMetadata(file, caption_column, column, !instance_prompt)) {
      const name = plain(row.file_name);
      const beside = row.beside && plain(row.beside);
      for (const each of [name, beside]) if (each) named.add(each);
      const captions = row.captions.length ? row.captions : otherwise;
      const problem = problemOf({ ...row, captions }, (file) => present.has(plain(file)), column, kind);
      if (problem) problems.push(`${file}:${row.line}: ${problem}`);
      else add(join(path, name), captions, beside && join(path, beside));
    }
    for (const name of present) {
      if (!pictureName.test(name) || named.has(name)) continue;
      if (instance_prompt && !column) add(join(path, name), otherwise);
      else problems.push(`${join(path, name)} has no row in ${file}`);
    }
  }

  function fromSidecars(path: string): void {
    const { files, folders, linked } = list(path);
    const all = files.filter((name) => pictureName.test(name));
    const isBeside = (name: string) => column !== '' && stem(name).endsWith(`.${column}`);
    const pictures = all.filter((name) => !isBeside(name));
    const stems = new Set(pictures.map(stem));
    const texts = new Map(
      files
        .filter((name) => name.toLowerCase().endsWith(extension))
        .map((name) => [name.slice(0, -extension.length), name]),
    );
    const images = new Map(all.filter(isBeside).map((name) => [stem(stem(name)), name]));
    for (const name of files.filter((file) => otherPictureName.test(file))) {
      problems.push(`${join(path, name)} is neither PNG, JPEG nor WebP`);
    }
    for (const name of linked)
      problems.push(
        `${join(path, name)} is a link to a folder, and such are not followed: move the folder here`,
      );
    for (const name of pictures) {
      const [text, beside] = [texts.get(stem(name)), images.get(stem(name))];
      const own = text === undefined ? [] : captionLines(join(path, text));
      const choices = own.length > 0 ? own : otherwise;
      if (typeof choices === 'string') problems.push(choices);
      else if (choices.length === 0)
        problems.push(
          `${join(path, name)} has no caption${text === undefined ? otherwiseNamed(name, files) : ` in ${text}`}`,
        );
      else if (column && !beside)
        problems.push(`${join(path, name)} has no ${kind} ${stem(name)}.${column}.png beside it`);
      else add(join(path, name), choices, beside && join(path, beside));
    }
    for (const [key, name] of [...texts, ...images]) {
      const what = texts.get(key) === name ? 'caption' : kind;
      if (!stems.has(key)) problems.push(`${join(path, name)} is a ${what} without a picture`);
    }
    for (const name of folders) visit(join(path, name));
  }

  function add(path: string, choices: readonly string[], beside?: string): void {
    const idOf = (file: string) => relative(folder, file).replaceAll(sep, '/');
    const id = idOf(path);
    const image = beside && idOf(beside);
    const before = seconds.get(id);
    if (before !== undefined && before !== image)
      problems.push(`${path} has two ${kind}s, ${before} and ${image}: copy it to another name`);
    if (image) seconds.set(id, image);
    captions.set(id, [...(captions.get(id) ?? []), ...choices]);
  }
}

/** What the name of a picture's file of captions ends in, in small letters, with a dot. */
export const captionEnding = (caption_extension: string): string =>
  `.${caption_extension.toLowerCase().replace(/^\./, '')}`;

/** What may be said of a picture without captions: that there are some under an ending of other trainers. */
function otherwiseNamed(picture: string, files: readonly string[]): string {
  const other = files.find((file) => stem(file) === stem(picture) && /\.(caption|txt|tags)$/i.test(file));
  return other ? `, but there is ${other}: see dataset.caption_extension` : '';
}

const stem = (name: string) => name.replace(/\.[^.]*$/, '');

function problemOf(
  { file_name, captions, beside }: MetadataRow,
  present: (file: string) => boolean,
  column: string,
  kind: string,
): string | undefined {
  if (column && !beside) return `${file_name} has no ${kind} in "${column}"`;
  for (const file of [file_name, beside ?? file_name]) {
    if (!present(file)) return `${file} is not there`;
    if (!pictureName.test(file)) return `${file} is neither PNG, JPEG nor WebP`;
  }
  return captions.length === 0 ? `${file_name} has no caption` : undefined;
}

const readerOf = (folder: string, id: string) => () => readBytesAside(join(folder, id));

/** The lines that say something, or what is wrong with the file. */
function captionLines(path: string): string[] | string {
  try {
    return readLines(path);
  } catch (error) {
    if (error instanceof UserError) return error.message;
    throw error;
  }
}

/** The names in a folder, hidden ones left out, in an order of its own; links to files are files. */
function list(path: string): { files: string[]; folders: string[]; linked: string[] } {
  const kindOf = (entry: Dirent): 'files' | 'folders' | 'linked' => {
    if (entry.isDirectory()) return 'folders';
    return entry.isSymbolicLink() && leadsToFolder(join(path, entry.name)) ? 'linked' : 'files';
  };
  try {
    const names = { files: [] as string[], folders: [] as string[], linked: [] as string[] };
    for (const entry of readdirSync(path, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1)))
      if (!entry.name.startsWith('.') && entry.name !== '__MACOSX') names[kindOf(entry)].push(entry.name);
    return names;
  } catch (error) {
    throw asUserError(error, path);
  }
}

function leadsToFolder(link: string): boolean {
  try {
    return statSync(link).isDirectory();
  } catch {
    return false; // a broken link is told of when it is read
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
