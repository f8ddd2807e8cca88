// What kohya's trainer drops of a LoRA while it trains, all of it behind A, whose result has a number for each neuron: numbers one by
// one (network_dropout; peft's lora_dropout drops those of x, before A), ranks of a picture (rank_dropout), or the layer's adapter of a
// picture (module_dropout). What is left is made larger by 1 / (1 - p), but for the last; kohya draws that one for a whole pass, where
// here no draw may hang on how pictures are dealt out. LoHa and LoKr have no A: as in LyCORIS a rank_dropout drops outputs of their
// difference (its rows, there for a whole pass), and makes nothing larger. Masks are inputs of a pass as its noise is, in one tensor
// [n, numbers of all layers], so a pass can be recorded, made twice or recomputed. How many numbers a layer has only a forward pass tells:
// one without numbers, on a stand-in device.
import { withDrop } from '../../engine/dropout.ts';
import type { Tensors } from '../../engine/op.ts';
import { mul } from '../../engine/ops/binary.ts';
import { slice } from '../../engine/ops/move.ts';
import { scaled } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { type Draws, draws } from '../data/draws.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import type { Run } from '../run/run.ts';

export interface Dropout {
  /** The masks of a pass over the pictures of these keys, beside its other inputs. */
  inputs(given: PassInputs, keys: readonly number[], epoch: number): PassInputs;
  /** The same without numbers, for `n` pictures. */
  blank(given: PassInputs, n: number): PassInputs;
  /** Runs `fn`, in which layers drop as the pass's inputs say, where they do. */
  during<R>(inputs: Tensors, fn: () => R): R;
}

/** A pass's inputs without masks: what is measured, and not learnt from, drops nothing. */
export const undropped = ({ dropout: _, ...inputs }: PassInputs): PassInputs => inputs;

/** A layer's place in a picture's mask. */
interface Place {
  offset: number;
  length: number;
  rank: number;
  /** Of the result that a picture has: 1, or chunks of its caption. */
  rows: number;
}

type Layout = ReadonlyMap<string, Place>;

/** `rehearse` makes a pass with such inputs, without numbers. */
export function dropoutOf({ lora, seed, dtype }: Run, rehearse: (inputs: PassInputs) => void): Dropout {
  const { network_dropout, rank_dropout, module_dropout } = lora;
  if (network_dropout + rank_dropout + module_dropout === 0)
    return { inputs: () => ({}), blank: () => ({}), during: (_, fn) => fn() };
  const layouts = new Map<string, Layout>();
  const layoutOf = (inputs: PassInputs, n: number): Layout => {
    const shapes = shapesOf(inputs);
    const layout = layouts.get(shapes) ?? findLayout(() => rehearse(inputs), n, network_dropout > 0);
    layouts.set(shapes, layout);
    return layout;
  };
  const masks = (n: number, layout: Layout, values?: Float32Array): PassInputs => {
    const shape = [n, lengthOf(layout)];
    return { dropout: { shape, values: values ?? new Float32Array(n * shape[1]), dtype } };
  };
  const factor = lora.algo === 'lora' ? 1 / ((1 - network_dropout) * (1 - rank_dropout)) : 1;
  return {
    inputs(given, keys, epoch) {
      const layout = layoutOf(given, keys.length);
      const length = lengthOf(layout);
      const values = new Float32Array(keys.length * length).fill(1);
      for (const [i, key] of keys.entries())
        dropFrom(values.subarray(i * length, (i + 1) * length), layout, lora, (purpose) =>
          draws(seed, epoch, key, purpose),
        );
      return masks(keys.length, layout, values);
    },
    blank: (given, n) => masks(n, layoutOf(given, n)),
    during({ dropout: mask, ...others }, fn) {
      if (!mask) return fn();
      const layout = layouts.get(shapesOf(others)) as Layout;
      return withDrop((layer, x) => {
        const { offset, length, rank } = layout.get(layer) as Place;
        const own = slice(mask, 1, offset, length);
        const fits = length * mask.shape[0] === x.size;
        const rows = [x.shape[0], ...x.shape.slice(1, -1).map(() => 1), rank];
        return scaled(mul(x, own.reshape(...(fits ? x.shape : rows))), factor);
      }, fn);
    },
  };
}

const shapesOf = (inputs: Readonly<Record<string, { shape: readonly number[] }>>): string =>
  JSON.stringify(Object.entries(inputs).map(([name, { shape }]) => [name, shape]));

const lengthOf = (layout: Layout): number =>
  [...layout.values()].reduce((sum, { length }) => sum + length, 0);

/** The layers in the order of a pass, each with a number for every one of A's result, or for every rank (output of a difference). */
function findLayout(rehearse: () => void, n: number, each: boolean): Layout {
  const layout = new Map<string, Place>();
  let offset = 0;
  const note = (layer: string, x: Tensor): Tensor => {
    const rank = x.shape[x.shape.length - 1];
    const rows = x.shape[0] / n;
    const length = each ? x.size / n : rows * rank;
    if (layout.has(layer) || !Number.isInteger(rows))
      throw new Error(`dropout has no place for ${layer} [${x.shape}] of ${n} pictures`);
    layout.set(layer, { offset, length, rank, rows });
    offset += length;
    return x;
  };
  withDrop(note, rehearse);
  return layout;
}

type Rates = Pick<Run['lora'], 'network_dropout' | 'rank_dropout' | 'module_dropout'>;

/** Puts zeros into a picture's mask of ones. */
function dropFrom(
  mask: Float32Array,
  layout: Layout,
  { network_dropout, rank_dropout, module_dropout }: Rates,
  drawn: (purpose: 'network_dropout' | 'rank_dropout' | 'module_dropout') => Draws,
): void {
  for (const at of hits(drawn('network_dropout'), network_dropout, mask.length)) mask[at] = 0;
  const [ranks, modules] = [drawn('rank_dropout'), drawn('module_dropout')];
  for (const { offset, length, rank, rows } of layout.values()) {
    const row = length / rows;
    for (const hit of hits(ranks, rank_dropout, rows * rank)) {
      const begin = offset + Math.floor(hit / rank) * row;
      for (let at = begin + (hit % rank); at < begin + row; at += rank) mask[at] = 0;
    }
    if (modules.uniform() < module_dropout) mask.fill(0, offset, offset + length);
  }
}

/** Which of `count` things happen, each with probability p: gaps between them are geometric, so those that do not cost nothing. */
function* hits(source: Draws, p: number, count: number): Generator<number> {
  if (p === 0) return;
  const scale = 1 / Math.log1p(-p);
  const gap = () => Math.floor(Math.log1p(-source.uniform()) * scale);
  for (let at = gap(); at < count; at += 1 + gap()) yield at;
}
