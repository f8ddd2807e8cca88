// PNGs encoded on threads of their own. A picture of 1024x1024 takes one 0.1 s or more, in which a GPU draws an eighth of the next.
import { grid } from '../io/grid.ts';
import { toPictures } from '../io/image.ts';
import type { Pixels } from '../io/pixels.ts';
import { encodePng } from '../io/png.ts';
import { threads } from '../io/threads.ts';
import type { Latents } from '../models/latents.ts';

/** A picture with its text, or decoded pictures [n, 3, h, w] to be shown side by side. */
export type Drawn = { picture: Pixels; text: Readonly<Record<string, string>> } | { images: Latents };

export const encodeDrawn = (drawn: Drawn): Uint8Array =>
  'picture' in drawn ? encodePng(drawn.picture, drawn.text) : encodePng(joined(drawn.images));

/** One picture as it is; several in as many rows as columns, or one less. */
function joined({ data, shape }: Latents): Pixels {
  const pictures = toPictures(data, shape);
  if (pictures.length === 1) return pictures[0];
  const columns = Math.ceil(Math.sqrt(pictures.length));
  const rows = Array.from({ length: Math.ceil(pictures.length / columns) }, (_, i) =>
    pictures.slice(i * columns, (i + 1) * columns),
  );
  return grid(rows);
}

/** The bytes of its PNG. */
export const encodeAside = threads(['cli', 'png_thread.js'], encodeDrawn);
