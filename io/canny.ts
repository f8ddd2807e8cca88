// The edges of a picture (Canny 1986), white on black, pixel for pixel as OpenCV's Canny(picture, low, high) finds them: a gradient by
// Sobel over 3 x 3 pixels, of the channel where it is largest, measured as |dx| + |dy|; of it what is largest across its edge, in one of
// four directions told apart in fixed point; and of that what is above the higher threshold, with what is above the lower one and hangs on
// to it. Which of the two comes first says nothing, as there.
import type { Picture } from './pixels.ts';

export type Thresholds = readonly [low: number, high: number];

/** tan(22.5 degrees) with 15 bits behind the point. */
const TAN_22 = Math.round((Math.SQRT2 - 1) * 2 ** 15);

/** The edges of a picture, white on black, as OpenCV's Canny finds them: for a ControlNet or a T2I-Adapter of edges. */
export function canny(picture: Picture, thresholds: Thresholds): Picture {
  const { width, height } = picture;
  const [low, high] = [Math.min(...thresholds), Math.max(...thresholds)].map(Math.floor);
  const { dx, dy, size } = gradients(picture);
  const wide = width + 2; // a pixel around, where nothing is
  const edge = new Uint8Array(wide * (height + 2));
  const [weak, strong] = [1, 2];
  const found: number[] = [];
  for (let y = 0; y < height; y++)
    for (let x = 0, i = (y + 1) * wide + 1; x < width; x++, i++) {
      if (size[i] <= low || !isPeak(size, i, wide, dx[y * width + x], dy[y * width + x])) continue;
      edge[i] = size[i] > high ? strong : weak;
      if (edge[i] === strong) found.push(i);
    }
  const around = [-wide - 1, -wide, -wide + 1, -1, 1, wide - 1, wide, wide + 1];
  for (let i = found.pop(); i !== undefined; i = found.pop())
    for (const step of around)
      if (edge[i + step] === weak) {
        edge[i + step] = strong;
        found.push(i + step);
      }
  const data = new Uint8Array(width * height * 3);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (edge[(y + 1) * wide + x + 1] === strong)
        data.fill(255, 3 * (y * width + x), 3 * (y * width + x) + 3);
  return { width, height, channels: 3, data };
}

/** Gradients of the channel that has the largest, and their size, which has a pixel of nothing around it. Pixels at the border repeat. */
function gradients({ width, height, data }: Picture) {
  const [dx, dy] = [new Int16Array(width * height), new Int16Array(width * height)];
  const size = new Int32Array((width + 2) * (height + 2));
  for (let y = 0; y < height; y++) {
    const [above, row, below] = [Math.max(y - 1, 0), y, Math.min(y + 1, height - 1)].map(
      (r) => 3 * r * width,
    );
    for (let x = 0; x < width; x++) {
      const [left, here, right] = [3 * Math.max(x - 1, 0), 3 * x, 3 * Math.min(x + 1, width - 1)];
      let most = -1;
      for (let c = 0; c < 3; c++) {
        const [nw, ne] = [data[above + left + c], data[above + right + c]];
        const [sw, se] = [data[below + left + c], data[below + right + c]];
        const across = ne - nw + 2 * (data[row + right + c] - data[row + left + c]) + se - sw;
        const down = sw - nw + 2 * (data[below + here + c] - data[above + here + c]) + se - ne;
        const length = Math.abs(across) + Math.abs(down);
        if (length <= most) continue;
        most = length;
        dx[y * width + x] = across;
        dy[y * width + x] = down;
      }
      size[(y + 1) * (width + 2) + x + 1] = most;
    }
  }
  return { dx, dy, size };
}

/** Whether the gradient at `i` is the largest of the three that lie in its direction. */
function isPeak(size: Int32Array, i: number, wide: number, dx: number, dy: number): boolean {
  const here = size[i];
  const [x, y] = [Math.abs(dx), Math.abs(dy) * 2 ** 15];
  const flat = x * TAN_22;
  if (y < flat) return here > size[i - 1] && here >= size[i + 1];
  if (y > flat + x * 2 ** 16) return here > size[i - wide] && here >= size[i + wide];
  const side = (dx ^ dy) < 0 ? -1 : 1;
  return here > size[i - wide - side] && here > size[i + wide + side];
}
