// What the thread of preview.ts does: turns decoded pictures into one PNG, for the thread that drives the device to write.
import { parentPort } from 'node:worker_threads';
import { grid } from '../io/grid.ts';
import { toPictures } from '../io/image.ts';
import { encodePng } from '../io/png.ts';
import type { Latents } from '../models/latents.ts';

/** One picture as it is; several in as many rows as columns, or one less. */
function joined({ data, shape }: Latents) {
  const pictures = toPictures(data, shape);
  if (pictures.length === 1) return pictures[0];
  const columns = Math.ceil(Math.sqrt(pictures.length));
  const rows = Array.from({ length: Math.ceil(pictures.length / columns) }, (_, i) =>
    pictures.slice(i * columns, (i + 1) * columns),
  );
  return grid(rows);
}

parentPort?.on('message', (images: Latents) => {
  parentPort?.postMessage(encodePng(joined(images)));
});
