// The files of a run's previews: PNGs in previews/step-N/, and one contact sheet with a row for each time, beside its step, so that the
// rows show the model learn, and which checkpoint drew what. The sheet is made from the files on disk: a resumed run goes on with it.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { listFolder, makeFolder } from '../../io/files.ts';
import { removeFolder, replaceFolderAtomically } from '../../io/folders.ts';
import { grid, whitePicture } from '../../io/grid.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { letterWidth, lineHeight, writeLines } from '../../io/letters.ts';
import type { Picture } from '../../io/pixels.ts';
import { resize } from '../../io/resize.ts';
import { stepFolder, stepFolders } from './step_folders.ts';

/** Pixels of a picture in the sheet, at most. */
const cell = 192;
/** How many pixels a point of a letter is wide. */
const scale = 2;

/** Where the contact sheet is, and its size. */
interface Sheet {
  path: string;
  width: number;
  height: number;
}

export const previewFolder = (output: string): string => join(output, 'previews');

/** Whether the pictures of a step are there; they are all there or none. */
export const hasPreviews = (output: string, step: number): boolean =>
  existsSync(stepFolder(previewFolder(output), step));

/** Writes the pictures of a step, and the contact sheet. */
export async function writePreviews(
  output: string,
  step: number,
  pictures: readonly Picture[],
  prompts: readonly string[],
): Promise<Sheet> {
  makeFolder(previewFolder(output));
  replaceFolderAtomically(stepFolder(previewFolder(output), step), (temporary) => {
    pictures.forEach((picture, i) => {
      writePng(join(temporary, `${i}.png`), picture, { parameters: `${prompts[i] ?? ''}\nstep ${step}` });
    });
  });
  return writeSheet(output, prompts);
}

/** Writes the contact sheet anew from the pictures on disk. */
export async function writeSheet(output: string, prompts: readonly string[]): Promise<Sheet> {
  const path = join(output, 'previews.png');
  const sheet = await contactSheet(previewFolder(output));
  writePng(path, sheet, { prompts: prompts.join('\n') });
  return { path, width: sheet.width, height: sheet.height };
}

/** Removes what a resumed run will draw again. */
export function rewindPreviews(output: string, step: number): void {
  for (const each of stepFolders(previewFolder(output))) if (each.step > step) removeFolder(each.path);
}

/** A row for each step, oldest first: its number, and its pictures from left to right. */
async function contactSheet(folder: string): Promise<Picture> {
  const rows: Picture[][] = [];
  const steps = stepFolders(folder);
  const digits = Math.max(0, ...steps.map(({ step }) => `${step}`.length));
  for (const { path, step } of steps) {
    const files = listFolder(path).filter((file) => /^\d+\.png$/.test(file));
    files.sort((a, b) => Number.parseInt(a, 10) - Number.parseInt(b, 10));
    const pictures: Picture[] = [];
    for (const file of files) pictures.push(thumbnail(await readPicture(join(path, file))));
    rows.push([labelOf(step, digits, pictures), ...pictures]);
  }
  return grid(rows);
}

/** A step's number, at the middle of its row. */
function labelOf(step: number, digits: number, pictures: readonly Picture[]): Picture {
  const height = Math.max(lineHeight * scale, ...pictures.map((picture) => picture.height));
  const label = whitePicture(digits * letterWidth * scale, height);
  writeLines(label, [`${step}`], [label.width / 2, height / 2], scale);
  return label;
}

function thumbnail(picture: Picture): Picture {
  const share = Math.min(1, cell / Math.max(picture.width, picture.height));
  if (share === 1) return picture;
  const side = (length: number) => Math.max(1, Math.round(length * share));
  return resize(picture, side(picture.width), side(picture.height), 'lanczos');
}
