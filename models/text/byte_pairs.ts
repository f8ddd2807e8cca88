// Byte-pair encoding of one word (Sennrich et al. 2016, over bytes as in GPT-2): bytes become printable
// characters, the last one carries "</w>", and the pair with the lowest rank is merged until none is left. A
// heap over a linked list keeps a word of n bytes at n log n, as a prompt may be one word of any length.
import { UserError } from '../../io/errors.ts';

// GPT-2's printable stand-ins: Latin-1's visible characters are themselves, the other bytes go to U+0100 and
// up.
export const characterOfByte: string[] = [];
const byteOfCharacter = new Map<string, number>();
for (let byte = 0, next = 0x100; byte < 256; byte++) {
  const visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xff && byte !== 0xad);
  characterOfByte[byte] = String.fromCharCode(visible ? byte : next++);
  byteOfCharacter.set(characterOfByte[byte], byte);
}

const utf8 = new TextEncoder();

/** The bytes a vocabulary entry stands for ("</w>" included as it is written). */
export function bytesOfToken(token: string): number[] {
  return Array.from(token).flatMap(
    (character) => byteOfCharacter.get(character) ?? [...utf8.encode(character)],
  );
}

interface Merge {
  rank: number;
  id: number;
}

const endOfWord = '</w>';
const cachedWords = 10_000;
const longestCachedWord = 64;

export class BytePairEncoder {
  // The pair (left, right) under the key left * vocabulary size + right.
  readonly #merges = new Map<number, Merge>();
  readonly #pairBase: number;
  readonly #inside: Int32Array;
  readonly #final: Int32Array;
  readonly #cache = new Map<string, readonly number[]>();

  /**
   * @param merges merges.txt: a version line, then one pair per line in order of rank
   * @param unknown the id of bytes that the vocabulary lacks
   * @throws UserError when the merges and the vocabulary do not belong together
   */
  constructor(vocab: Record<string, number>, merges: string, unknown: number, where: string) {
    const ids = new Map(Object.entries(vocab));
    const larger = (a: number, b: number) => (Number.isInteger(b) ? Math.max(a, b) : Number.NaN);
    this.#pairBase = 1 + [...ids.values()].reduce(larger, 0);
    if (!Number.isSafeInteger(this.#pairBase ** 2)) {
      throw new UserError(
        `${where} has ids in vocab.json that are no token ids: download the tokenizer again`,
      );
    }
    this.#inside = Int32Array.from(characterOfByte, (character) => ids.get(character) ?? unknown);
    this.#final = Int32Array.from(characterOfByte, (character) => ids.get(character + endOfWord) ?? unknown);
    const lines = merges.split('\n').map((line) => line.trimEnd());
    const pairs = lines.filter((line) => line !== '' && !line.startsWith('#version'));
    for (const [rank, line] of pairs.entries()) {
      const [left, right, ...rest] = line.split(' ');
      const [leftId, rightId, id] = [ids.get(left), ids.get(right ?? ''), ids.get(left + right)];
      if (rest.length > 0 || leftId === undefined || rightId === undefined || id === undefined) {
        throw new UserError(
          `${where} has a merge "${line}" in merges.txt that vocab.json does not know: ` +
            'download both files again',
        );
      }
      this.#merges.set(leftId * this.#pairBase + rightId, { rank, id });
    }
  }

  /** Appends the ids of `word` (lower-cased, without spaces) to `out`. */
  encode(word: string, out: number[]): void {
    let ids = this.#cache.get(word);
    if (!ids) {
      ids = this.#encodeWord(word);
      if (word.length <= longestCachedWord && this.#cache.size < cachedWords) this.#cache.set(word, ids);
    }
    for (const id of ids) out.push(id);
  }

  #encodeWord(word: string): number[] {
    const bytes = utf8.encode(word);
    const last = bytes.length - 1;
    const ids = Int32Array.from(bytes, (byte, i) => (i === last ? this.#final : this.#inside)[byte]);
    // Each symbol lives at the place of its first byte; an absorbed one has id -1.
    const next = Int32Array.from(ids, (_, i) => i + 1);
    const previous = Int32Array.from(ids, (_, i) => i - 1);
    const queue = new MergeQueue();
    const propose = (at: number) => {
      const right = at < 0 ? ids.length : next[at];
      if (right >= ids.length) return;
      const merge = this.#merges.get(ids[at] * this.#pairBase + ids[right]);
      if (merge) queue.push({ ...merge, at, left: ids[at], right: ids[right] });
    };
    for (let i = 0; i < last; i++) propose(i);
    for (let top = queue.pop(); top; top = queue.pop()) {
      const { at, id } = top;
      const right = next[at];
      // The pair may have gone since it was queued.
      if (ids[at] !== top.left || right >= ids.length || ids[right] !== top.right) continue;
      ids[at] = id;
      ids[right] = -1;
      next[at] = next[right];
      if (next[at] < ids.length) previous[next[at]] = at;
      propose(previous[at]);
      propose(at);
    }
    return Array.from(ids.filter((id) => id >= 0));
  }
}

interface QueuedMerge extends Merge {
  at: number;
  left: number;
  right: number;
}

/** A binary heap: the lowest rank first, then the leftmost place. */
class MergeQueue {
  readonly #heap: QueuedMerge[] = [];

  push(merge: QueuedMerge): void {
    const heap = this.#heap;
    let i = heap.push(merge) - 1;
    while (i > 0) {
      const parent = (i - 1) >> 1;
      if (!before(merge, heap[parent])) break;
      heap[i] = heap[parent];
      i = parent;
    }
    heap[i] = merge;
  }

  pop(): QueuedMerge | undefined {
    const heap = this.#heap;
    const top = heap[0];
    const moved = heap.pop();
    if (moved === undefined || heap.length === 0) return top;
    let i = 0;
    for (let child = 1; child < heap.length; child = 2 * i + 1) {
      if (child + 1 < heap.length && before(heap[child + 1], heap[child])) child++;
      if (!before(heap[child], moved)) break;
      heap[i] = heap[child];
      i = child;
    }
    heap[i] = moved;
    return top;
  }
}

const before = (a: Merge & { at: number }, b: Merge & { at: number }) =>
  a.rank < b.rank || (a.rank === b.rank && a.at < b.at);
