// The picture of `sdxl grid`: a table with the values of x over its columns and those of y beside its rows; grids of z stand side by side,
// as A1111's, and share the labels of the rows. Cells may be of several sizes, and stay as they are.
import { UserError } from '../../io/errors.ts';
import { whitePicture } from '../../io/grid.ts';
import { letterWidth, lineHeight, linesOf, writeLines } from '../../io/letters.ts';
import { lay, type Picture } from '../../io/pixels.ts';

interface Sized {
  at: readonly [x: number, y: number, z: number];
  width: number;
  height: number;
}

/** What stands over columns, beside rows and over grids, empty where nothing does. */
export interface Labels {
  columns: readonly string[];
  rows: readonly string[];
  grids: readonly string[];
}

export interface Sheet {
  picture: Picture;
  /** Puts a picture into the middle of its cell. */
  place(picture: Picture, at: Sized['at']): void;
}

/** What sharp, and with it many programs, opens at the most. */
const mostPixels = 0x3fff ** 2;

/** The most letters of a line beside a row. */
const mostBeside = 24;

/** A band of the table: where it begins, and how long it is. */
interface Band {
  from: number;
  length: number;
}

/** Bands one after the other with gaps between, wider ones after each `together` bands. */
function bandsOf(lengths: readonly number[], start: number, gap: number, together = lengths.length): Band[] {
  let from = start;
  return lengths.map((length, i) => {
    const band = { from, length };
    from += length + ((i + 1) % together ? gap : 4 * gap);
    return band;
  });
}

const endOf = (bands: readonly Band[]): number => (bands.at(-1)?.from ?? 0) + (bands.at(-1)?.length ?? 0);
const middleOf = ({ from, length }: Band): number => from + length / 2;

/** The longest line of some, in letters, and the most lines that one of them has. */
const longestOf = (all: readonly string[][]): number =>
  Math.max(0, ...all.flat().map(({ length }) => length));
const tallestOf = (all: readonly string[][]): number => Math.max(...all.map(({ length }) => length));

/** @throws UserError for one that would be too large */
export function openSheet({ columns, rows, grids }: Labels, cells: readonly Sized[]): Sheet {
  const columnOf = ([x, , z]: Sized['at']) => z * columns.length + x;
  const heads = grids.flatMap(() => columns);
  const most = (side: 'width' | 'height', isThere: (at: Sized['at']) => boolean) =>
    Math.max(...cells.filter(({ at }) => isThere(at)).map((each) => each[side]));
  const widths = heads.map((_, i) => most('width', (at) => columnOf(at) === i));
  const heights = rows.map((_, i) => most('height', ([, y]) => y === i));
  // As large as can be read where the whole is as wide as a screen.
  const scale = Math.max(1, Math.round(Math.min(...widths) / 256));
  const [letter, line, gap] = [letterWidth * scale, lineHeight * scale, 4 * scale];
  const fitted = (label: string, { length }: Band) => linesOf(label, Math.floor(length / letter));

  const beside = rows.map((label) => linesOf(label, mostBeside));
  const left = { from: gap, length: longestOf(beside) * letter };
  const across = bandsOf(widths, left.length > 0 ? endOf([left]) + gap : gap, gap, columns.length);
  const groups = grids.map((_, i): Band => {
    const own = across.slice(i * columns.length, (i + 1) * columns.length);
    return { from: own[0].from, length: endOf(own) - own[0].from };
  });
  const titles = grids.map((label, i) => fitted(label, groups[i]));
  const named = heads.map((label, i) => fitted(label, across[i]));
  const [top, under] = bandsOf([tallestOf(titles) * line, tallestOf(named) * line], gap, 0);
  const tall = heights.map((height, i) => Math.max(height, beside[i].length * line));
  const down = bandsOf(tall, endOf([under]) + gap, gap);

  const picture = sheetOf(endOf(across) + gap, endOf(down) + gap);
  const write = (lines: readonly string[], x: Band, y: Band) =>
    writeLines(picture, lines, [middleOf(x), middleOf(y)], scale);
  for (const [i, lines] of titles.entries()) write(lines, groups[i], top);
  for (const [i, lines] of named.entries()) write(lines, across[i], under);
  for (const [i, lines] of beside.entries()) write(lines, left, down[i]);
  return {
    picture,
    place(drawn, at) {
      const [x, y] = [middleOf(across[columnOf(at)]), middleOf(down[at[1]])];
      lay(picture, drawn, Math.floor(x - drawn.width / 2), Math.floor(y - drawn.height / 2));
    },
  };
}

function sheetOf(width: number, height: number): Picture {
  if (width * height <= mostPixels) return whitePicture(width, height);
  throw new UserError(
    `the grid would be of ${width}x${height} pixels, and ${Math.floor(mostPixels / 1e6)} million are the most: give fewer values, or a smaller --width and --height`,
  );
}
