// Convolution of [n, h, w, c] with weight [o, kh, kw, c]: implicit GEMM, zero padding given side by side (the VAE's
// encoder pads right and bottom only). Epilogue: bias, a per-image channel shift (the time embedding) and a residual.
import { apply, defineOp, type RefTensors, type Sample, sameFloat } from '../op.ts';
import { empty, ShapeError, type Tensor } from '../tensor.ts';
import { addScaled, dotAt } from './runs.ts';
import { awkwardSizes } from './samples.ts';
import { joinedReference, launchPlace, launchSlice, partsOf, shapeBeside } from './skip.ts';

/** [top, left, bottom, right], in pixels. */
export type Padding = readonly [number, number, number, number];

interface ConvAttrs {
  stride: number;
  padding: Padding;
}

/** The kernels' integers: n h w c, oh ow o, kh kw, stride, top, left. */
function dims(x: readonly number[], weight: readonly number[], { stride, padding }: ConvAttrs) {
  const [n, h, w, c] = x;
  const [o, kh, kw] = weight;
  const [top, left, bottom, right] = padding;
  const oh = Math.floor((h + top + bottom - kh) / stride) + 1;
  const ow = Math.floor((w + left + right - kw) / stride) + 1;
  return { n, h, w, c, oh, ow, o, kh, kw, stride, top, left };
}

const integers = (x: readonly number[], weight: readonly number[], attrs: ConvAttrs) =>
  Object.values(dims(x, weight, attrs));

const convOp = defineOp<ConvAttrs>({
  name: 'conv2d',
  outputs(t, attrs) {
    const { weight, bias, shift, residual } = t;
    const x = shapeBeside('conv2d', t.x, t.skip);
    if (x.length !== 4 || weight.shape.length !== 4 || weight.shape[3] !== x[3]) {
      throw new ShapeError(
        `conv2d: weight [${weight.shape}] takes ${weight.shape[3]} input channels, x [${x}] has ${x[3]}`,
      );
    }
    const { n, oh, ow, o } = dims(x, weight.shape, attrs);
    const shape = [n, oh, ow, o];
    if (oh < 1 || ow < 1)
      throw new ShapeError(`conv2d: x [${x}] is smaller than the kernel [${weight.shape}]`);
    if (bias && bias.size !== o)
      throw new ShapeError(`conv2d: bias [${bias.shape}] for ${o} output channels`);
    if (shift && shift.shape.join() !== [n, o].join())
      throw new ShapeError(`conv2d: shift [${shift.shape}] is not [${n},${o}]`);
    if (residual && residual.shape.join() !== shape.join()) {
      throw new ShapeError(`conv2d: residual [${residual.shape}] is added to y [${shape}]`);
    }
    return {
      y: { shape, dtype: sameFloat('conv2d', t, 'x', 'skip', 'weight', 'bias', 'shift', 'residual') },
    };
  },
  saves: ['x', 'skip', 'weight'],
  passes: ['residual'],
  flops({ x, weight }, attrs) {
    const { n, oh, ow } = dims(x.shape, weight.shape, attrs);
    return 2 * n * oh * ow * weight.size;
  },
  forward(t, attrs, launch) {
    const ints = integers(shapeBeside('conv2d', t.x, t.skip), t.weight.shape, attrs);
    const extras = [t.bias, t.shift, t.residual, t.skip];
    launch('conv2d_forward', [t.y, t.x, t.weight, ...extras, ...ints, t.x.shape[3]]);
  },
  backward(t, attrs, launch) {
    const [n, oh, ow, o] = t.dy.shape;
    for (const { name, part, start } of partsOf(t.x, t.skip)) {
      const shape = [...t.weight.shape.slice(0, 3), part.shape[3]];
      const ints = integers(part.shape, shape, attrs);
      const own = () => (t.skip ? empty(shape, { device: part.device, dtype: part.dtype }) : undefined);
      const dx = t[`d${name}`];
      if (dx) {
        const weight = own();
        if (weight) launchSlice(launch, t.weight, weight, start);
        launch('conv2d_backward_x', [dx, t.dy, weight ?? t.weight, ...ints]);
      }
      if (t.dweight) {
        const dweight = own();
        launch('conv2d_backward_weight', [dweight ?? t.dweight, t.dy, part, ...ints]);
        if (dweight) launchPlace(launch, t.dweight, dweight, start);
      }
    }
    if (t.dbias) launch('sum_forward', [t.dbias, t.dy, 1, n * oh * ow, o]);
    if (t.dshift) launch('sum_forward', [t.dshift, t.dy, n, oh * ow, o]);
  },
  reference: {
    forward: (tensors, attrs) =>
      joinedReference(tensors, (t) => {
        const { y, bias, shift, residual } = t;
        const { oh, ow, o } = dims(t.x.shape, t.weight.shape, attrs);
        for (let i = 0; i < y.data.length; i++) {
          const [image, channel] = [Math.floor(i / (oh * ow * o)), i % o];
          y.data[i] =
            (bias?.data[channel] ?? 0) + (shift?.data[image * o + channel] ?? 0) + (residual?.data[i] ?? 0);
        }
        const [x, weight, sums] = [t.x.data, t.weight.data, y.data];
        eachTap(t, attrs, (iy, ix, iw, c) => {
          sums[iy] += dotAt(x, ix, weight, iw, c);
        });
      }),
    backward: (tensors, attrs) =>
      joinedReference(tensors, (t) => {
        const { dy, dx, dweight, dbias, dshift, dresidual } = t;
        const { oh, ow, o } = dims(t.x.shape, t.weight.shape, attrs);
        for (const gradient of [dx, dweight, dbias, dshift]) gradient?.data.fill(0);
        dresidual?.data.set(dy.data);
        for (let i = 0; i < dy.data.length; i++) {
          if (dbias) dbias.data[i % o] += dy.data[i];
          if (dshift) dshift.data[Math.floor(i / (oh * ow * o)) * o + (i % o)] += dy.data[i];
        }
        eachTap(t, attrs, (iy, ix, iw, c) => {
          if (dx) addScaled(dx.data, ix, dy.data[iy], t.weight.data, iw, c);
          if (dweight) addScaled(dweight.data, iw, dy.data[iy], t.x.data, ix, c);
        });
      }),
  },
  samples: [
    { inputs: { x: [1, 3, 3, 2], weight: [3, 3, 3, 2] }, attrs: { stride: 1, padding: [1, 1, 1, 1] } },
    {
      inputs: { x: [2, 6, 5, 4], weight: [9, 3, 3, 4], bias: [9], shift: [2, 9], residual: [2, 6, 5, 9] },
      attrs: { stride: 1, padding: [1, 1, 1, 1] },
    },
    {
      inputs: { x: [1, 7, 8, 5], weight: [4, 3, 3, 5], bias: [4] },
      attrs: { stride: 2, padding: [1, 1, 1, 1] },
    },
    {
      inputs: { x: [2, 6, 8, 3], weight: [8, 3, 3, 3], bias: [8] },
      attrs: { stride: 2, padding: [0, 0, 1, 1] },
    },
    {
      inputs: { x: [2, 4, 4, 16], weight: [7, 1, 1, 16], bias: [7] },
      attrs: { stride: 1, padding: [0, 0, 0, 0] },
    },
    { inputs: { x: [1, 5, 9, 18], weight: [33, 3, 3, 18] }, attrs: { stride: 1, padding: [1, 1, 1, 1] } },
    // Wide enough that taps side by side are read as one run.
    { inputs: { x: [2, 2, 33, 12], weight: [5, 3, 3, 12] }, attrs: { stride: 1, padding: [1, 1, 1, 1] } },
    { inputs: { x: [1, 3, 66, 12], weight: [3, 3, 3, 12] }, attrs: { stride: 2, padding: [0, 0, 1, 1] } },
    { inputs: { x: [1, 2, 35, 7], weight: [2, 5, 5, 7] }, attrs: { stride: 1, padding: [2, 2, 2, 2] } },
    skipSample([2, 5, 6, 24], 8, [20, 1, 1], true),
    skipSample([1, 4, 5, 6], 7, [9, 3, 3], false),
    skipSample([2, 3, 3, 3], 10, [5, 1, 1], true),
    skipSample([1, 4, 34, 32], 40, [8, 3, 3], false),
    ...awkwardSizes.map(([c, o], i) => {
      const [n, h, w] = [1 + (i % 2), 3 + (i % 5), 3 + (i % 7)];
      const [k, stride] = [[3, 3, 1, 3, 5][i % 5], 1 + (i % 3 > 1 ? 1 : 0)];
      const p = k >> 1;
      const padding: Padding = i % 4 === 3 ? [0, 0, 1, 1] : [p, p, p, p];
      const { oh, ow } = dims([n, h, w, c], [o, k, k, c], { stride, padding });
      const more = { bias: [o], shift: [n, o], residual: [n, oh, ow, o] };
      const inputs = { x: [n, h, w, c], weight: [o, k, k, c], ...(i % 2 ? more : {}) };
      return { inputs, attrs: { stride, padding } };
    }),
  ],
});

