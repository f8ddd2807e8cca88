// What stands below the options in a command's help: paragraphs as wide as the options are, and examples as they were written, as
// whoever copies one wants a whole line.
import type { AddHelpTextContext } from 'commander';

/** For `addHelpText`: lines that begin with a space stay as they are, and so does what comes after a colon at a line's end. */
export const below =
  (text: string) =>
  ({ command }: AddHelpTextContext): string => {
    const help = command.createHelp();
    const width = command.configureOutput().getOutHelpWidth?.() ?? 80;
    return paragraphs(text)
      .map((line) => (line.startsWith(' ') ? line : help.boxWrap(line, width)))
      .join('\n');
  };

/** The lines of a text, those of one paragraph joined. */
function paragraphs(text: string): string[] {
  const lines: string[] = [];
  for (const line of text.split('\n')) {
    const before = lines.at(-1) ?? '';
    if (/^\S/.test(line) && /^\S.*[^:]$/s.test(before)) lines[lines.length - 1] = `${before} ${line}`;
    else lines.push(line);
  }
  return lines;
}
