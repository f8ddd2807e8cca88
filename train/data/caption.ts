// The caption a sample is shown with in an epoch: one of its choices, its tags shuffled or thinned, or none at all. The
// options' names are kohya's.
import { createHash } from 'node:crypto';
import { draws } from './draws.ts';
import type { Sample } from './survey.ts';

export interface CaptionOptions {
  /** Share of captions left away, so that guidance has something to compare with. */
  caption_dropout_rate: number;
  /** Share of tags left away, each by itself. */
  caption_tag_dropout_rate: number;
  /** Put the tags in another order each epoch. */
  shuffle_caption: boolean;
  /** How many tags at the front are neither moved nor left away. */
  keep_tokens: number;
  caption_separator: string;
}

/**
 * The caption of the sample with this key in this epoch; undefined where it is left away, which is then the model's own
 * unconditional: zero embeddings (the base model), or those of an empty text.
 */
export function captionOf(
  captions: readonly string[],
  options: CaptionOptions,
  { seed, epoch, key }: { seed: number; epoch: number; key: number },
): string | undefined {
  if (draws(seed, epoch, key, 'dropout').uniform() < options.caption_dropout_rate) return undefined;
  const caption = captions[draws(seed, epoch, key, 'caption').integer(captions.length)];
  const { shuffle_caption, caption_tag_dropout_rate, keep_tokens, caption_separator } = options;
  if (!shuffle_caption && caption_tag_dropout_rate === 0) return caption;
  const tags = caption
    .split(caption_separator)
    .map((tag) => tag.trim())
    .filter((tag) => tag !== '');
  const random = draws(seed, epoch, key, 'tags');
  // A random number for each movable tag decides both its fate and its place.
  const movable = tags
    .slice(keep_tokens)
    .map((tag) => ({ tag, fate: random.uniform(), place: random.uniform() }));
  const kept = movable.filter(({ fate }) => fate >= caption_tag_dropout_rate);
  if (shuffle_caption) kept.sort((a, b) => a.place - b.place);
  return [...tags.slice(0, keep_tokens), ...kept.map(({ tag }) => tag)].join(`${caption_separator} `);
}

/** Every text the samples can be shown with, when they are few enough to be cached; undefined when tags are drawn. */
export function allCaptions(
  samples: readonly { captions: readonly string[] }[],
  options: CaptionOptions,
): string[] | undefined {
  if (options.shuffle_caption || options.caption_tag_dropout_rate > 0) return undefined;
  return [...new Set(samples.flatMap(({ captions }) => captions))];
}

/** Names the captions of all samples, each with whom it is of. */
export const hashOfCaptions = (samples: readonly Pick<Sample, 'id' | 'captions'>[]): string =>
  createHash('sha256')
    .update(JSON.stringify(samples.map(({ id, captions }) => [id, captions])))
    .digest('hex');
