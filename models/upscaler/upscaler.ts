// Pictures enlarged by a network (rrdbnet.ts), as A1111's and stable-diffusion.cpp's upscalers: in tiles, one after the other, so that
// memory does not grow with the picture. A tile is computed with a margin of what lies around it, which is cut off again, as
// Real-ESRGAN's own program does; where there is nothing around it the network's zero padding stands, but for patterns, around which
// their other side lies. Always in float32: bytes of smooth skies would show bfloat16's steps.
import type { Seamless } from '../../engine/circular.ts';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import { isWhollyFinite } from '../../engine/ops/optimizer.ts';
import { toPixels } from '../../engine/ops/pixels.ts';
import { scale } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import { loadAndClose } from '../checkpoint/weights.ts';
import { rrdbnet } from './rrdbnet.ts';
import type { UpscalerSource } from './rrdbnet_file.ts';

/** How a picture is enlarged. */
export interface Enlarging {
  /** The axes along which the picture goes on at its other side. */
  seamless?: Seamless;
  /** Hears of each tile. */
  onTile?(done: number, all: number): void;
}

/** A network that enlarges pictures, loaded. It holds the device's memory until `release`. */
export interface Upscaler {
  /** How many times as wide and high a picture becomes. */
  readonly scale: number;
  /** @throws UserError where the network gives what is not finite */
  enlarge(picture: Picture, enlarging?: Enlarging): Picture;
  release(): void;
}

/** How many times as large `config` makes a picture. */
export const scaleOf = ({ doublings, unshuffle }: UpscalerSource['config']): number =>
  2 ** doublings / unshuffle;

/** In pixels of the picture: the longest side of a tile without its margin, and that. Squares that come as one lie in both whole. */
const LONGEST = 384;
const MARGIN = 16;

/** Loads the network. The caller releases it. */
export function openUpscaler({ path, config, weights }: UpscalerSource, device: Device): Upscaler {
  const network = rrdbnet(config);
  loadAndClose(network, weights(), device, 'float32');
  const times = scaleOf(config);
  const enlargeTile = (picture: Picture, down: Span, across: Span): Uint8Array =>
    noGrad(() =>
      scope(() => {
        const { data, shape } = squaresOf(picture, down, across, config.unshuffle);
        const y = network(tensor(data, shape, { device }));
        if (!isWhollyFinite(y))
          throw new UserError(`${path} gives values that are not finite; take another upscaler`);
        return toPixels(scale(y, 2, -1)).bytes();
      }),
    );
  return {
    scale: times,
    enlarge(picture, { seamless = '', onTile } = {}) {
      const width = picture.width * times;
      const data = new Uint8Array(picture.data.length * times ** 2);
      const rows = spansOf(picture.height, config.unshuffle, seamless.includes('y'));
      const columns = spansOf(picture.width, config.unshuffle, seamless.includes('x'));
      for (const [i, down] of rows.entries())
        for (const [j, across] of columns.entries()) {
          const tile = enlargeTile(picture, down, across);
          const bytes = (across.end - across.begin) * times * 3;
          for (let y = down.begin * times; y < down.end * times; y++) {
            const row = (y - down.first * times) * (across.last - across.first);
            const from = (row + across.begin - across.first) * times * 3;
            data.set(tile.subarray(from, from + bytes), (y * width + across.begin * times) * 3);
          }
          onTile?.(i * columns.length + j + 1, rows.length * columns.length);
        }
      return { width, height: picture.height * times, channels: 3, data };
    },
    release: () => unload(network),
  };
}

/**
 * The picture enlarged until it is as wide and high as asked for, or larger: once at least and three times at most, as A1111 does, and
 * once by a network that leaves the size.
 */
export function enlargeTo(
  upscaler: Upscaler,
  picture: Picture,
  { width, height }: { width: number; height: number },
  enlarging?: Enlarging,
): Picture {
  let result = upscaler.enlarge(picture, enlarging);
  const most = upscaler.scale > 1 ? 3 : 1;
  for (let i = 1; i < most && (result.width < width || result.height < height); i++)
    result = upscaler.enlarge(result, enlarging);
  return result;
}

/** A tile's rows or columns: those that are kept, among those that are computed. */
interface Span {
  begin: number;
  end: number;
  /** Of a pattern it may lie before the picture. */
  first: number;
  /** May lie behind the picture's end, of a pattern or so that squares are whole. */
  last: number;
  /** Where of the picture lies what is beyond it. */
  inside(at: number): number;
}

function spansOf(side: number, square: number, wraps: boolean): Span[] {
  const length = Math.ceil(side / Math.ceil(side / LONGEST) / 4) * 4;
  const mirrored = (at: number) => Math.max(0, at < side ? at : 2 * side - 2 - at);
  const inside = wraps ? (at: number) => (at + side * MARGIN) % side : mirrored;
  return Array.from({ length: Math.ceil(side / length) }, (_, i) => {
    const [begin, end] = [i * length, Math.min(side, (i + 1) * length)];
    const last = Math.ceil(Math.min(wraps ? Infinity : side, end + MARGIN) / square) * square;
    return { begin, end, first: Math.max(wraps ? -Infinity : 0, begin - MARGIN), last, inside };
  });
}

/**
 * A tile in [0, 1], its squares of pixels as one with more channels, in torch's order (pixel_unshuffle): colour, row, column. Behind
 * the picture's end it is mirrored, without the last pixel again, or of a pattern begins anew.
 */
function squaresOf({ width, data }: Picture, down: Span, across: Span, square: number) {
  const shape = [
    1,
    (down.last - down.first) / square,
    (across.last - across.first) / square,
    3 * square ** 2,
  ];
  const out = new Float32Array(shape.reduce((a, b) => a * b));
  let at = 0;
  for (let y = down.first; y < down.last; y += square)
    for (let x = across.first; x < across.last; x += square)
      for (let colour = 0; colour < 3; colour++)
        for (let i = 0; i < square; i++)
          for (let j = 0; j < square; j++) {
            const pixel = down.inside(y + i) * width + across.inside(x + j);
            out[at++] = data[3 * pixel + colour] / 255;
          }
  return { data: out, shape };
}
