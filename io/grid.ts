// Several pictures as one.
import { lay, type Picture } from './pixels.ts';

/** Pixels between pictures. */
const gap = 4;

/** Pictures in rows on white, each row as high as its highest picture. */
export function grid(rows: readonly (readonly Picture[])[]): Picture {
  const across = (row: readonly Picture[]) => row.reduce((sum, { width }) => sum + width + gap, gap);
  const down = (row: readonly Picture[]) => row.reduce((most, { height }) => Math.max(most, height), 0);
  const width = Math.max(gap, ...rows.map(across));
  const height = rows.reduce((sum, row) => sum + down(row) + gap, gap);
  const sheet = whitePicture(width, height);
  let top = gap;
  for (const row of rows) {
    let left = gap;
    for (const picture of row) {
      lay(sheet, picture, left, top);
      left += picture.width + gap;
    }
    top += down(row) + gap;
  }
  return sheet;
}

export const whitePicture = (width: number, height: number): Picture => ({
  ...{ width, height, channels: 3 },
  data: new Uint8Array(3 * width * height).fill(255),
});
