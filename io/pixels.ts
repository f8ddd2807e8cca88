// Decoded pictures: 8-bit pixels with their size, and one laid on another.

/** Pixels row by row, the channels of a pixel together (h w c). */
export interface Pixels {
  width: number;
  height: number;
  channels: 1 | 3;
  data: Uint8Array;
}

export interface Picture extends Pixels {
  channels: 3;
}

/** A grey picture; white marks what inpainting repaints. */
export interface Mask extends Pixels {
  channels: 1;
}

/** `from` laid on `onto` with its corner there; what does not fit is cut off. */
export function lay(onto: Pixels, from: Pixels, left: number, top: number): void {
  const { channels } = onto;
  const [first, last] = [Math.max(0, -left), Math.min(from.width, onto.width - left)];
  for (let y = Math.max(0, -top); y < Math.min(from.height, onto.height - top); y++) {
    const row = from.data.subarray((y * from.width + first) * channels, (y * from.width + last) * channels);
    onto.data.set(row, ((top + y) * onto.width + left + first) * channels);
  }
}
