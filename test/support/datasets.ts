// Datasets: small folders of pictures, and what a run opens that says nothing else of its own.
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Test } from 'tap';
import type { Picture } from '../../io/pixels.ts';
import { encodePng } from '../../io/png.ts';
import type { DatasetOptions } from '../../train/data/dataset.ts';
import { openDataset as open } from '../../train/data/source.ts';
import { usual } from '../../train/run/rules/owners.ts';

export const openDataset = (
  given: Partial<DatasetOptions> & Pick<DatasetOptions, 'path'>,
  onProgress?: Parameters<typeof open>[1],
): ReturnType<typeof open> => open({ ...usual.dataset, ...given }, onProgress);

/** A picture in which every pixel differs from its neighbours. */
export function patterned(width: number, height: number, salt = 0): Picture {
  const data = Uint8Array.from(
    { length: width * height * 3 },
    (_, i) => (i * 89 + salt * 31 + (i >> 5)) % 256,
  );
  return { width, height, channels: 3, data };
}

export const png = (width = 8, height = 8, salt = 0) => encodePng(patterned(width, height, salt));

export function folderOf(t: Test, files: Record<string, string | Uint8Array>): string {
  const folder = t.testdir({});
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, name)), { recursive: true });
    writeFileSync(join(folder, name), content);
  }
  return folder;
}
