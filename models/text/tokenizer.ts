// CLIP's byte-level BPE tokenizer (Radford et al. 2021) as transformers runs it: normalise (NFC, spaces,
// lower case), cut out special tokens, split into words, merge byte pairs by rank, and lay out BOS, text,
// EOS, padding. The padding token is a special token like the others: in SDXL's second tokenizer it is "!",
// so every "!" in a prompt is id 0 there, as in diffusers.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { readText } from '../../io/files.ts';
import { readJsonObject } from '../../io/json.ts';
import { BytePairEncoder, bytesOfToken, characterOfByte } from './byte_pairs.ts';

/** The ids of a prompt, in pieces that stand between a BOS and an EOS each. */
export type Chunks = readonly (readonly number[])[];

export interface Tokenizer {
  readonly modelMaxLength: number;
  /** The ids of a text alone: no BOS, EOS or padding, and no bound. */
  tokenize(text: string): number[];
  /** A prompt's ids in as many chunks as they fill, at least one. */
  chunksOf(prompt: string): number[][];
  /**
   * `ids` has `modelMaxLength` entries: BOS, text, EOS, padding; or that many for each of `count` chunks, which take the text on.
   * `truncated` is the end of the prompt that did not fit, as diffusers' warning shows it, and '' when all of it did.
   */
  encode(prompt: string | Chunks, count?: number): { ids: Int32Array; truncated: string };
  /** How many ids stand for one token from this one on: more than 1 where withTokens() has said so. */
  span(id: number): number;
  /** Whether the vocabulary has a token of this name. */
  has(name: string): boolean;
  /**
   * This tokenizer with tokens that have the ids from `first` on and are found wherever their names stand, in capitals too. The
   * first name is read as all of them, as diffusers' maybe_convert_prompt spells a textual inversion of several vectors.
   */
  withTokens(names: readonly string[], first: number): Tokenizer;
}

/** What tokenizer_config.json says; other keys are passed over. */
export interface TokenizerConfig {
  model_max_length?: number;
  bos_token?: TokenSetting;
  eos_token?: TokenSetting;
  pad_token?: TokenSetting;
  unk_token?: TokenSetting;
  added_tokens_decoder?: Record<string, AddedToken>;
}
type TokenSetting = string | AddedToken;

interface AddedToken {
  content: string;
  /** Whether it is looked for in the normalised text (so also in capitals) or in the prompt as written. */
  normalized?: boolean;
}

const clipLength = 77;

/**
 * The tokenizer in `folder`: vocab.json and merges.txt, or tokenizer.json, which is all that transformers 5 saves; and
 * tokenizer_config.json or special_tokens_map.json if there.
 * @throws UserError when a file is missing, unreadable or inconsistent
 */
export function loadTokenizer(folder: string): Tokenizer {
  const at = (name: string) => join(folder, name);
  const optional = (name: string) => (existsSync(at(name)) ? readJsonObject(at(name)) : {});
  const config = { ...optional('special_tokens_map.json'), ...optional('tokenizer_config.json') };
  if (existsSync(at('tokenizer.json')) && !existsSync(at('vocab.json')))
    return loadTokenizerJson(readLately(at('tokenizer.json')), config, at('tokenizer.json'));
  const present = (name: string): string => {
    if (existsSync(at(name))) return at(name);
    throw new UserError(`${folder} has no ${name}; the model is incomplete, download it again`);
  };
  const vocab = readLately(present('vocab.json')) as Record<string, number>;
  const merges = readText(present('merges.txt'));
  // Where there are none to merge there is a version line yet; without any the words would be read letter by letter.
  if (merges.trim() === '') throw new UserError(`${at('merges.txt')} is empty: download it again`);
  return loadTokenizerFiles(vocab, merges, config, folder);
}

const lately = new Map<string, Record<string, unknown>>();

/**
 * JSON, which is one object where it is one text: SDXL's two tokenizers have one vocabulary, and a run opens its model several times. The
 * two that came last are kept.
 */
function readLately(path: string): Record<string, unknown> {
  const text = readText(path);
  const known = lately.get(text) ?? readJsonObject(path);
  lately.delete(text);
  lately.set(text, known);
  const [oldest] = lately.keys();
  if (lately.size > 2) lately.delete(oldest);
  return known;
}

/** The part of tokenizer.json that is not the same for all of CLIP's tokenizers. */
interface TokenizerJson {
  model?: { vocab?: Record<string, number>; merges?: (string | [string, string])[] };
  added_tokens?: AddedToken[];
}

