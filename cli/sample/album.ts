// The files of a call of `sdxl sample`: pictures, written as they are there, and in the end all latents if they are wanted. PNGs are
// encoded on other threads while the device draws on; a picture that cannot be written ends the call at the next one, or at its end.
import { encodeNumbers } from '../../io/dtype.ts';
import { assertWritable, writeFileAtomic } from '../../io/files.ts';
import type { Picture } from '../../io/pixels.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { mostThreads } from '../../io/threads.ts';
import { type DecodedPicture, type Latents, stacked } from '../../models/vae/latents.ts';
import { readFor } from '../option_values.ts';
import { encodeAside } from '../png_threads.ts';

/** @throws UserError for a file that cannot be written */
export function openAlbum(output: string, saveLatents: string | undefined, count: number) {
  const [, stem, extension] = /^(.*)(\.png)$/is.exec(output) as RegExpExecArray;
  const fileOf = (i: number) => (count === 1 ? output : `${stem}-${i}${extension}`);
  const planned = Array.from({ length: count }, (_, i) => fileOf(i));
  for (const file of planned) readFor('--output', () => assertWritable(file));
  const files: string[] = [];
  const spoilt: string[] = [];
  const all: Latents[] = [];
  const writer = openWriter();
  return {
    /** All that will be written. */
    paths: [...planned, ...(saveLatents ? [saveLatents] : [])],
    files,
    /** Those that overflow has left black, in whole or in part. */
    spoilt,
    /** Has pictures written. @throws what kept an earlier one from it */
    async add(
      pictures: readonly DecodedPicture[],
      latents: Latents,
      text: Record<string, string>,
    ): Promise<void> {
      for (const { finite, ...picture } of pictures) {
        const file = fileOf(files.length);
        await writer.write(file, picture, text);
        files.push(file);
        if (!finite) spoilt.push(file);
      }
      all.push(latents);
      writer.check();
    },
    settle: writer.settle,
    /** Waits for what is on its way, and writes the latents. @throws what kept a picture from being written */
    async close(): Promise<void> {
      await writer.settle();
      writer.check();
      if (!saveLatents) return;
      const { data, shape } = stacked(all);
      const bytes = encodeNumbers(data, 'float32');
      writeSafetensors(saveLatents, [{ name: 'latents', dtype: 'float32', shape, bytes }]);
    },
  };
}

/** Writes pictures that other threads encode. What fails is kept until it is asked for. */
function openWriter() {
  const onTheirWay = new Set<Promise<void>>();
  let failure: unknown;
  return {
    /** Begins to write one; waits before where more are on their way than there are threads. */
    async write(file: string, picture: Picture, text: Record<string, string>): Promise<void> {
      while (onTheirWay.size > mostThreads) await Promise.race(onTheirWay);
      const written: Promise<void> = encodeAside({ pictures: [picture], text })
        .then((png) => writeFileAtomic(file, png))
        .catch((error) => {
          failure ??= error;
        })
        .finally(() => onTheirWay.delete(written));
      onTheirWay.add(written);
    },
    /** Waits for what is on its way. */
    async settle(): Promise<void> {
      await Promise.all(onTheirWay);
    },
    /** @throws the first that kept a picture from being written */
    check(): void {
      if (failure) throw failure;
    },
  };
}
