// Decoded pictures: 8-bit pixels with their size.

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
