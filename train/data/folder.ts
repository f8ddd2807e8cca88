// A folder of pictures. A metadata.jsonl or metadata.csv (columns file_name and a caption, as Hugging Face's imagefolder)
// speaks for all pictures at its level and below; where there is none, each picture has its caption in a .txt (or
// caption_extension) beside it, one choice a line. A file named in several rows has several captions to choose from.
// Conditioning images, or rejected pictures, are named in their column of the metadata; where there is none, that of NAME.png lies
// beside it as NAME.conditioning_image.png, if the column is called so.
import { type Dirent, readdirSync, statSync } from 'node:fs';
import { join, normalize, relative, sep } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { asUserError, readBytesAside, readLines } from '../../io/files.ts';
import { besideOf, type Dataset, type DatasetOptions, type Example, noCaption } from './dataset.ts';
import { type MetadataRow, readMetadata } from './metadata.ts';

const pictureName = /\.(png|jpe?g|webp)$/i;
const otherPictureName = /\.(gif|bmp|tiff?|avif|heic|jxl|svg)$/i;
const metadataName = /^metadata\.(jsonl|csv)$/;

type FolderOptions = Omit<DatasetOptions, 'path' | 'revision' | 'split'>;

/** What is looked for. */
interface Wanted extends ReturnType<typeof besideOf> {
  captionColumn: string;
  /** What files of captions end in. */
  extension: string;
  /** The captions of pictures that have none of their own. */
  otherwise: readonly string[];
}

/** A picture that is named once more, and what is beside it, by their paths. */
interface Named {
  path: string;
  captions: readonly string[];
  beside?: string;
}

/** What is named in a folder, and, as sentences, what is wrong there. */
type Findings = Generator<Named | string>;

/** Lists a folder's pictures and captions. @throws UserError when it cannot be read or its metadata is damaged */
export function openFolder(folder: string, options: FolderOptions): Dataset {
  const { caption_column: captionColumn, caption_extension, instance_prompt } = options;
  const otherwise = instance_prompt ? [instance_prompt] : [];
  const extension = captionEnding(caption_extension);
  const wanted = { captionColumn, extension, otherwise, ...besideOf(options) };
  return joined(folder, visit(folder, wanted), wanted);
}

/** Joins what is said of a picture in several places. */
function joined(folder: string, findings: Findings, { kind }: Wanted): Dataset {
  const idOf = (path: string) => relative(folder, path).replaceAll(sep, '/');
  const fileOf = (id: string) => ({ id, read: () => readBytesAside(join(folder, id)) });
  const captions = new Map<string, string[]>();
  const images = new Map<string, string>();
  const problems: string[] = [];
  for (const found of findings) {
    if (typeof found === 'string') {
      problems.push(found);
      continue;
    }
    const id = idOf(found.path);
    const image = found.beside && idOf(found.beside);
    const before = images.get(id);
    if (before !== undefined && before !== image)
      problems.push(`${found.path} has two ${kind}s, ${before} and ${image}: copy it to another name`);
    if (image) images.set(id, image);
    captions.set(id, [...(captions.get(id) ?? []), ...found.captions]);
  }
  const examples = [...captions].map(([id, choices]): Example => {
    const image = images.get(id);
    const beside = image === undefined ? {} : { beside: { ...fileOf(image), kind } };
    return { ...fileOf(id), captions: choices, ...beside };
  });
  return { examples, problems };
}

function* visit(path: string, wanted: Wanted): Findings {
  const [metadata, other] = list(path).files.filter((name) => metadataName.test(name));
  if (other) yield `${path} has ${metadata} and ${other}, of which one counts: leave one there`;
  if (metadata) yield* fromMetadata(path, join(path, metadata), wanted);
  else yield* fromSidecars(path, wanted);
}

