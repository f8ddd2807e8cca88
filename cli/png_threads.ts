// PNGs encoded on threads of their own. A picture of 1024x1024 takes one 0.1 s or more, in which a GPU draws an eighth of the next.
import { grid } from '../io/grid.ts';
import type { Picture } from '../io/pixels.ts';
import { encodePng } from '../io/png.ts';
import { threads } from '../io/threads.ts';

/** A picture, or several to be shown side by side, and the text of the file. */
export interface Drawn {
  pictures: readonly Picture[];
  text?: Readonly<Record<string, string>>;
}

export const encodeDrawn = ({ pictures, text }: Drawn): Uint8Array => encodePng(joined(pictures), text);

/** One picture as it is; several in as many rows as columns, or one less. */
function joined(pictures: readonly Picture[]): Picture {
  if (pictures.length === 1) return pictures[0];
  const columns = Math.ceil(Math.sqrt(pictures.length));
  const rows = Array.from({ length: Math.ceil(pictures.length / columns) }, (_, i) =>
    pictures.slice(i * columns, (i + 1) * columns),
  );
  return grid(rows);
}

/** The bytes of its PNG. */
export const encodeAside = threads(['cli', 'png_thread.js'], encodeDrawn);
