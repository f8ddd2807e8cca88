// What may be otherwise in a run than in the one that saved the checkpoint from which it goes on.
import { isRecord } from '../../../io/json.ts';
import type { Run } from '../run.ts';
import { followed } from './optimizer.ts';
import { usual, withoutForeign } from './owners.ts';

/**
 * Keys that may change: they touch no number of the training, but that another end gives a schedule that falls another shape from there
 * on, and that a rate which led to NaN may be lowered. Pictures are compared by content, not by path.
 */
const free = [
  'train.fused_backward_pass',
  'optimizer.lr',
  'name',
  'output',
  'epochs',
  'steps',
  'checkpoints',
  'previews',
  'validation',
  'log_every',
  'max_nonfinite',
  'dataset.cache',
  'dataset.broken',
  'dataset.path',
  'dataset.class_data_dir',
];

/** Of a key that may change but in a part, that part: which blocks and text encoders are not trained. */
const held: Readonly<Record<string, (value: unknown) => unknown>> = {
  'optimizer.block_lr': (rates) => zerosOf(rates as number[]),
  // Of one rate 0 is that of the run.
  'optimizer.text_encoder_lr': (rates) => (Array.isArray(rates) && rates.length > 1 ? zerosOf(rates) : []),
};

const zerosOf = (rates: readonly number[]): number[] =>
  rates.flatMap((rate, place) => (rate === 0 ? [place] : []));

/** The first key in which `run` would train differently than the run that was `saved`, with both values; undefined where there is none. */
export const differenceFrom = (saved: Run, run: Run): string | undefined =>
  difference(
    {
      ...withoutForeign(saved),
      lr_scheduler: followed({ ...usual.lr_scheduler, ...saved.lr_scheduler }),
    },
    run,
    usual,
  );

/** A key that was not saved, as an older program knew it not, had its `usual` value. */
function difference(saved: unknown, now: unknown, usual: unknown, path = ''): string | undefined {
  if (free.includes(path)) return undefined;
  const then = saved === undefined ? usual : saved;
  if (isRecord(then) && isRecord(now)) {
    for (const key of new Set([...Object.keys(then), ...Object.keys(now)])) {
      const own = isRecord(usual) ? usual[key] : undefined;
      const found = difference(then[key], now[key], own, path ? `${path}.${key}` : key);
      if (found) return found;
    }
    return undefined;
  }
  const part = held[path] ?? ((value) => value);
  if (JSON.stringify(part(then)) === JSON.stringify(part(now))) return undefined;
  return `${path} was ${JSON.stringify(then)} and is ${JSON.stringify(now)}`;
}