function* fromMetadata(path: string, file: string, wanted: Wanted): Findings {
  const { captionColumn, column, kind, otherwise } = wanted;
  const named = new Set<string>();
  const present = new Set(filesBelow(path));
  // Metadata comes from strangers too: a name that leads out of the folder is as good as absent.
  const plain = (name: string) => normalize(name).replaceAll('\\', '/');
  for (const row of readMetadata(file, captionColumn, column, otherwise.length === 0)) {
    const name = plain(row.file_name);
    const beside = row.beside && plain(row.beside);
    for (const each of [name, beside]) if (each) named.add(each);
    const captions = row.captions.length ? row.captions : [...otherwise];
    const problem = problemOf({ ...row, captions }, (each) => present.has(plain(each)), column, kind);
    if (problem) yield `${file}:${row.line}: ${problem}`;
    else yield { path: join(path, name), captions, beside: beside && join(path, beside) };
  }
  for (const name of present) {
    if (!pictureName.test(name) || named.has(name)) continue;
    if (otherwise.length > 0 && !column) yield { path: join(path, name), captions: otherwise };
    else yield `${join(path, name)} has no row in ${file}`;
  }
}

function* fromSidecars(path: string, wanted: Wanted): Findings {
  const { files, folders, linked } = list(path);
  const { pictures, texts, images } = sorted(files, wanted);
  for (const name of files.filter((file) => otherPictureName.test(file)))
    yield `${join(path, name)} is neither PNG, JPEG nor WebP`;
  for (const name of linked)
    yield `${join(path, name)} is a link to a folder, and such are not followed: move the folder here`;
  for (const name of pictures) {
    const own = { text: texts.get(stem(name)), beside: images.get(stem(name)), files };
    yield captioned(path, name, own, wanted);
  }
  const stems = new Set(pictures.map(stem));
  for (const [key, name] of [...texts, ...images]) {
    const what = texts.get(key) === name ? 'caption' : wanted.kind;
    if (!stems.has(key)) yield `${join(path, name)} is a ${what} without a picture`;
  }
  for (const name of folders) yield* visit(join(path, name), wanted);
}

/** A folder's pictures; what lies beside them by its picture's name without the ending: files of captions, and images. */
function sorted(files: readonly string[], { extension, column }: Wanted) {
  const ending = `.${column}`;
  const all = files.filter((name) => pictureName.test(name));
  const isBeside = (name: string) => column !== '' && stem(name).endsWith(ending);
  const texts = files.filter((name) => name.toLowerCase().endsWith(extension));
  return {
    pictures: all.filter((name) => !isBeside(name)),
    texts: new Map(texts.map((name) => [name.slice(0, -extension.length), name])),
    images: new Map(all.filter(isBeside).map((name) => [stem(name).slice(0, -ending.length), name])),
  };
}

/** The picture of that name with what lies beside it, or what it lacks. */
function captioned(
  path: string,
  name: string,
  { text, beside, files }: { text?: string; beside?: string; files: readonly string[] },
  { otherwise, column, kind }: Wanted,
): Named | string {
  const own = text === undefined ? [] : captionLines(join(path, text));
  if (typeof own === 'string') return own;
  const captions = own.length > 0 ? own : otherwise;
  if (captions.length === 0)
    return `${join(path, name)} ${noCaption}${text === undefined ? otherEnding(name, files) : ` in ${text}`}`;
  if (column && !beside) return `${join(path, name)} has no ${kind} ${stem(name)}.${column}.png beside it`;
  return { path: join(path, name), captions, beside: beside && join(path, beside) };
}

/** What the name of a picture's file of captions ends in, in small letters, with a dot. */
export const captionEnding = (caption_extension: string): string =>
  `.${caption_extension.toLowerCase().replace(/^\./, '')}`;

/** What may be said of a picture without captions: that there are some under an ending of other trainers. */
function otherEnding(picture: string, files: readonly string[]): string {
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
  return captions.length === 0 ? `${file_name} ${noCaption}` : undefined;
}

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
