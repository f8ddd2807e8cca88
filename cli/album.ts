// The files of a call of `sdxl sample`: pictures, written as they are there, and in the end all latents if they are wanted. PNGs are
// encoded on other threads while the device draws on; a picture that cannot be written ends the call at the next one, or at its end.
import { resolve } from 'node:path';
import { encodeNumbers } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { assertWritable, writeFileAtomic } from '../io/files.ts';
import { toPictures } from '../io/image.ts';
import type { Picture } from '../io/pixels.ts';
import { writeSafetensors } from '../io/safetensors.ts';
import { mostThreads } from '../io/threads.ts';
import { allFinite, type Latents, stacked } from '../models/latents.ts';
import { encodeAside } from './png_threads.ts';

/** @throws UserError for a file that cannot be written */
export function openAlbum(output: string, saveLatents: string | undefined, count: number) {
  const [, stem, extension] = /^(.*)(\.png)$/is.exec(output) as RegExpExecArray;
  const fileOf = (i: number) => (count === 1 ? output : `${stem}-${i}${extension}`);
  const pictures = Array.from({ length: count }, (_, i) => fileOf(i));
  for (const file of pictures) assertWritable(file);
  if (saveLatents && pictures.some((file) => resolve(file) === resolve(saveLatents)))
    throw new UserError(
      `--save-latents ${saveLatents} is the name of a picture; give the latents one of their own`,
    );
  const files: string[] = [];
  const spoilt: string[] = [];
  const all: Latents[] = [];
  const onTheirWay = new Set<Promise<void>>();
  let failure: unknown;
  const write = (file: string, picture: Picture, text: Record<string, string>) => {
    const written: Promise<void> = encodeAside({ picture, text })
      .then((png) => writeFileAtomic(file, png))
      .catch((error) => {
        failure ??= error;
      })
      .finally(() => onTheirWay.delete(written));
    onTheirWay.add(written);
  };
  return {
    /** All that will be written. */
    paths: [...pictures, ...(saveLatents ? [saveLatents] : [])],
    files,
    /** Those that overflow has left black, in whole or in part. */
    spoilt,
    /** Has pictures [n, 3, h, w] written; waits for others where more are on their way than there are threads. */
    async add(
      images: Latents,
      latents: Latents,
      text: Record<string, string>,
      finish: (drawn: Picture) => Picture,
    ): Promise<void> {
      const size = images.data.length / images.shape[0];
      for (const [i, picture] of toPictures(images.data, images.shape).entries()) {
        while (onTheirWay.size > mostThreads) await Promise.race(onTheirWay);
        const file = fileOf(files.length);
        write(file, finish(picture), text);
        files.push(file);
        if (!allFinite(images.data.subarray(i * size, (i + 1) * size))) spoilt.push(file);
      }
      all.push(latents);
      if (failure) throw failure;
    },
    /** Waits for what is on its way. */
    async settle(): Promise<void> {
      await Promise.all(onTheirWay);
    },
    /** The same, and writes the latents. @throws what kept a picture from being written */
    async close(): Promise<void> {
      await this.settle();
      if (failure) throw failure;
      if (!saveLatents) return;
      const { data, shape } = stacked(all);
      const bytes = encodeNumbers(data, 'float32');
      writeSafetensors(saveLatents, [{ name: 'latents', dtype: 'float32', shape, bytes }]);
    },
  };
}
