// readPixels() on threads of their own. A photo of 12 megapixels takes one some 0.4 s, most of it for resizing as Pillow does:
// ten times what a GPU's VAE needs for the result, so several work at once and none is the thread that drives the GPU.
import type { ResizeFilter } from '../../io/resize.ts';
import { threads } from '../../io/threads.ts';
import { type Geometry, type Reading, readPixels } from './picture.ts';

/** The arguments of readPixels(). */
export interface Question {
  file: Uint8Array;
  name: string;
  geometry: Geometry;
  interpolation: ResizeFilter;
  reading?: Reading;
}

export const readQuestion = ({
  file,
  name,
  geometry,
  interpolation,
  reading,
}: Question): Promise<Float32Array> => readPixels(file, name, geometry, interpolation, reading);

/**
 * What readPixels() reads of `file`. What is not begun when `signal` is aborted is left.
 * @throws UserError naming the picture
 */
export const readPixelsAside = threads(['train', 'pictures', 'pixel_thread.js'], readQuestion);
