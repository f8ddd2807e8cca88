// A1111's styles: texts under names in a file (styles.csv), which are put around a prompt or behind it. A picture carries the texts that came
// of it, as there, so that it is drawn again without the file.

import { parseCsv } from '../../io/csv.ts';
import { didYouMean, UserError } from '../../io/errors.ts';
import { readText } from '../../io/files.ts';
import { readFor } from '../option_values.ts';
import { type SampleOptions, typedPrompts } from './options.ts';

export interface Style {
  name: string;
  prompt: string;
  negative_prompt: string;
}

/** The styles of a file, as A1111 writes them and once did (`text`); where two have a name the last counts. @throws UserError */
export function readStyles(path: string): Style[] {
  const [columns = [], ...rows] = readFor(path, () => parseCsv(readText(path)));
  const place = (...names: readonly string[]): number =>
    columns.findIndex((column) => names.includes(column));
  const [name, prompt, negative] = [place('name'), place('prompt', 'text'), place('negative_prompt')];
  if (name < 0 || prompt < 0)
    throw new UserError(
      `${path} has no styles: its first line must name the columns, name,prompt,negative_prompt`,
    );
  const styles = rows
    .filter((row) => !row[name]?.startsWith('#'))
    .map((row) => ({
      name: row[name] ?? '',
      prompt: row[prompt] ?? '',
      negative_prompt: row[negative] ?? '',
    }));
  return [...new Map(styles.map((style) => [style.name, style])).values()];
}

/** Those of these names, in their order. @throws UserError for one that is not there */
export function chosenStyles(path: string, names: readonly string[], key: string): Style[] {
  const styles = readStyles(path);
  return names.map((name) => {
    const style = styles.find((each) => each.name === name);
    if (style) return style;
    const known = styles.map((each) => each.name);
    const some =
      known.length > 0 ? `: it has ${known.slice(0, 10).join(', ')}${known.length > 10 ? ', ...' : ''}` : '';
    throw new UserError(`${key} "${name}" is not in ${path}${didYouMean(name, known) || some}`);
  });
}

/** A text in these styles, one after the other: in the place of {prompt}, or with what they say behind it. */
export const styled = (text: string, styles: readonly string[]): string =>
  styles.reduce(
    (before, style) =>
      style.includes('{prompt}')
        ? style.replaceAll('{prompt}', () => before)
        : [before.trim(), style.trim()].filter((part) => part !== '').join(', '),
    text,
  );

/** Options whose texts are in the styles that they name, which they then name no more. @throws UserError */
export function withStyles<O extends SampleOptions>(options: O): O {
  const { style: names = [], stylesFile, negativePrompt, hiresPrompt, hiresNegativePrompt } = options;
  if (names.length === 0) return options;
  if (stylesFile === undefined)
    throw new UserError("--style needs --styles-file: a styles.csv as A1111's, which has it");
  const styles = chosenStyles(stylesFile, names, '--style');
  const positive = (text: string) =>
    styled(
      text,
      styles.map(({ prompt }) => prompt),
    );
  const negative = (text: string) =>
    styled(
      text,
      styles.map(({ negative_prompt }) => negative_prompt),
    );
  return {
    ...options,
    prompt: typedPrompts(options).map(positive),
    negativePrompt: negative(negativePrompt ?? '') || negativePrompt,
    // Without one of its own a second pass has the first's.
    hiresPrompt: hiresPrompt && positive(hiresPrompt),
    hiresNegativePrompt: hiresNegativePrompt && negative(hiresNegativePrompt),
    ...{ promptFile: undefined, style: undefined, stylesFile: undefined },
  };
}