function skipSample(
  x: readonly number[],
  beside: number,
  [o, kh, kw]: readonly number[],
  more: boolean,
): Sample<ConvAttrs> {
  const [n, h, w, c] = x;
  const extras: Record<string, readonly number[]> = more ? { bias: [o], residual: [n, h, w, o] } : {};
  const inputs = { x, skip: [n, h, w, beside], weight: [o, kh, kw, c + beside], ...extras };
  return { inputs, attrs: { stride: 1, padding: [kh >> 1, kw >> 1, kh >> 1, kw >> 1] } };
}

/** Visits what a pixel of x gives to a number of y, products over `c` channels, with the flat indexes in y, x and weight. */
function eachTap(
  t: RefTensors,
  attrs: ConvAttrs,
  visit: (iy: number, ix: number, iw: number, c: number) => void,
): void {
  const { n, h, w, c, oh, ow, o, kh, kw, stride, top, left } = dims(t.x.shape, t.weight.shape, attrs);
  for (let image = 0; image < n; image++)
    for (let i = 0; i < oh; i++)
      for (let j = 0; j < ow; j++)
        for (let p = 0; p < kh; p++)
          for (let q = 0; q < kw; q++) {
            const [row, column] = [i * stride + p - top, j * stride + q - left];
            if (row < 0 || row >= h || column < 0 || column >= w) continue;
            const ix = ((image * h + row) * w + column) * c;
            const iy = ((image * oh + i) * ow + j) * o;
            for (let k = 0; k < o; k++) visit(iy + k, ix, ((k * kh + p) * kw + q) * c, c);
          }
}

/**
 * x [n,h,w,c], weight [o,kh,kw,c], bias [o], shift [n,o], residual [n,oh,ow,o] → [n,oh,ow,o]. With `skip` [n,h,w,cs]
 * beside x, as skip.ts says, weight is [o,kh,kw,c+cs].
 */
export function conv2d(
  x: Tensor,
  weight: Tensor,
  bias?: Tensor,
  options: { stride?: number; padding?: Padding; shift?: Tensor; residual?: Tensor; skip?: Tensor } = {},
): Tensor {
  const { stride = 1, padding = [0, 0, 0, 0], shift, residual, skip } = options;
  return apply(convOp, { x, skip, weight, bias, shift, residual }, { stride, padding });
}