function loadTokenizerJson(
  { model, added_tokens }: TokenizerJson,
  config: TokenizerConfig,
  where: string,
): Tokenizer {
  const { vocab, merges } = model ?? {};
  const isPair = (pair: unknown) => typeof pair === 'string' || Array.isArray(pair);
  if (!vocab || !Array.isArray(merges) || !merges.every(isPair))
    throw new UserError(`${where} holds no byte-pair encoding: take the tokenizer of an SDXL model`);
  const lines = merges.map((pair) => (typeof pair === 'string' ? pair : pair.join(' ')));
  const added_tokens_decoder = Object.fromEntries(Object.entries(added_tokens ?? {}));
  return loadTokenizerFiles(vocab, lines.join('\n'), { ...config, added_tokens_decoder }, where);
}

/**
 * As `loadTokenizer`, from the files' contents. `where` names them in errors.
 * @throws UserError when the vocabulary, merges and config do not fit together
 */
export function loadTokenizerFiles(
  vocab: Record<string, number>,
  merges: string,
  config: TokenizerConfig = {},
  where = 'the tokenizer',
): Tokenizer {
  checkTokens(config, where);
  const special = (setting: TokenSetting | undefined, standard: string): number => {
    const content = contentOf(setting ?? standard);
    const id = Object.hasOwn(vocab, content) ? vocab[content] : undefined;
    if (!Number.isInteger(id)) {
      throw new UserError(`${where} has no token "${content}" in vocab.json: download the tokenizer again`);
    }
    return id as number;
  };
  const eos = special(config.eos_token, '<|endoftext|>');
  const layout = {
    bos: special(config.bos_token, '<|startoftext|>'),
    eos,
    pad: special(config.pad_token, '<|endoftext|>'),
    length: lengthOf(config, where),
  };
  const { encoder, strings } = prepared(vocab, merges, special(config.unk_token, '<|endoftext|>'), where);
  const tokens = specialTokens(config).map((token) => ({ ...token, ids: [special(token.content, '')] }));
  return clipTokenizer(encoder, tokens, layout, strings);
}

interface Prepared {
  merges: string;
  unknown: number;
  encoder: BytePairEncoder;
  strings: readonly string[];
}

const preparedOf = new WeakMap<object, Prepared>();

/** What takes the time of opening a tokenizer, done once for a vocabulary. */
function prepared(vocab: Record<string, number>, merges: string, unknown: number, where: string): Prepared {
  const known = preparedOf.get(vocab);
  if (known?.merges === merges && known.unknown === unknown) return known;
  const encoder = new BytePairEncoder(vocab, merges, unknown, where);
  const made = { merges, unknown, encoder, strings: tokenStrings(vocab) };
  preparedOf.set(vocab, made);
  return made;
}

/** @throws UserError for a token's setting that is neither its text nor an object with that */
function checkTokens(config: TokenizerConfig, where: string): void {
  const { bos_token, eos_token, pad_token, unk_token, added_tokens_decoder } = config;
  const added = Object.entries(added_tokens_decoder ?? {});
  const named = Object.entries({ bos_token, eos_token, pad_token, unk_token });
  for (const [key, setting] of [...named, ...added]) {
    // As where it is left out.
    if ((setting ?? null) === null && key.endsWith('_token')) continue;
    if (typeof setting === 'string' || typeof setting?.content === 'string') continue;
    throw new UserError(
      `${where} has the token ${JSON.stringify(setting)} as "${key}" in its config, not a text: download the tokenizer again`,
    );
  }
}

// Published configs without a limit hold 10^30 instead.
function lengthOf({ model_max_length: length = clipLength }: TokenizerConfig, where: string): number {
  if (typeof length === 'number' && length > 1e20) return clipLength;
  // BOS and EOS take two, and something of a prompt must fit between them.
  if (Number.isInteger(length) && length >= 3) return length;
  throw new UserError(
    `${where} has model_max_length ${JSON.stringify(length)}: correct it in tokenizer_config.json to ${clipLength}`,
  );
}

interface Layout {
  bos: number;
  eos: number;
  pad: number;
  length: number;
}

type SpecialToken = Required<AddedToken> & { ids: readonly number[] };

function clipTokenizer(
  encoder: BytePairEncoder,
  tokens: readonly SpecialToken[],
  layout: Layout,
  strings: readonly string[],
): Tokenizer {
  const { bos, eos, pad, length } = layout;
  const inside = length - 2; // BOS and EOS stand around each chunk
  const tokenize = tokenizing(encoder, tokens);
  const spans = new Map(tokens.map(({ ids }) => [ids[0], ids.length]));
  const chunksOf = (prompt: string): number[][] => {
    const ids = tokenize(prompt);
    const count = Math.max(1, Math.ceil(ids.length / inside));
    return Array.from({ length: count }, (_, i) => ids.slice(i * inside, (i + 1) * inside));
  };
  return {
    modelMaxLength: length,
    tokenize,
    chunksOf,
    encode(prompt, count = 1) {
      const chunks = typeof prompt === 'string' ? chunksOf(prompt) : prompt;
      const ids = new Int32Array(count * length).fill(pad);
      for (let i = 0; i < count; i++) ids.set([bos, ...(chunks[i] ?? []), eos], i * length);
      return { ids, truncated: decode(chunks.slice(count).flat(), strings) };
    },
    span: (id) => spans.get(id) ?? 1,
    has: (name) => strings.includes(name) || tokens.some(({ content }) => content === normalise(name)),
    withTokens(names, first) {
      const ids = names.map((_, i) => first + i);
      const added = names.map((name, i) => ({
        content: normalise(name),
        normalized: true,
        ids: i === 0 ? ids : [ids[i]],
      }));
      const longer = [...strings];
      for (const [i, name] of names.entries()) longer[ids[i]] = `${charactersOf(name)}</w>`;
      return clipTokenizer(encoder, [...tokens, ...added], layout, longer);
    },
  };
}

