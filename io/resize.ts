// Resizing 8-bit pictures bit for bit as Pillow does (libImaging/Resample.c), because models were trained and
// are judged on pictures resized so: a horizontal pass, then a vertical one, each a weighted sum in fixed
// point with 22 fraction bits, rounded and clipped to 8 bits in between. The filter widens when shrinking.
// "nearest" is an affine lookup instead.
import type { Pixels } from './pixels.ts';

export type ResizeFilter = 'lanczos' | 'bicubic' | 'bilinear' | 'nearest';

const precisionBits = 32 - 8 - 2;

const sinc = (x: number): number => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

function bicubic(x: number): number {
  const a = -0.5;
  const d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
}

const filters: Record<
  Exclude<ResizeFilter, 'nearest'>,
  { support: number; weight: (x: number) => number }
> = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: bicubic },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** A part of the resized picture, in its pixels. */
export interface Window {
  left: number;
  top: number;
  width: number;
  height: number;
}

/**
 * `picture` resized to `width` x `height` pixels, or of that only the `window`: nothing outside is computed, so that even a
 * picture that is all width can be cut from. The same size gives the same picture back.
 */
export function resize<P extends Pixels>(
  picture: P,
  width: number,
  height: number,
  filter: ResizeFilter,
  window: Window = { left: 0, top: 0, width, height },
): P {
  const isSame = picture.width === width && picture.height === height;
  if (isSame && window.width === width && window.height === height) return picture;
  if (filter === 'nearest') return resizeNearest(picture, width, height, window);
  const down = makeTaps(picture.height, height, window.top, window.height, filter);
  const across = makeTaps(picture.width, width, window.left, window.width, filter);
  return mixRows(mixColumns(rowsUnder(picture, down), across), down);
}

interface Taps {
  /** First input pixel of each output pixel. */
  first: Int32Array;
  count: Int32Array;
  /** `size` fixed-point weights for each output pixel. */
  weights: Int32Array;
  size: number;
}

/** What an output pixel takes: weights, whose sum is 1, of input pixels from `first` on. */
export interface Mix {
  first: number;
  weights: readonly number[];
}

/**
 * The i-th of `outputSize` pixels under a filter that widens when shrinking: also what torch's interpolate takes with
 * `antialias`.
 */
export function mixOf(
  i: number,
  inputSize: number,
  outputSize: number,
  filter: Exclude<ResizeFilter, 'nearest'>,
): Mix {
  const { support, weight } = filters[filter];
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const center = (i + 0.5) * scale;
  const first = Math.max(0, Math.trunc(center - reach + 0.5));
  const count = Math.min(inputSize, Math.trunc(center + reach + 0.5)) - first;
  const exact = Array.from({ length: count }, (_, x) => weight((x + first - center + 0.5) * (1 / stretch)));
  const sum = exact.reduce((total, w) => total + w, 0);
  return { first, weights: exact.map((w) => w / sum) };
}

