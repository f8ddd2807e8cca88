// Resizing 8-bit pictures bit for bit as Pillow does (libImaging/Resample.c), because models were trained and
// are judged on pictures resized so: a horizontal pass, then a vertical one, each a weighted sum in fixed
// point with 22 fraction bits, rounded and clipped to 8 bits in between. The filter widens when shrinking.
// "nearest" is an affine lookup instead.
import type { Pixels } from './image.ts';

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

/** `picture` resized to `width` x `height` pixels; the same size gives the same picture back. */
export function resize<P extends Pixels>(picture: P, width: number, height: number, filter: ResizeFilter): P {
  if (filter === 'nearest') return resizeNearest(picture, width, height);
  const wide = picture.width === width ? picture : resizeAxis(picture, 'width', width, filter);
  return wide.height === height ? wide : resizeAxis(wide, 'height', height, filter);
}

interface Taps {
  /** First input pixel of each output pixel. */
  first: Int32Array;
  count: Int32Array;
  /** `size` fixed-point weights for each output pixel. */
  weights: Int32Array;
  size: number;
}

function makeTaps(inputSize: number, outputSize: number, filter: Exclude<ResizeFilter, 'nearest'>): Taps {
  const { support, weight } = filters[filter];
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const size = Math.ceil(reach) * 2 + 1;
  const taps: Taps = {
    first: new Int32Array(outputSize),
    count: new Int32Array(outputSize),
    weights: new Int32Array(outputSize * size),
    size,
  };
  for (let i = 0; i < outputSize; i++) {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const count = Math.min(inputSize, Math.trunc(center + reach + 0.5)) - first;
    const exact = Array.from({ length: count }, (_, x) => weight((x + first - center + 0.5) * (1 / stretch)));
    const sum = exact.reduce((total, w) => total + w, 0);
    taps.first[i] = first;
    taps.count[i] = count;
    // Rounded half away from zero, as C's cast after adding or subtracting one half.
    exact.forEach((w, x) => {
      const scaled = (w / sum) * 2 ** precisionBits;
      taps.weights[i * size + x] = Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
  }
  return taps;
}

/** One pass. Sums are int32, as Pillow's are, which is also what JavaScript adds fastest. */
function resizeAxis<P extends Pixels>(
  picture: P,
  axis: 'width' | 'height',
  newSize: number,
  filter: Exclude<ResizeFilter, 'nearest'>,
): P {
  const taps = makeTaps(picture[axis], newSize, filter);
  const result = { ...picture, [axis]: newSize };
  const data = new Uint8ClampedArray(result.width * result.height * picture.channels);
  const rowBytes = picture.width * picture.channels;
  const newRowBytes = result.width * picture.channels;
  for (let y = 0; y < result.height; y++) {
    const out = data.subarray(y * newRowBytes, (y + 1) * newRowBytes);
    if (axis === 'height') mixRows(out, picture.data, taps, y, rowBytes);
    else mixColumns(out, picture.data.subarray(y * rowBytes, (y + 1) * rowBytes), taps, picture.channels);
  }
  return { ...result, data: new Uint8Array(data.buffer) };
}

const half = 1 << (precisionBits - 1);

/** Row `y` of the result: a weighted sum of whole rows. */
function mixRows(out: Uint8ClampedArray, data: Uint8Array, taps: Taps, y: number, rowBytes: number): void {
  const sums = new Int32Array(rowBytes).fill(half);
  for (let k = 0; k < taps.count[y]; k++) {
    const weight = taps.weights[y * taps.size + k];
    const row = (taps.first[y] + k) * rowBytes;
    for (let i = 0; i < rowBytes; i++) sums[i] += data[row + i] * weight;
  }
  for (let i = 0; i < rowBytes; i++) out[i] = sums[i] >> precisionBits;
}

/** One row: each pixel a weighted sum of its neighbours. */
function mixColumns(out: Uint8ClampedArray, row: Uint8Array, taps: Taps, channels: number): void {
  const { first, count, weights, size } = taps;
  for (let c = 0; c < channels; c++) {
    for (let x = 0, at = c; at < out.length; x++, at += channels) {
      let sum = half;
      let from = first[x] * channels + c;
      const end = x * size + count[x];
      for (let k = x * size; k < end; k++, from += channels) sum = (sum + row[from] * weights[k]) | 0;
      out[at] = sum >> precisionBits;
    }
  }
}

function resizeNearest<P extends Pixels>(picture: P, width: number, height: number): P {
  const { channels } = picture;
  const columns = nearestIndices(picture.width, width);
  const rows = nearestIndices(picture.height, height);
  const data = new Uint8Array(width * height * channels);
  let at = 0;
  for (const row of rows) {
    for (const column of columns) {
      const from = (row * picture.width + column) * channels;
      for (let c = 0; c < channels; c++) data[at++] = picture.data[from + c];
    }
  }
  return { ...picture, width, height, data };
}

/**
 * Pillow steps by adding the scale up rather than multiplying, which at exact pixel borders decides the
 * pixel.
 */
function nearestIndices(inputSize: number, outputSize: number): Int32Array {
  const scale = inputSize / outputSize;
  let position = scale * 0.5;
  return Int32Array.from({ length: outputSize }, () => {
    const index = Math.min(inputSize - 1, Math.trunc(position));
    position += scale;
    return index;
  });
}
