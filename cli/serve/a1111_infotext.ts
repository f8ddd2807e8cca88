// A1111's `parameters` text taken apart by its own labels, as its route for a picture's settings answers: every field by its name, sizes as
// two, and what it has where a text says nothing. What such a text means here is read in sample/a1111_read.ts.
import { unquoted } from '../sample/a1111_read.ts';

/** What is not said means this there, since 1.10. */
const usual: Readonly<Record<string, unknown>> = {
  'Clip skip': '1',
  ...{ 'Hires resize-1': 0, 'Hires resize-2': 0 },
  ...{ 'Hires sampler': 'Use same sampler', 'Hires schedule type': 'Use same scheduler' },
  ...{ 'Hires checkpoint': 'Use same checkpoint', 'Hires prompt': '', 'Hires negative prompt': '' },
  ...{ 'Mask mode': 'Inpaint masked', 'Masked content': 'original' },
  ...{ 'Inpaint area': 'Whole picture', 'Masked area padding': 32 },
  ...{ RNG: 'GPU', 'Schedule type': 'Automatic', Emphasis: 'Original' },
  ...{ 'Schedule max sigma': 0, 'Schedule min sigma': 0, 'Schedule rho': 0 },
  ...{ 'VAE Encoder': 'Full', 'VAE Decoder': 'Full', 'FP8 weight': 'Disable' },
  'Refiner switch by sampling steps': false,
};

/**
 * Behind a comma alone, or a long text would be gone through again from each of its letters; and without a choice for each letter of what is
 * quoted, which the stack has no room for.
 */
const fields = /(?<=^|,)\s*(\w[\w \-/]+):\s*("[^"\\]*(?:\\.[^"\\]*)*"|[^,]*)(?:,|$)/g;

/** The last line is fields where it has three of them; a line that begins so is the negative prompt, with those behind it. */
export function labelledParameters(text: string): Record<string, unknown> {
  const lines = text.trim().split('\n');
  const last = [...lines[lines.length - 1].matchAll(fields)].length < 3 ? '' : (lines.pop() as string);
  const texts = lines.map((line) => line.trim());
  const at = texts.findIndex((line) => line.startsWith('Negative prompt:'));
  const [prompt, negative] = at < 0 ? [texts, []] : [texts.slice(0, at), texts.slice(at)];
  const said: Record<string, unknown> = Object.create(null);
  for (const [, label, value] of last.matchAll(fields)) {
    const [, width, height] = /^(\d+)x(\d+)$/.exec(value) ?? [];
    if (width === undefined) said[label] = unquoted(value);
    else Object.assign(said, { [`${label}-1`]: width, [`${label}-2`]: height });
  }
  return {
    Prompt: prompt.join('\n'),
    'Negative prompt': negative.map((line) => line.replace(/^Negative prompt:\s*/, '')).join('\n'),
    ...usual,
    ...said,
  };
}
