// Weights in prompts as AUTOMATIC1111's webui reads them: the syntax, how weighted tokens fall into chunks, and what weights do to
// hidden states. A text encoder's states, taken as SDXL takes them (no final norm), are multiplied by their tokens' weights; `original`
// then scales a chunk back to the mean it had, over all its tokens and channels, for each encoder by itself. The pooled vector knows
// no weights. (stable-diffusion.cpp reads the same syntax, and takes the mean over both encoders.)
import { div, mul } from '../../engine/ops/binary.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { cast } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Chunks, Tokenizer } from './tokenizer.ts';

/** A1111's words for what becomes of weights, in our spelling: read as plain text, read and left out, or applied in two ways. */
export const emphases = ['none', 'ignore', 'original', 'no-norm'] as const;
export type Emphasis = (typeof emphases)[number];

/** A part of a prompt that has one weight. */
export interface Span {
  text: string;
  weight: number;
}

/** What a `BREAK` comes out as, between the spans: the next chunk begins there. */
const BREAK: Readonly<Span> = { text: 'BREAK', weight: -1 };

const marks = /\\[()[\]\\]?|[([\])]|:([+-]?[.\d]+)\)|[^\\()[\]:]+|:/g;
// Spaces are looked at from their first on alone: from each of them the rest would be read again.
const breaks = /(?:(?<!\s)\s+)?(?<![\p{L}\p{N}_])BREAK(?![\p{L}\p{N}_])\s*/u;

/** The most brackets of a kind within each other that weigh; a prompt of nothing else would have each weigh all the spans behind it. */
const mostDeep = 100;

/**
 * A prompt's spans: `(a)` has weight 1.1, `[a]` 1 / 1.1, `(a:1.3)` 1.3, nested ones their product; what is never closed goes on to
 * the end; a backslash takes a bracket or backslash as it stands. As in A1111 a BREAK inside brackets is an ordinary word.
 * @throws UserError for a weight that is no number
 */
export function parsePromptAttention(prompt: string): Span[] {
  const spans: Span[] = [];
  const open: Record<'(' | '[', number[]> = { '(': [], '[': [] };
  const weigh = (start = 0, weight: number) => {
    for (let i = start; i < spans.length; i++) spans[i].weight *= weight;
  };
  for (const [text, weight] of prompt.matchAll(marks)) {
    if (text[0] === '\\') spans.push({ text: text.slice(1), weight: 1 });
    else if (text === '(' || text === '[')
      open[text].push(open[text].length < mostDeep ? spans.length : Number.POSITIVE_INFINITY);
    else if (weight !== undefined && open['('].length > 0) weigh(open['('].pop(), numberOf(weight, text));
    else if (text === ')' && open['('].length > 0) weigh(open['('].pop(), 1.1);
    else if (text === ']' && open['['].length > 0) weigh(open['['].pop(), 1 / 1.1);
    else {
      for (const [i, part] of text.split(breaks).entries())
        spans.push(...(i > 0 ? [{ ...BREAK }] : []), { text: part, weight: 1 });
    }
  }
  for (const start of open['(']) weigh(start, 1.1);
  for (const start of open['[']) weigh(start, 1 / 1.1);
  return merged(spans);
}

function numberOf(weight: string, text: string): number {
  const value = Number(weight);
  if (Number.isFinite(value)) return value;
  throw new UserError(`the prompt has "${text}", which is no weight; write one such as (word:1.2)`);
}

/** Neighbours of one weight as one: a word may go on from one into the other. */
function merged(spans: readonly Span[]): Span[] {
  const out: Span[] = [];
  for (const { text, weight } of spans) {
    const last = out.at(-1);
    if (last?.weight === weight) last.text += text;
    else out.push({ text, weight });
  }
  return out.length > 0 ? out : [{ text: '', weight: 1 }];
}

/** A prompt's tokens in chunks, and the weight of each; no weights where all are 1. */
export interface Weighted {
  chunks: Chunks;
  weights?: Chunks;
}

interface Token {
  id: number;
  weight: number;
}

/** How near to a chunk's end, in tokens, the comma may be after which the rest goes to the next chunk: A1111's default. */
const COMMA_PADDING_BACKTRACK = 20;

/**
 * A prompt as `tokenizer` and `emphasis` have it. Where weights are read its chunks end as A1111's: at commas, and around a textual
 * inversion.
 */
export function readPrompt(tokenizer: Tokenizer, prompt: string, emphasis: Emphasis): Weighted {
  if (emphasis === 'none') return { chunks: tokenizer.chunksOf(prompt) };
  const chunks = wrapped(tokenizer, parsePromptAttention(prompt));
  const of = (key: keyof Token) => chunks.map((chunk) => chunk.map((token) => token[key]));
  const plain = emphasis === 'ignore' || chunks.flat().every(({ weight }) => weight === 1);
  return { chunks: of('id'), weights: plain ? undefined : of('weight') };
}

function wrapped(tokenizer: Tokenizer, spans: readonly Span[]): Token[][] {
  const room = tokenizer.modelMaxLength - 2; // without BOS and EOS
  const [comma] = tokenizer.tokenize(',');
  const chunks: Token[][] = [];
  let chunk: Token[] = [];
  let lastComma = -1;
  const next = (taken: Token[] = []) => {
    chunks.push(chunk);
    chunk = taken;
    lastComma = -1;
  };
  for (const { text, weight } of spans) {
    if (text === BREAK.text && weight === BREAK.weight) {
      next();
      continue;
    }
    for (const id of tokenizer.tokenize(text)) {
      if (id === comma) lastComma = chunk.length;
      else if (chunk.length === room && lastComma >= 0 && room - lastComma <= COMMA_PADDING_BACKTRACK)
        next(chunk.splice(lastComma + 1));
      if (chunk.length + Math.min(room, tokenizer.span(id)) > room) next();
      chunk.push({ id, weight });
    }
  }
  if (chunk.length > 0 || chunks.length === 0) next();
  return chunks;
}

/** Weights [texts * count * length] of laid out chunks, whose BOS, EOS and padding weigh 1; none where none of the texts has any. */
export function weightRows(
  texts: readonly Weighted[],
  count: number,
  length: number,
): Float32Array | undefined {
  if (texts.every(({ weights }) => weights === undefined)) return undefined;
  const rows = new Float32Array(texts.length * count * length).fill(1);
  texts.forEach(({ weights = [] }, i) => {
    weights.slice(0, count).forEach((chunk, j) => void rows.set(chunk, (i * count + j) * length + 1));
  });
  return rows;
}

/** Hidden states [rows, length, c], a chunk a row, under weights [rows, length]: in float32, and rounded to their own type. */
export function emphasize(hidden: Tensor, weights: Tensor, emphasis: Emphasis): Tensor {
  const x = cast(hidden, 'float32');
  const y = mul(x, weights.reshape(...weights.shape, 1));
  if (emphasis === 'no-norm') return cast(y, hidden.dtype);
  const total = (states: Tensor) => sum(sum(states, 2), 1);
  return cast(mul(y, div(total(x), total(y)).reshape(-1, 1, 1)), hidden.dtype);
}
