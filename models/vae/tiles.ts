// Large pictures in overlapping tiles, computed one by one to keep memory low, and joined on the host in diffusers' two ways. Its
// AutoencoderKL fades each tile's top and left edges from the tile above and to the left over `extent` pixels, then takes the tile's
// first `keep` rows and columns. Its AutoencoderTiny paints each tile over those before it.
import { slice } from '../../engine/ops/move.ts';
import { scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';

/** A tile on the host: [n, h, w, c]. */
export interface Tile {
  shape: readonly number[];
  data: Float32Array;
}

const tileStarts = (length: number, stride: number): number[] =>
  Array.from({ length: Math.ceil(length / stride) }, (_, i) => i * stride);

/** What `body` makes of each tile of x [n, h, w, c]; rows[i][j] begins at (i, j) times `stride`, and those at the end are smaller. */
export function tilesOf(x: Tensor, tile: number, stride: number, body: (part: Tensor) => Tensor): Tile[][] {
  const [, height, width] = x.shape;
  return tileStarts(height, stride).map((top) =>
    tileStarts(width, stride).map((left) =>
      scope(() => {
        const strip = slice(x, 1, top, Math.min(tile, height - top));
        const y = body(slice(strip, 2, left, Math.min(tile, width - left)));
        return { shape: y.shape, data: y.floats() };
      }),
    ),
  );
}

const at = (tile: Tile, image: number, row: number, column: number): number => {
  const [, h, w, c] = tile.shape;
  return ((image * h + row) * w + column) * c;
};

/** Fades the first rows of `tile` from the last rows of `above` (axis 1), or columns from the left (axis 2). */
function fade(from: Tile, tile: Tile, axis: 1 | 2, extent: number): void {
  const [n, , , c] = tile.shape;
  const span = Math.min(from.shape[axis], tile.shape[axis], extent);
  const other = Math.min(from.shape[3 - axis], tile.shape[3 - axis]);
  for (let image = 0; image < n; image++)
    for (let i = 0; i < span; i++)
      for (let j = 0; j < other; j++) {
        const source = from.shape[axis] - span + i;
        const a = axis === 1 ? at(from, image, source, j) : at(from, image, j, source);
        const b = axis === 1 ? at(tile, image, i, j) : at(tile, image, j, i);
        for (let k = 0; k < c; k++)
          tile.data[b + k] = from.data[a + k] * (1 - i / span) + tile.data[b + k] * (i / span);
      }
}

/** rows[i][j] is the tile at (i, j); every tile gives at most keep × keep pixels. */
export function blendTiles(rows: readonly (readonly Tile[])[], extent: number, keep: number): Tile {
  rows.forEach((row, i) => {
    row.forEach((tile, j) => {
      if (i > 0) fade(rows[i - 1][j], tile, 1, extent);
      if (j > 0) fade(row[j - 1], tile, 2, extent);
    });
  });
  const heights = rows.map((row) => Math.min(keep, row[0].shape[1]));
  const widths = rows[0].map((tile) => Math.min(keep, tile.shape[2]));
  const [n, , , c] = rows[0][0].shape;
  const total = (lengths: readonly number[]) => lengths.reduce((a, b) => a + b, 0);
  const joined: Tile = {
    shape: [n, total(heights), total(widths), c],
    data: new Float32Array(n * total(heights) * total(widths) * c),
  };
  rows.forEach((row, i) => {
    row.forEach((tile, j) => {
      for (let image = 0; image < n; image++)
        for (let y = 0; y < heights[i]; y++) {
          const source = at(tile, image, y, 0);
          const target = at(joined, image, total(heights.slice(0, i)) + y, total(widths.slice(0, j)));
          joined.data.set(tile.data.subarray(source, source + widths[j] * c), target);
        }
    });
  });
  return joined;
}

/**
 * Paints tile (i, j) at (i, j) times `stride`, in the order of reading. Where others lie before it, its first `extent` rows and
 * columns come up from nothing to all.
 */
export function paintTiles(rows: readonly (readonly Tile[])[], stride: number, extent: number): Tile {
  const [n, , , c] = rows[0][0].shape;
  const length = (axis: 1 | 2, tiles: readonly Tile[]) =>
    (tiles.length - 1) * stride + tiles[tiles.length - 1].shape[axis];
  const [h, w] = [
    length(
      1,
      rows.map((row) => row[0]),
    ),
    length(2, rows[0]),
  ];
  const out: Tile = { shape: [n, h, w, c], data: new Float32Array(n * h * w * c) };
  const share = (first: boolean, at: number) => (first ? 1 : Math.min(1, at / (extent - 1)));
  rows.forEach((row, i) => {
    row.forEach((tile, j) => {
      for (let image = 0; image < n; image++)
        for (let y = 0; y < tile.shape[1]; y++)
          for (let x = 0; x < tile.shape[2]; x++) {
            const opaque = share(i === 0, y) * share(j === 0, x);
            const [from, to] = [at(tile, image, y, x), at(out, image, i * stride + y, j * stride + x)];
            for (let k = 0; k < c; k++)
              out.data[to + k] = opaque * tile.data[from + k] + (1 - opaque) * out.data[to + k];
          }
    });
  });
  return out;
}
