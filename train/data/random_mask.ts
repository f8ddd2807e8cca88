// Masks of what is to be painted anew, drawn at random, as trainers of inpainting models draw them: `random_mask` is a box or an ellipse
// of any size (diffusers' train_dreambooth_inpaint.py), `bbox` a box of about half of each side (MMagic's random_bbox with the numbers of
// diffengine's recipe), `irregular` strokes of a brush (Liu et al. 2018, MMagic's get_irregular_mask). MMagic's lengths are pixels of
// pictures of 512 and 256 a side, and here parts of a side.
import type { Size } from '../../models/text/conditioning.ts';
import type { Draws } from './draws.ts';

/** Fills a mask [h, w] of zeros with ones. */
type Drawing = (size: Size, source: Draws) => Float32Array;

const drawings = { random_mask: boxOrEllipse, bbox: box, irregular: strokes } satisfies Record<
  string,
  Drawing
>;

export type RandomMask = keyof typeof drawings;
export const randomMasks = Object.keys(drawings) as RandomMask[];

/** A mask [h, w], 1 where to paint anew: all of it at the rate `full`. */
export function drawMask(mode: RandomMask, full: number, size: Size, source: Draws): Float32Array {
  if (source.uniform() < full) return new Float32Array(size[0] * size[1]).fill(1);
  return drawings[mode](size, source);
}

/** Marks the pixels of `mask` within those bounds, the last ones too, that `isInside` says; how many were not marked before. */
function mark(
  mask: Float32Array,
  [height, width]: Size,
  [top, left, bottom, right]: readonly [number, number, number, number],
  isInside: (y: number, x: number) => boolean = () => true,
): number {
  let count = 0;
  for (let y = Math.max(0, top); y <= Math.min(height - 1, bottom); y++)
    for (let x = Math.max(0, left); x <= Math.min(width - 1, right); x++)
      if (mask[y * width + x] === 0 && isInside(y, x)) {
        mask[y * width + x] = 1;
        count++;
      }
  return count;
}

/** Any two sides, then any centre that leaves the whole of it in the picture. */
function boxOrEllipse(size: Size, source: Draws): Float32Array {
  const mask = new Float32Array(size[0] * size[1]);
  const [down, across] = size.map((side) => Math.floor(source.integer(side + 1) / 2));
  const y = down + source.integer(size[0] - 2 * down + 1);
  const x = across + source.integer(size[1] - 2 * across + 1);
  const within = (i: number, j: number) =>
    ((i - y) / (down + 0.5)) ** 2 + ((j - x) / (across + 0.5)) ** 2 <= 1;
  const isBox = source.integer(2) === 0;
  mark(mask, size, [y - down, x - across, y + down, x + across], isBox ? undefined : within);
  return mask;
}

/** Half of each side, less up to 20 / 512 of it above and to the left, 20 / 512 or more from the rim. */
function box(size: Size, source: Draws): Float32Array {
  const mask = new Float32Array(size[0] * size[1]);
  const [vertical, horizontal] = size.map((side) => {
    const [most, margin] = [Math.floor(side / 2), Math.floor((20 * side) / 512)];
    const begin = margin + source.integer(Math.max(1, side - 2 * margin - most));
    return [begin + source.integer(margin + 1), begin + most - 1];
  });
  mark(mask, size, [vertical[0], horizontal[0], vertical[1], horizontal[1]]);
  return mask;
}

/** Drawn again where they cover less or more of the picture than that. */
const coverage = [0.15, 0.5] as const;

function strokes(size: Size, source: Draws): Float32Array {
  for (;;) {
    const mask = new Float32Array(size[0] * size[1]);
    const count = 4 + source.integer(4);
    let share = 0;
    for (let i = 0; i < count; i++) share += brush(mask, size, source, i % 2 === 0 ? -1 : 1) / mask.length;
    if (share > coverage[0] && share < coverage[1]) return mask;
  }
}

/**
 * One to five strokes end to end, which turn by 0 to 3 radians; of pictures of 256 a side 10 to 99 long and 10 to 39 wide. Gives how
 * many pixels they mark.
 */
function brush(mask: Float32Array, size: Size, source: Draws, turn: 1 | -1): number {
  const unit = Math.sqrt(size[0] * size[1]) / 256;
  let [x, y] = [source.integer(size[1]), source.integer(size[0])];
  const count = 1 + source.integer(5);
  let marked = 0;
  for (let i = 0; i < count; i++) {
    const angle = turn * (0.01 + source.integer(4));
    const length = unit * (10 + source.integer(90));
    const radius = (unit * (10 + source.integer(30))) / 2;
    const [dx, dy] = [length * Math.cos(angle), length * Math.sin(angle)];
    marked += line(mask, size, { x, y, dx, dy, radius });
    [x, y] = [x + dx, y + dy];
  }
  return marked;
}

interface Line {
  x: number;
  y: number;
  dx: number;
  dy: number;
  radius: number;
}

/** A line with round ends: what is no farther than the radius from its axis. */
function line(mask: Float32Array, size: Size, { x, y, dx, dy, radius }: Line): number {
  const bound = (a: number, d: number): [number, number] => [
    Math.ceil(Math.min(a, a + d) - radius),
    Math.floor(Math.max(a, a + d) + radius),
  ];
  const [[top, bottom], [left, right]] = [bound(y, dy), bound(x, dx)];
  const square = dx * dx + dy * dy;
  return mark(mask, size, [top, left, bottom, right], (i, j) => {
    const along = Math.min(1, Math.max(0, ((j - x) * dx + (i - y) * dy) / square));
    return (j - x - along * dx) ** 2 + (i - y - along * dy) ** 2 <= radius * radius;
  });
}
