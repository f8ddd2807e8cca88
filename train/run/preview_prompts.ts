// What previews draw: a run's prompts, each a text or a record with settings of its own before the ones that all share.
import { UserError } from '../../io/errors.ts';
import { type Fields, number, seed, text, textOrRecord, whole } from './fields.ts';

/** A prompt with settings of its own, in the words of a request; what is absent is as for all. */
export interface PreviewPrompt {
  prompt: string;
  negative_prompt?: string;
  width?: number;
  height?: number;
  seed?: number;
  guidance_scale?: number;
  num_inference_steps?: number;
  scheduler?: string;
}

/** What all previews share, and the prompts. */
export interface PreviewSettings {
  /** The i-th has the seed `seed + i`, so that four times one prompt gives four pictures. */
  prompts: readonly (string | PreviewPrompt)[];
  /** What a ControlNet or adapter that is trained beside the UNet follows in them: one for all, or as many as prompts; one prompt may have many. */
  validation_image: readonly string[];
  negative_prompt: string;
  seed: number;
  /** Updates between previews; 0 for every epoch. */
  every_steps: number;
  num_inference_steps: number;
  guidance_scale: number;
  /** A scheduler's name; empty for the model's. */
  scheduler: string;
}

const own: Fields<PreviewPrompt> = {
  prompt: text(''),
  negative_prompt: text(''),
  width: whole(0, { min: 1 }),
  height: whole(0, { min: 1 }),
  seed: seed(),
  guidance_scale: number(5, { min: 0 }),
  num_inference_steps: whole(50, { min: 1 }),
  scheduler: text(''),
};

/** A prompt of previews.prompts. */
export const previewPrompt = textOrRecord(own, 'prompt');

/** A preview as it is drawn. */
export type Preview = Required<PreviewPrompt>;

/** A record for every preview; where several pictures are followed, one prompt may be for all. */
function recordsOf({ prompts, validation_image: { length: images } }: PreviewSettings): PreviewPrompt[] {
  const all =
    prompts.length === 1 && images > 1 ? Array<(typeof prompts)[0]>(images).fill(prompts[0]) : prompts;
  return all.map((prompt) => (typeof prompt === 'string' ? { prompt } : prompt));
}

/** The text of every preview. */
export const promptsOf = (settings: PreviewSettings): string[] =>
  recordsOf(settings).map(({ prompt }) => prompt);

/** Every preview with all its settings. `size` is for those that name none. */
export function previewsOf(settings: PreviewSettings, size: Pick<Preview, 'width' | 'height'>): Preview[] {
  const { negative_prompt, num_inference_steps, guidance_scale, scheduler, seed } = settings;
  const shared = { ...size, negative_prompt, num_inference_steps, guidance_scale, scheduler };
  return recordsOf(settings).map((record, i) => {
    const given = Object.entries(record).filter(([, value]) => value !== undefined);
    return { ...shared, seed: seed + i, prompt: record.prompt, ...Object.fromEntries(given) };
  });
}

/** What kohya's sample_prompts say behind a prompt, and what that is in a record. */
const flags: Readonly<Record<string, keyof PreviewPrompt>> = {
  n: 'negative_prompt',
  w: 'width',
  h: 'height',
  d: 'seed',
  l: 'guidance_scale',
  s: 'num_inference_steps',
  ss: 'scheduler',
};

/** @throws UserError for a line of kohya's, which would be drawn as it stands; it tells the record */
export function refuseLines({ prompts }: PreviewSettings, where: string): void {
  prompts.forEach((line, i) => {
    const [prompt, ...parts] = typeof line === 'string' ? line.split(' --') : [''];
    const read = parts.map((part) => /^(\w+)\s+(.*)$/.exec(part.trim()) ?? []);
    if (!read.some(([, flag]) => Object.hasOwn(flags, flag))) return;
    const settings = read.flatMap(([, flag, value]) => {
      const key = Object.hasOwn(flags, flag) && flags[flag];
      return key ? [`${key}: ${own[key].accepts(Number(value)) ? value : JSON.stringify(value)}`] : [];
    });
    throw new UserError(
      `${where}: "previews.prompts[${i}]" is a line of kohya's sample_prompts; write { ${[`prompt: ${JSON.stringify(prompt)}`, ...settings].join(', ')} }`,
    );
  });
}
