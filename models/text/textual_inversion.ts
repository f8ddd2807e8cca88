// Textual inversions (Gal et al. 2022): vectors that a text encoder reads in place of a word's. A file for SDXL has them for both
// encoders, as clip_l [vectors, 768] and clip_g [vectors, 1280] (kohya, A1111, diffusers' advanced script); a folder of diffusers'
// textual_inversion_sdxl.py has a file for each. They go behind the encoders' tables, and the tokenizers find them by a name.
import { existsSync, statSync } from 'node:fs';
import { basename, join } from 'node:path';
import { decodeFloats } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { listFolder } from '../../io/files.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import type { TensorFile } from '../../io/tensor_file.ts';
import { allFinite } from '../checkpoint/weights.ts';
import { refusePickle } from '../checkpoint/weights_file.ts';
import type { TextStack } from './conditioning.ts';

/** What one encoder reads: `values` are [count, width]. */
interface Vectors {
  count: number;
  width: number;
  values: Float32Array;
}

export interface TextualInversion {
  /** What stands for it in prompts. */
  token: string;
  /** For text_encoder and text_encoder_2. */
  clip_l: Vectors;
  clip_g: Vectors;
}

/** What a file calls the vectors of text_encoder and text_encoder_2. */
export const parts = ['clip_l', 'clip_g'] as const;

/** The files that diffusers' script leaves for the two encoders, in a folder; each has one tensor, with the token's name. */
const learned = ['learned_embeds.safetensors', 'learned_embeds_2.safetensors'] as const;

/**
 * Reads a file or folder. Where no `token` is given it is the one that a folder's files name, or the file's name.
 * @throws UserError for what is no textual inversion for SDXL
 */
export function readTextualInversion(path: string, token?: string): TextualInversion {
  refusePickle(path, 'convert it to .safetensors with the keys clip_l and clip_g');
  const isFolder = existsSync(path) && statSync(path).isDirectory();
  const file = isFolder ? inversionIn(path) : path;
  const read = file === undefined ? readFolder(path) : readFile(file);
  const [{ clip_l, clip_g }, name] = [read, token ?? read.token];
  if (name.trim() === '') throw new UserError(`${path} needs a name in prompts; give one as FILE:TOKEN`);
  if (clip_l.count !== clip_g.count)
    throw new UserError(
      `${path} has ${clip_l.count} vectors for the first text encoder and ${clip_g.count} for the second; save it again`,
    );
  return { token: name, clip_l, clip_g };
}

/** The file of a finished run's folder, or of a checkpoint's; undefined for a folder that is neither. */
export function inversionIn(folder: string): string | undefined {
  const inner = join(folder, 'textual_inversion');
  const place = existsSync(inner) ? inner : folder;
  const [name, ...others] = listFolder(place).filter((each) => each.endsWith('.safetensors'));
  if (name === undefined || others.length > 0) return undefined;
  const path = join(place, name);
  return within(path, ({ tensors }) => parts.every((part) => tensors.has(part))) ? path : undefined;
}

function readFile(path: string): TextualInversion {
  return within(path, (file) => {
    const keys = [...file.tensors.keys()];
    if (!keys.includes('clip_l') || !keys.includes('clip_g')) {
      const more = keys.length > 8 ? ` and ${keys.length - 8} more` : '';
      throw new UserError(
        `${path} is no textual inversion for SDXL: it should have clip_l and clip_g, and has ${keys.slice(0, 8).join(', ')}${more}`,
      );
    }
    const token = basename(path).replace(/\.safetensors$/i, '');
    return { token, clip_l: vectorsOf(file, 'clip_l'), clip_g: vectorsOf(file, 'clip_g') };
  });
}

function readFolder(path: string): TextualInversion {
  const [first, second] = learned.map((name) => {
    const at = join(path, name);
    if (!existsSync(at))
      throw new UserError(
        `${path} has no ${name}; give a textual inversion's file, or a folder with ${learned.join(' and ')}`,
      );
    return within(at, (file) => {
      const [token, ...others] = file.tensors.keys();
      if (token === undefined || others.length > 0)
        throw new UserError(
          `${at} has ${file.tensors.size} tensors; it should have one, with the token's name`,
        );
      return { token, vectors: vectorsOf(file, token) };
    });
  });
  return { token: first.token, clip_l: first.vectors, clip_g: second.vectors };
}

function within<R>(path: string, use: (file: TensorFile) => R): R {
  const file = openSafetensors(path);
  try {
    return use(file);
  } finally {
    file.close();
  }
}

function vectorsOf(file: TensorFile, name: string): Vectors {
  const { shape = [], dtype } = file.tensors.get(name) ?? {};
  const [count, width] = shape.length === 1 ? [1, shape[0]] : shape;
  if (shape.length > 2 || !count || !width)
    throw new UserError(`${file.path}: ${name} is [${shape}]; a textual inversion is [vectors, width]`);
  const bytes = file.read(name);
  if (!allFinite(bytes, dtype))
    throw new UserError(
      `${file.path}: tensor ${name} holds NaN or infinity; the file is damaged, download it again`,
    );
  return { count, width, values: decodeFloats(bytes, dtype ?? 'float32') };
}

/**
 * Gives the text encoders of a loaded pipeline the textual inversion at `path`, and returns the token that prompts call it by, in capitals
 * too. One of several vectors is read as all of them; the later ones alone are `token_1`, `token_2` and so on, as in diffusers.
 * A lone encoder, the refiner's, takes clip_g.
 * @throws UserError before anything is changed, for widths of another model or a token that there is already
 */
export function loadTextualInversion({ text }: { text: TextStack }, path: string, token?: string): string {
  const read = readTextualInversion(path, token);
  const known = knownToken(text, read.token, read.clip_g.count);
  if (known !== undefined)
    throw new UserError(
      `${path}: the tokenizer has a token "${known}" already; call the embedding otherwise, as FILE:TOKEN`,
    );
  addToken(text, read.token, vectorsFor(text, path, read));
  return read.token;
}

/** The numbers for each encoder. @throws UserError where these are of another width */
export const vectorsFor = ({ encoders }: TextStack, path: string, read: TextualInversion): Float32Array[] =>
  encoders.map(({ encoder }, i) => {
    const part = parts.slice(-encoders.length)[i];
    const { width, values } = read[part];
    if (width !== encoder.hidden_size)
      throw new UserError(
        `${path}: ${part} is ${width} numbers wide, and the model's text encoder takes ${encoder.hidden_size}; use an embedding made for this model`,
      );
    return values;
  });

const namesOf = (token: string, count: number): string[] =>
  Array.from({ length: count }, (_, i) => (i ? `${token}_${i}` : token));

/** Of the names that a token of `count` vectors has, one that a tokenizer knows already. */
export const knownToken = ({ encoders }: TextStack, token: string, count: number): string | undefined =>
  namesOf(token, count).find((name) => encoders.some(({ tokenizer }) => tokenizer.has(name)));

/** Puts a token's vectors, [count, width] for each encoder, behind the tables. */
export function addToken({ encoders }: TextStack, token: string, vectors: readonly Float32Array[]): void {
  for (const [i, each] of encoders.entries()) {
    const first = each.encoder.addTokens(vectors[i]);
    each.tokenizer = each.tokenizer.withTokens(
      namesOf(token, vectors[i].length / each.encoder.hidden_size),
      first,
    );
  }
}
