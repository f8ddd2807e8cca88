// An image and a skip connection beside it (Ronneberger et al. 2015), taken by conv2d and group_norm as one image [..., c] whose
// first channels are x's and whose last are skip's. Forward reads both where they lie, so the joined image is never made;
// backward, where time matters less than one more form of every gradient, joins or splits copies.
import type { Launch, RefTensor, RefTensors, Tensors } from '../op.ts';
import { empty, ShapeError, sizeOf, type Tensor } from '../tensor.ts';

type Sized = { readonly shape: readonly number[] };

const channelsOf = ({ shape }: Sized): number => shape.at(-1) as number;
const pixelsOf = ({ shape }: Sized): number => sizeOf(shape.slice(0, -1));

/** The shape of x and what may lie beside it. */
export function shapeBeside(op: string, x: Sized, skip: Sized | undefined): readonly number[] {
  if (!skip) return x.shape;
  const [image, beside] = [x.shape.slice(0, -1), skip.shape.slice(0, -1)];
  if (image.join() !== beside.join())
    throw new ShapeError(`${op}: x [${x.shape}] and skip [${skip.shape}] differ outside their channels`);
  return [...image, channelsOf(x) + channelsOf(skip)];
}

/** x and skip with the number of the first channel of each. */
export const partsOf = (
  x: Tensor,
  skip: Tensor | undefined,
): { name: string; part: Tensor; start: number }[] => [
  { name: 'x', part: x, start: 0 },
  ...(skip ? [{ name: 'skip', part: skip, start: channelsOf(x) }] : []),
];

/** Channels [start, start + those of `to`) of `whole`. */
export function launchSlice(launch: Launch, whole: Tensor, to: Tensor, start: number): void {
  launch('slice_forward', [to, whole, pixelsOf(whole), channelsOf(whole), start, channelsOf(to), 1]);
}

/** The same the other way: fills channels of `whole`. */
export function launchPlace(launch: Launch, whole: Tensor, from: Tensor, start: number): void {
  launch('place_forward', [whole, from, pixelsOf(whole), channelsOf(whole), start, channelsOf(from), 1]);
}

/** x and skip as one tensor. */
export function launchJoined(launch: Launch, x: Tensor, skip: Tensor): Tensor {
  const whole = empty(shapeBeside('join', x, skip), { device: x.device, dtype: x.dtype });
  for (const { part, start } of partsOf(x, skip)) launchPlace(launch, whole, part, start);
  return whole;
}

/** The gradients of x and skip, where they are wanted, from that of both. */
export function launchGradients(launch: Launch, t: Tensors, dwhole: Tensor): void {
  for (const { name, start } of partsOf(t.x, t.skip)) {
    const gradient = t[`d${name}`];
    if (gradient) launchSlice(launch, dwhole, gradient, start);
  }
}

/** Runs reference loops that know x alone over x and skip as one. */
export function joinedReference(t: RefTensors, run: (t: RefTensors) => void): void {
  const { x, skip, dx, dskip } = t;
  if (!skip) {
    run(t);
    return;
  }
  const shape = shapeBeside('join', x, skip);
  const [own, c] = [channelsOf(x), shape.at(-1) as number];
  const size = pixelsOf(x) * c;
  const blank = (): RefTensor => ({
    shape,
    data: x.data instanceof Float64Array ? new Float64Array(size) : new Float32Array(size),
  });
  const [whole, dwhole] = [blank(), blank()];
  const each = (visit: (all: number, at: number, part: 'x' | 'skip') => void) => {
    for (let i = 0; i < whole.data.length; i++) {
      const [pixel, k] = [Math.floor(i / c), i % c];
      if (k < own) visit(i, pixel * own + k, 'x');
      else visit(i, pixel * (c - own) + k - own, 'skip');
    }
  };
  each((all, at, part) => {
    whole.data[all] = t[part].data[at];
  });
  run({ ...t, x: whole, ...(dx || dskip ? { dx: dwhole } : {}) });
  each((all, at, part) => {
    const gradient = t[`d${part}`];
    if (gradient) gradient.data[at] = dwhole.data[all];
  });
}
