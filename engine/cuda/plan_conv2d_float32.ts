// Float32's forward convolutions on Hopper, as products of halves (plan_float32_sm90.ts). A large image is taken by bands of rows,
// split one after another into the same workspace, which would else be as large as the image: 1 GiB for the VAE's widest at
// 1024x1024. A band has the rows above and below that its taps see, so that padding is only where the image ends.
import { divideUp, FLOAT, inTurns, type KernelLaunch, type PlanContext, type Pointers } from './plan.ts';
import { hopperConvolution } from './plan_conv2d_sm90.ts';
import { split, splitPays, splitSteps } from './plan_float32_sm90.ts';
import { hopperLaunches } from './plan_matrix_sm90.ts';
import { STEP } from './plan_sm90.ts';

/** Most bytes of an image's halves at a time; a test has fewer. */
export const band = { bytes: 128 * 2 ** 20 };

interface Band {
  /** The first image and how many, rows of y, and rows of x that they see. */
  readonly image: number;
  readonly images: number;
  readonly rows: readonly [first: number, end: number];
  readonly seen: readonly [first: number, end: number];
}

/** All images at once where they are few bytes, or bands of each. */
function bandsOf([n, h, w, c, oh, , , kh, , stride, top]: readonly number[]): Band[] {
  const bytes = h * w * c * FLOAT;
  if (n * bytes <= band.bytes) return [{ image: 0, images: n, rows: [0, oh], seen: [0, h] }];
  const height = divideUp(oh, divideUp(bytes, band.bytes));
  const bands = Array.from({ length: divideUp(oh, height) }, (_, i): Pick<Band, 'rows' | 'seen'> => {
    const [first, end] = [i * height, Math.min(oh, (i + 1) * height)];
    const seen = [Math.max(0, first * stride - top), Math.min(h, (end - 1) * stride - top + kh)] as const;
    return { rows: [first, end], seen };
  });
  return Array.from({ length: n }, (_, image) => bands.map((band) => ({ image, images: 1, ...band }))).flat();
}

/** The launches of conv2d_forward in float32; undefined where they do not pay. */
export function convolutionOfHalves(
  pointers: Pointers,
  geometry: readonly number[],
  context: PlanContext,
): KernelLaunch[] | undefined {
  const [n, h, w, c, oh, ow, o, kh, kw, , , , own] = geometry;
  if (c % 8 || o % 8 || own % 8 || pointers.some((at) => at % 16n !== 0n)) return undefined;
  const taps = kh * kw;
  const steps = splitSteps(taps * (divideUp(own, STEP) + divideUp(c - own, STEP)));
  const whole = { kind: 'split_forward', m: n * oh * ow, n: o, steps, slabs: 1 } as const;
  if (!splitPays(whole, taps * c, n * h * w * c + o * taps * c, context)) return undefined;

  const filter = split(pointers[2], o, taps * c, context);
  const operands = pointers.with(2, filter.address);
  const turn = inTurns(context);
  const launches = [filter.launch];
  for (const band of bandsOf(geometry)) {
    const made = ofBand(band, operands, geometry, turn());
    if (!made) return undefined;
    launches.push(...made);
  }
  return launches;
}

/** Of one band: the halves of the image, and of the skip connection beside it, then their product. */
function ofBand(
  { image, images, rows, seen }: Band,
  [y, x, filter, bias, shift, residual, skip]: Pointers,
  [, h, w, c, oh, ow, o, kh, kw, stride, top, left, own]: readonly number[],
  context: PlanContext,
): KernelLaunch[] | undefined {
  const before: KernelLaunch[] = [];
  const height = seen[1] - seen[0];
  const halves = (at: bigint, channels: number): bigint => {
    if (channels === 0) return at;
    const from = at + BigInt((image * h + seen[0]) * w * channels * FLOAT);
    const made = split(from, 1, images * height * w * channels, context);
    before.push(made.launch);
    return made.address;
  };
  const within = (at: bigint): bigint => at && at + BigInt((image * oh + rows[0]) * ow * o * FLOAT);
  const extras = [bias, shift && shift + BigInt(image * o * FLOAT), within(residual)];
  const operands = [within(y), halves(x, own), filter, ...extras, halves(skip, c - own)];
  const padding = [seen[0] - (rows[0] * stride - top), left];
  const size = [images, height, w, c, rows[1] - rows[0], ow, o, kh, kw, stride, ...padding, own];
  const p = hopperConvolution('conv2d_forward', operands, size, context);
  const rowsPerShift = (rows[1] - rows[0]) * ow;
  return (
    p && [...before, ...hopperLaunches(p, { strides: [o, o], canSplit: true, extras, rowsPerShift }, context)]
  );
}
