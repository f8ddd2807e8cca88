// The caption a sample is shown with in an epoch: one of its choices, its tags shuffled or thinned, or none at all. The
// options' names are kohya's, whose ", " between tags is here the separator and a space.
import { createHash } from 'node:crypto';
import { type Draws, draws } from './draws.ts';
import type { Sample } from './survey.ts';

export interface CaptionOptions {
  /** Share of captions left away, so that guidance has something to compare with. */
  caption_dropout_rate: number;
  /** Share of tags left away, each by itself. */
  caption_tag_dropout_rate: number;
  /** Put the tags in another order each epoch. */
  shuffle_caption: boolean;
  /** Draw one of `{one|another}`; `{{` and `}}` are braces. */
  enable_wildcard: boolean;
  /** How many tags at the front are neither moved nor left away. */
  keep_tokens: number;
  /** What stands around the tags that are moved or left away, in captions that have it, in place of keep_tokens; empty for none. */
  keep_tokens_separator: string;
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
  const written = captions[draws(seed, epoch, key, 'caption').integer(captions.length)];
  const caption = options.enable_wildcard ? chosen(written, draws(seed, epoch, key, 'wildcard')) : written;
  if (!drawsTags(options)) return undrawn(caption, options);
  const { shuffle_caption, caption_tag_dropout_rate } = options;
  const { before, movable, behind } = tagsOf(caption, options);
  const random = draws(seed, epoch, key, 'tags');
  // A random number for each movable tag decides both its fate and its place.
  const fated = movable.map((tag) => ({ tag, fate: random.uniform(), place: random.uniform() }));
  const kept = fated.filter(({ fate }) => fate >= caption_tag_dropout_rate);
  if (shuffle_caption) kept.sort((a, b) => a.place - b.place);
  return joined([...before, ...kept.map(({ tag }) => tag), ...behind], options);
}

/** What stand for braces that are written twice, while others are looked for: of no script. */
const [OPEN, CLOSE] = ['\u{F0000}', '\u{F0001}'];

/** The caption with one of each wildcard's alternatives. */
const chosen = (caption: string, random: Draws): string =>
  caption
    .replaceAll('{{', OPEN)
    .replaceAll('}}', CLOSE)
    .replace(/\{([^}]+)\}/g, (_, alternatives: string) => {
      const each = alternatives.split('|');
      return each[random.integer(each.length)];
    })
    .replaceAll(OPEN, '{')
    .replaceAll(CLOSE, '}');

const drawsTags = ({ shuffle_caption, caption_tag_dropout_rate }: CaptionOptions): boolean =>
  shuffle_caption || caption_tag_dropout_rate > 0;

const joined = (tags: readonly string[], { caption_separator }: CaptionOptions): string =>
  tags.join(`${caption_separator} `);

/** A caption as it is written, but for separators of what is kept, which no model should see. */
function undrawn(caption: string, options: CaptionOptions): string {
  const { keep_tokens_separator: separator } = options;
  if (!separator || !caption.includes(separator)) return caption;
  const { before, movable, behind } = tagsOf(caption, options);
  return joined([...before, ...movable, ...behind], options);
}

/** The tags of a caption that may be moved or left away, those before them and those behind. */
function tagsOf(caption: string, options: CaptionOptions) {
  const { keep_tokens, keep_tokens_separator, caption_separator } = options;
  const split = (text: string) =>
    text
      .split(caption_separator)
      .map((tag) => tag.trim())
      .filter((tag) => tag !== '');
  if (keep_tokens_separator && caption.includes(keep_tokens_separator)) {
    const [before, movable, ...behind] = caption.split(keep_tokens_separator).map(split);
    return { before, movable, behind: behind.flat() };
  }
  const tags = split(caption);
  return { before: tags.slice(0, keep_tokens), movable: tags.slice(keep_tokens), behind: [] };
}

/** Every text the samples can be shown with, when they are few enough to be cached; undefined when tags are drawn. */
export function allCaptions(
  samples: readonly { captions: readonly string[] }[],
  options: CaptionOptions,
): string[] | undefined {
  if (drawsTags(options) || options.enable_wildcard) return undefined;
  return [
    ...new Set(samples.flatMap(({ captions }) => captions.map((caption) => undrawn(caption, options)))),
  ];
}

/** Names the captions of all samples, each with whom it is of. */
export const hashOfCaptions = (samples: readonly Pick<Sample, 'id' | 'captions'>[]): string =>
  createHash('sha256')
    .update(JSON.stringify(samples.map(({ id, captions }) => [id, captions])))
    .digest('hex');
