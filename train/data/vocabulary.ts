// A CLIP tokenizer made from a dataset's captions, for models trained from scratch: a vocabulary of 49,408 would weigh more
// than the rest of a small text encoder. Byte pairs are merged by count (Sennrich et al. 2016), ties by spelling, so the
// same captions give the same files.
import { join } from 'node:path';
import { writeFileAtomic } from '../../io/files.ts';
import { writeJson } from '../../models/checkpoint/save.ts';
import { characterOfByte } from '../../models/text/byte_pairs.ts';
import { wordsOf } from '../../models/text/tokenizer.ts';

export interface Vocabulary {
  /** Ids by token: single bytes, bytes that end a word, merges, start and end of text. */
  vocab: Record<string, number>;
  /** Pairs in order of rank, as lines of merges.txt. */
  merges: string[];
}

const [startOfText, endOfText] = ['<|startoftext|>', '<|endoftext|>'];

/** A vocabulary of at most `size` tokens from `captions`. Pairs seen once are not merged. */
export function learnVocabulary(captions: readonly string[], size: number): Vocabulary {
  // CLIP's order: the visible bytes first, so that "!", the second tokenizer's padding, is id 0.
  const visible = characterOfByte.filter((character) => character.charCodeAt(0) < 0x100);
  const bytes = [...visible, ...characterOfByte.filter((character) => character.charCodeAt(0) >= 0x100)];
  const tokens = [...bytes, ...bytes.map((character) => `${character}</w>`)];
  const words = countWords(captions);
  const merges: string[] = [];
  while (tokens.length + 2 < size) {
    const best = commonestPair(words);
    if (!best) break;
    const [left, right] = best.split(' ');
    for (const word of words) merge(word.symbols, left, right);
    merges.push(best);
    // Two pairs may spell the same token.
    if (!tokens.includes(left + right)) tokens.push(left + right);
  }
  tokens.push(startOfText, endOfText);
  return { vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges };
}

interface Word {
  symbols: string[];
  count: number;
}

function countWords(captions: readonly string[]): Word[] {
  const counts = new Map<string, number>();
  for (const caption of captions)
    for (const word of wordsOf(caption)) counts.set(word, (counts.get(word) ?? 0) + 1);
  const encoder = new TextEncoder();
  return [...counts].map(([word, count]) => {
    const symbols = Array.from(encoder.encode(word), (byte) => characterOfByte[byte]);
    symbols[symbols.length - 1] += '</w>';
    return { symbols, count };
  });
}

function commonestPair(words: readonly Word[]): string | undefined {
  const counts = new Map<string, number>();
  for (const { symbols, count } of words)
    for (let i = 1; i < symbols.length; i++) {
      const pair = `${symbols[i - 1]} ${symbols[i]}`;
      counts.set(pair, (counts.get(pair) ?? 0) + count);
    }
  let best: string | undefined;
  let most = 1;
  for (const [pair, count] of counts)
    if (count > most || (count === most && best !== undefined && pair < best)) [best, most] = [pair, count];
  return best;
}

function merge(symbols: string[], left: string, right: string): void {
  for (let i = 0; i < symbols.length - 1; i++)
    if (symbols[i] === left && symbols[i + 1] === right) symbols.splice(i, 2, left + right);
}

/** Writes FOLDER/tokenizer and FOLDER/tokenizer_2; the second pads with "!", as SDXL's does. */
export function writeTokenizers(folder: string, { vocab, merges }: Vocabulary, length: number): void {
  for (const [name, pad] of [
    ['tokenizer', endOfText],
    ['tokenizer_2', '!'],
  ]) {
    const path = join(folder, name);
    const special = { bos_token: startOfText, eos_token: endOfText, pad_token: pad, unk_token: endOfText };
    writeJson(join(path, 'vocab.json'), vocab);
    writeFileAtomic(join(path, 'merges.txt'), `${['#version: 0.2', ...merges].join('\n')}\n`);
    writeJson(join(path, 'special_tokens_map.json'), special);
    writeJson(join(path, 'tokenizer_config.json'), {
      ...special,
      tokenizer_class: 'CLIPTokenizer',
      model_max_length: length,
    });
  }
}
