// Inpainting of a part alone, diffusers' padding_mask_crop and other programs' "only masked": the part around what is masked is cut
// out, drawn at the size that the model likes, and laid back over the picture. Integer for integer what diffusers'
// VaeImageProcessor has Pillow do (get_crop_region, _resize_and_fill, apply_overlay), Pillow's roundings included. Where the mask is
// grey the picture shows through: the model sees a mask of black and white, but what it drew is laid back by the grey one.
import { by255, straight } from './alpha.ts';
import { UserError } from './errors.ts';
import { lay, type Mask, type Picture, type Pixels } from './pixels.ts';
import { resize, type Window } from './resize.ts';

/**
 * What of a picture is drawn, in its pixels: all that is not black in `mask` with `padding` pixels around it, widened towards the shape
 * of `width` x `height` as far as the picture reaches. @throws UserError where all is black
 */
export function maskWindow(mask: Mask, width: number, height: number, padding: number): Window {
  let [left, top, right, bottom] = [mask.width, mask.height, 0, 0];
  for (let y = 0, i = 0; y < mask.height; y++) {
    for (let x = 0; x < mask.width; x++, i++) {
      if (mask.data[i] === 0) continue;
      [left, top] = [Math.min(left, x), Math.min(top, y)];
      [right, bottom] = [Math.max(right, x + 1), Math.max(bottom, y + 1)];
    }
  }
  if (right === 0) throw new UserError('the mask is all black: make white what is to be painted anew');
  [left, top] = [left, top].map((side) => Math.max(side - padding, 0));
  right = Math.min(right + padding, mask.width);
  bottom = Math.min(bottom + padding, mask.height);
  const ratio = width / height;
  if ((right - left) / (bottom - top) > ratio)
    [top, bottom] = widened(top, bottom, (right - left) / ratio, mask.height);
  else [left, right] = widened(left, right, (bottom - top) * ratio, mask.width);
  return { left, top, width: right - left, height: bottom - top };
}

/** A range of `length` about the middle of another, moved to where the picture has room, and cut where it has not. */
function widened(start: number, end: number, length: number, room: number): [start: number, end: number] {
  const more = Math.trunc(length - (end - start));
  const first = start - Math.floor(more / 2);
  const last = first + (end - start) + more;
  const from = Math.max(0, last > room ? first - (last - room) : first);
  return [from, Math.min(room, from + last - first)];
}

/** Where what lies in the middle begins, halves rounded down one by one. */
const middle = (outer: number, inner: number): number => Math.floor(outer / 2) - Math.floor(inner / 2);

/** `window` of a picture as it is. */
function cut<P extends Pixels>({ data, ...picture }: P, { left, top, width, height }: Window): Pixels {
  const { channels } = picture;
  const out = new Uint8Array(width * height * channels);
  for (let y = 0; y < height; y++) {
    const from = ((top + y) * picture.width + left) * channels;
    out.set(data.subarray(from, from + width * channels), y * width * channels);
  }
  return { width, height, channels, data: out };
}

/** `window` of a picture, resized by Lanczos to fit into `width` x `height`; its edges fill what that leaves at two sides. */
export function cutAndFill<P extends Picture | Mask>(
  picture: P,
  window: Window,
  width: number,
  height: number,
): P {
  const part = cut(picture, window);
  const tall = width / height < part.width / part.height;
  const w = tall ? width : Math.floor((part.width * height) / part.height);
  const h = tall ? Math.floor((part.height * width) / part.width) : height;
  const resized = resize(part, w, h, 'lanczos');
  const size = width * height * picture.channels;
  const out = { ...picture, width, height, data: new Uint8Array(size) };
  const [left, top] = [middle(width, w), middle(height, h)];
  lay(out, resized, left, top);
  if (tall) {
    for (let y = 0; y < top; y++) {
      lay(out, edge(resized, 'top'), 0, y);
      lay(out, edge(resized, 'bottom'), 0, top + h + y);
    }
  } else {
    for (let x = 0; x < left; x++) {
      lay(out, edge(resized, 'left'), x, 0);
      lay(out, edge(resized, 'right'), left + w + x, 0);
    }
  }
  return out;
}

/**
 * The row or column that Pillow makes of an edge: it resizes a box of no height there by bicubic, which weighs the outermost row by
 * 9/8 and the next one by -1/8.
 */
function edge(picture: Pixels, side: 'top' | 'bottom' | 'left' | 'right'): Pixels {
  const { width, height, channels } = picture;
  const across = side === 'top' || side === 'bottom';
  const [length, depth] = across ? [width, height] : [height, width];
  const far = side === 'bottom' || side === 'right';
  const at = (line: number, i: number, c: number): number => {
    const n = far ? depth - 1 - line : line;
    return picture.data[(across ? n * width + i : i * width + n) * channels + c];
  };
  const data = new Uint8ClampedArray(length * channels);
  for (let i = 0; i < length; i++) {
    for (let c = 0; c < channels; c++)
      data[i * channels + c] = (9 * at(0, i, c) - at(Math.min(1, depth - 1), i, c) + 4) >> 3;
  }
  const size = across ? { width, height: 1 } : { width: 1, height };
  return { ...size, channels, data: new Uint8Array(data.buffer) };
}

/** `drawn`, whatever its size, laid into `window` of `picture` where `mask` is white, and by shares where it is grey. */
export function overlay(picture: Picture, mask: Mask, window: Window, drawn: Picture): Picture {
  const wide = window.width / window.height > drawn.width / drawn.height;
  const w = wide ? window.width : Math.floor((drawn.width * window.height) / drawn.height);
  const h = wide ? Math.floor((drawn.height * window.width) / drawn.width) : window.height;
  const { width, height } = window;
  const part: Picture = { width, height, channels: 3, data: new Uint8Array(width * height * 3) };
  const resized = resize(drawn, w, h, 'lanczos');
  lay(part, resized, middle(width, w), middle(height, h));
  const below: Picture = { ...picture, data: new Uint8Array(picture.data.length) };
  lay(below, part, window.left, window.top);
  const data = new Uint8Array(picture.data.length);
  for (let i = 0; i < data.length; i++)
    data[i] = composed(picture.data[i], 255 - mask.data[Math.floor(i / 3)], below.data[i]);
  return { ...picture, data };
}

/**
 * `drawn`, of the picture's size, in it where `mask` marks, as A1111 where the whole picture is drawn: by shares of twice the mask's
 * levels, so that from grey on all is new.
 */
export function layBack(picture: Picture, mask: Mask, drawn: Picture): Picture {
  const doubled = mask.data.map((level) => Math.min(255, 2 * level));
  const { width, height } = picture;
  return overlay(picture, { ...mask, data: doubled }, { left: 0, top: 0, width, height }, drawn);
}

/** A level of a pixel of `alpha` over another: multiplied by alpha, divided by it again (rounded down), and then composed, as Pillow. */
function composed(above: number, alpha: number, below: number): number {
  if (alpha === 0) return below;
  const shown = straight(by255(above * alpha), alpha);
  const sum = (shown * alpha + below * (255 - alpha)) * 128 + 0x4000;
  return ((sum >> 8) + sum) >> 15;
}