/** A text's ids: of special tokens as it is written, of those in what is normalised, and of the words between. */
function tokenizing(encoder: BytePairEncoder, tokens: readonly SpecialToken[]): (prompt: string) => number[] {
  const asWritten = specialMatcher(tokens.filter((token) => !token.normalized));
  const normalised = specialMatcher(tokens.filter((token) => token.normalized));
  return (prompt) => {
    const ids: number[] = [];
    for (const piece of asWritten(prompt)) {
      if (typeof piece !== 'string') ids.push(...piece);
      else {
        for (const part of normalised(normalise(piece))) {
          if (typeof part !== 'string') ids.push(...part);
          else for (const [word] of part.matchAll(wordPattern)) encoder.encode(word, ids);
        }
      }
    }
    return ids;
  };
}

/**
 * CLIP's word pattern. It runs on lower-cased text; whitespace is Unicode's, which JavaScript's \s is not
 * quite.
 */
const wordPattern = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;

/** A prompt's words as byte-pair encoding sees them. */
export const wordsOf = (prompt: string): string[] =>
  Array.from(normalise(prompt).matchAll(wordPattern), ([word]) => word);

// Lower case goes code point by code point: String.toLowerCase on a whole word would give the final form of
// sigma.
function normalise(text: string): string {
  const spaced = text.normalize('NFC').replace(/\p{White_Space}+/gu, ' ');
  return spaced.replace(/\P{ASCII}|[A-Z]/gu, (character) => character.toLowerCase());
}

/** Splits a text at the special tokens, which come out as ids. */
function specialMatcher(tokens: readonly SpecialToken[]): (text: string) => (string | readonly number[])[] {
  if (tokens.length === 0) return (text) => [text];
  const found = new Map(tokens.map(({ content, ids }) => [content, ids]));
  const contents = [...found.keys()].sort((a, b) => b.length - a.length);
  const pattern = new RegExp(`(${contents.map(escapePattern).join('|')})`, 'u');
  return (text) =>
    text.split(pattern).map((piece, i) => (i % 2 ? (found.get(piece) as readonly number[]) : piece));
}

/** A text as a pattern that it alone matches. */
export const escapePattern = (text: string): string => text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');

const contentOf = (setting: TokenSetting): string =>
  typeof setting === 'string' ? setting : setting.content;

// added_tokens_decoder is the last word; without it (as in older files), BOS, EOS and UNK are matched in the
// normalised text unless they say otherwise, and a padding token given as a bare string as it is written.
function specialTokens(config: TokenizerConfig): Required<AddedToken>[] {
  const found = new Map<string, boolean>();
  const add = (setting: TokenSetting, normalized: boolean) => {
    const content = contentOf(setting);
    const said = typeof setting === 'string' ? undefined : setting.normalized;
    if (content !== '' && !found.has(content)) found.set(content, said ?? normalized);
  };
  for (const token of Object.values(config.added_tokens_decoder ?? {})) add(token, false);
  add(config.bos_token ?? '<|startoftext|>', true);
  add(config.eos_token ?? '<|endoftext|>', true);
  add(config.unk_token ?? '<|endoftext|>', true);
  if (config.pad_token) add(config.pad_token, false);
  return Array.from(found, ([content, normalized]) => ({ content, normalized }));
}

function tokenStrings(vocab: Record<string, number>): string[] {
  const strings: string[] = [];
  for (const [token, id] of Object.entries(vocab)) strings[id] = token;
  return strings;
}

// The decoder's clean-up (clean_up_tokenization_spaces): no space before punctuation and contractions.
const cleanUps = [' .', ' ?', ' !', ' ,', " ' ", " n't", " 'm", " 's", " 've", " 're"] as const;

const charactersOf = (text: string): string =>
  Array.from(new TextEncoder().encode(text), (byte) => characterOfByte[byte]).join('');

function decode(ids: readonly number[], strings: readonly string[]): string {
  const bytes = ids.flatMap((id) => bytesOfToken(strings[id] ?? ''));
  const text = new TextDecoder().decode(Uint8Array.from(bytes)).replaceAll('</w>', ' ').trim();
  return cleanUps.reduce((cleaned, mark) => cleaned.replaceAll(mark, mark.trim()), text);
}
