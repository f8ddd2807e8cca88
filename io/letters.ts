// Text in pictures: black letters of the built-in font, as large as a whole number times it.
import { glyph, glyphHeight, glyphWidth } from './font.ts';
import type { Picture } from './pixels.ts';

/** Pixels from one letter to the next, and from one line to the next, where the scale is 1. */
export const letterWidth = glyphWidth + 1;
export const lineHeight = glyphHeight + 2;

/** A text in lines of `most` letters, broken at spaces, or else at dashes and the like. Accents are dropped, as the font has none. */
export function linesOf(text: string, most: number): string[] {
  const plain = text.normalize('NFKD').replace(/\p{M}/gu, '').replace(/\s+/g, ' ').trim();
  const wide = Math.max(1, most);
  const lines = plain.match(new RegExp(`.{1,${wide}}(?= |$)|.{0,${wide - 1}}[-_/]|.{1,${wide}}`, 'gu')) ?? [];
  return lines.map((line) => line.trim()).filter((line) => line !== '');
}

/** Writes lines whose middle is at (x, y). What lies outside is cut off. */
export function writeLines(
  picture: Picture,
  lines: readonly string[],
  [x, y]: readonly [x: number, y: number],
  scale: number,
): void {
  const top = Math.round(y - (lines.length * lineHeight * scale) / 2);
  for (const [i, line] of lines.entries()) {
    const letters = [...line];
    const left = Math.round(x - (letters.length * letterWidth * scale) / 2);
    for (const [j, letter] of letters.entries())
      writeLetter(picture, letter, left + j * letterWidth * scale, top + (i * lineHeight + 1) * scale, scale);
  }
}

function writeLetter(
  { width, height, data }: Picture,
  letter: string,
  left: number,
  top: number,
  scale: number,
): void {
  const rows = glyph(letter);
  for (let dy = 0; dy < glyphHeight * scale; dy++)
    for (let dx = 0; dx < glyphWidth * scale; dx++) {
      const [x, y] = [left + dx, top + dy];
      const inked = rows[Math.floor(dy / scale)] & (1 << (glyphWidth - 1 - Math.floor(dx / scale)));
      if (inked && x >= 0 && y >= 0 && x < width && y < height)
        data.fill(0, 3 * (y * width + x), 3 * (y * width + x + 1));
    }
}
