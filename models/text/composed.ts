// Prompts of which one picture is drawn together, as AUTOMATIC1111's webui reads them (its prompt_parser.py): `a cat AND a dog :0.8`. They
// are taken apart first, so that weights of words and changes with the steps are of one of them. A1111 reads a number behind a colon of a
// prompt without AND, too; here a prompt of one text counts whole.
import type { PromptEmbeds, Prompts } from './conditioning.ts';

const and = /(?<![\p{L}\p{N}_])AND(?![\p{L}\p{N}_])/u;

/**
 * A prompt's texts and, of several, how much each counts, with what stands beside it once for each text. Where weights are not read, AND
 * is a word.
 */
export function composed(
  prompt: string,
  { emphasis = 'none', prompt_2, negative_prompt, negative_prompt_2 }: Omit<Prompts, 'prompt'>,
): Omit<Prompts, keyof PromptEmbeds> {
  const texts = emphasis === 'none' ? [prompt] : prompt.split(and);
  const parts = texts.length === 1 ? [{ text: prompt, weight: 1 }] : texts.map(weighed);
  const each = (beside: readonly string[] | undefined) => beside && parts.map(() => beside[0]);
  return {
    prompt: parts.map(({ text }) => text),
    prompt_weights: parts.length === 1 ? undefined : parts.map(({ weight }) => weight),
    prompt_2: each(prompt_2),
    negative_prompt: each(negative_prompt),
    negative_prompt_2: each(negative_prompt_2),
  };
}

/** A text of more than one line has no weight, as there. */
function weighed(said: string): { text: string; weight: number } {
  const lead = said.length - said.trimStart().length;
  const body = said.trim();
  const [end = '', weight = '1'] = /:\s*([-+]?(?:\d+\.?|\d*\.\d+))$/.exec(body) ?? [];
  const words = body.slice(0, body.length - end.length).trimEnd();
  if (words.includes('\n')) return { text: said, weight: 1 };
  return { text: said.slice(0, lead) + words, weight: Number(weight) };
}
