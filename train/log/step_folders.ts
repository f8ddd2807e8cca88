// Folders that are named by a step of a run: its checkpoints and its previews. Their names are in the order of the steps.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { listFolder } from '../../io/files.ts';

export const stepFolder = (folder: string, step: number): string =>
  join(folder, `step-${String(step).padStart(8, '0')}`);

/** Those in `folder`, oldest first. One that is being written has another name. */
export function stepFolders(folder: string): { path: string; step: number }[] {
  if (!existsSync(folder)) return [];
  return listFolder(folder).flatMap((name) => {
    const [, step] = /^step-(\d{8})$/.exec(name) ?? [];
    return step === undefined ? [] : [{ path: join(folder, name), step: Number(step) }];
  });
}