/** The taps of `length` output pixels from `begin` on. */
function makeTaps(
  inputSize: number,
  outputSize: number,
  begin: number,
  length: number,
  filter: Exclude<ResizeFilter, 'nearest'>,
): Taps {
  const reach = filters[filter].support * Math.max(inputSize / outputSize, 1);
  const size = Math.ceil(reach) * 2 + 1;
  const taps: Taps = {
    first: new Int32Array(length),
    count: new Int32Array(length),
    weights: new Int32Array(length * size),
    size,
  };
  for (let i = 0; i < length; i++) {
    const { first, weights } = mixOf(begin + i, inputSize, outputSize, filter);
    taps.first[i] = first;
    taps.count[i] = weights.length;
    // Rounded half away from zero, as C's cast after adding or subtracting one half.
    weights.forEach((w, x) => {
      const scaled = w * 2 ** precisionBits;
      taps.weights[i * size + x] = Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
  }
  return taps;
}

/** The input rows that the vertical pass will read; its taps count from the first of them then. */
function rowsUnder<P extends Pixels>(picture: P, { first, count }: Taps): P {
  const begin = first[0];
  const end = first[first.length - 1] + count[count.length - 1];
  const rowBytes = picture.width * picture.channels;
  for (let i = 0; i < first.length; i++) first[i] -= begin;
  return { ...picture, height: end - begin, data: picture.data.subarray(begin * rowBytes, end * rowBytes) };
}

const half = 1 << (precisionBits - 1);

// Sums are int32, as Pillow's are, which is also what JavaScript adds fastest.

/** The horizontal pass: each pixel a weighted sum of its neighbours in the row. */
const mixColumns = <P extends Pixels>(picture: P, taps: Taps): P =>
  picture.channels === 3 ? mixColumnsOfColours(picture, taps) : mixColumnsOfAny(picture, taps);

/** Three channels at once: a weight is read once for them, which halves the time. */
function mixColumnsOfColours<P extends Pixels>(picture: P, { first, count, weights, size }: Taps): P {
  const { height, data } = picture;
  const width = first.length;
  const out = new Uint8ClampedArray(width * height * 3);
  let at = 0;
  for (let y = 0; y < height; y++) {
    const row = y * picture.width * 3;
    for (let x = 0; x < width; x++, at += 3) {
      let [red, green, blue] = [half, half, half];
      let from = row + first[x] * 3;
      const end = x * size + count[x];
      for (let k = x * size; k < end; k++, from += 3) {
        const weight = weights[k];
        red = (red + Math.imul(data[from], weight)) | 0;
        green = (green + Math.imul(data[from + 1], weight)) | 0;
        blue = (blue + Math.imul(data[from + 2], weight)) | 0;
      }
      out[at] = red >> precisionBits;
      out[at + 1] = green >> precisionBits;
      out[at + 2] = blue >> precisionBits;
    }
  }
  return { ...picture, width, data: new Uint8Array(out.buffer) };
}

function mixColumnsOfAny<P extends Pixels>(picture: P, { first, count, weights, size }: Taps): P {
  const { channels, height, data } = picture;
  const width = first.length;
  const out = new Uint8ClampedArray(width * height * channels);
  for (let y = 0; y < height; y++) {
    const row = y * picture.width * channels;
    for (let c = 0; c < channels; c++) {
      let at = y * width * channels + c;
      for (let x = 0; x < width; x++, at += channels) {
        let sum = half;
        let from = row + first[x] * channels + c;
        const end = x * size + count[x];
        for (let k = x * size; k < end; k++, from += channels) sum = (sum + data[from] * weights[k]) | 0;
        out[at] = sum >> precisionBits;
      }
    }
  }
  return { ...picture, width, data: new Uint8Array(out.buffer) };
}

/** The vertical pass: each row a weighted sum of whole rows. */
function mixRows<P extends Pixels>(picture: P, { first, count, weights, size }: Taps): P {
  const { data } = picture;
  const rowBytes = picture.width * picture.channels;
  const height = first.length;
  const out = new Uint8ClampedArray(rowBytes * height);
  const sums = new Int32Array(rowBytes);
  for (let y = 0; y < height; y++) {
    sums.fill(half);
    for (let k = 0; k < count[y]; k++) {
      const weight = weights[y * size + k];
      const row = data.subarray((first[y] + k) * rowBytes, (first[y] + k + 1) * rowBytes);
      for (let i = 0; i < rowBytes; i++) sums[i] += Math.imul(row[i], weight);
    }
    for (let i = 0; i < rowBytes; i++) out[y * rowBytes + i] = sums[i] >> precisionBits;
  }
  return { ...picture, height, data: new Uint8Array(out.buffer) };
}

function resizeNearest<P extends Pixels>(picture: P, width: number, height: number, window: Window): P {
  const { channels } = picture;
  const columns = nearestIndices(picture.width, width, window.left, window.width);
  const rows = nearestIndices(picture.height, height, window.top, window.height);
  const data = new Uint8Array(window.width * window.height * channels);
  let at = 0;
  for (const row of rows) {
    for (const column of columns) {
      const from = (row * picture.width + column) * channels;
      for (let c = 0; c < channels; c++) data[at++] = picture.data[from + c];
    }
  }
  return { ...picture, width: window.width, height: window.height, data };
}

/**
 * Of the input pixels that the output pixels take, `length` from `begin` on. Pillow steps by adding the scale up rather than
 * multiplying, which at exact pixel borders decides the pixel.
 */
function nearestIndices(inputSize: number, outputSize: number, begin: number, length: number): Int32Array {
  const scale = inputSize / outputSize;
  const indices = new Int32Array(length);
  let position = scale * 0.5;
  for (let i = 0; i < begin + length; i++) {
    if (i >= begin) indices[i - begin] = Math.min(inputSize - 1, Math.trunc(position));
    position += scale;
  }
  return indices;
}
