// Joining overlapping tiles as diffusers' AutoencoderKL does: each tile's top and left edges are faded from the tile
// above and to the left over `extent` pixels, then each tile gives its first `keep` rows and columns. On the host: it
// runs once per image, and the tiles were computed one by one to keep memory low.

/** A tile on the host: [n, h, w, c]. */
export interface Tile {
  shape: readonly number[];
  data: Float32Array;
}

export function tileStarts(length: number, stride: number): number[] {
  return Array.from({ length: Math.ceil(length / stride) }, (_, i) => i * stride);
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
