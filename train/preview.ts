// Pictures while a run trains: the same prompts and seeds each time, as PNGs in previews/step-N/, and one contact sheet
// with a row for each time, so that the rows show the model learn. The sheet is made from the files on disk: a resumed run
// goes on with it.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { listFolder, makeFolder } from '../io/files.ts';
import { removeFolder } from '../io/folders.ts';
import { grid } from '../io/grid.ts';
import { preprocessControl, readPicture, toPictures, writePng } from '../io/image.ts';
import type { Picture } from '../io/pixels.ts';
import { resize } from '../io/resize.ts';
import { decode, denoiseToEnd, type Pipeline } from '../models/pipeline.ts';
import { TorchGenerator } from '../models/torch_random.ts';
import type { Run } from './run.ts';
import type { Stop } from './task.ts';

/** Pixels of a picture in the sheet, at most. */
const cell = 192;

/** What ends a preview that the user no longer waits for. */
class Left extends Error {}

/** The prompt of each preview: where several pictures are followed, one may be for all. */
export const promptsOf = ({ prompts, validation_image: { length } }: Run['previews']): readonly string[] =>
  prompts.length === 1 && length > 1 ? Array<string>(length).fill(prompts[0]) : prompts;

/**
 * One picture a prompt, or none at all once `stop.asked`; prompt i has the seed `seed + i`, so that four times one prompt gives four
 * pictures. A ControlNet in the pipeline follows one of `images` in all, or each in one.
 */
export async function samplePreviews(
  pipeline: Pipeline,
  previews: Run['previews'],
  size: { height: number; width: number },
  images: readonly Picture[],
  stop: Stop,
): Promise<Picture[]> {
  const pictures: Picture[] = [];
  const leave = () => {
    if (stop.asked) throw new Left();
  };
  const { height, width } = size;
  const controls = images.map((picture) => preprocessControl(picture, width, height));
  try {
    for (const [i, prompt] of promptsOf(previews).entries()) {
      const { latents } = await denoiseToEnd(
        pipeline,
        {
          prompt: [prompt],
          negative_prompt: previews.negative_prompt ? [previews.negative_prompt] : undefined,
          ...size,
          num_inference_steps: previews.num_inference_steps,
          guidance_scale: previews.guidance_scale,
          scheduler: schedulerOf(previews),
          generators: [new TorchGenerator(previews.seed + i)],
          control_image: controls.length > 0 ? [controls[i] ?? controls[0]] : undefined,
        },
        leave,
      );
      const images = decode(pipeline, latents);
      pictures.push(...toPictures(images.data, images.shape));
    }
  } catch (error) {
    if (error instanceof Left) return [];
    throw error;
  }
  return pictures;
}

/** The scheduler that previews ask for; undefined for the model's own. */
export const schedulerOf = ({ scheduler }: Run['previews']): { name: string } | undefined =>
  scheduler ? { name: scheduler } : undefined;

const folderOf = (output: string): string => join(output, 'previews');
const stepName = (step: number): string => `step-${String(step).padStart(8, '0')}`;

/** Writes the pictures of a step and the contact sheet anew; tells where that is and its size. */
export async function writePreviews(
  output: string,
  step: number,
  pictures: readonly Picture[],
  prompts: readonly string[],
): Promise<{ path: string; width: number; height: number }> {
  const folder = join(folderOf(output), stepName(step));
  makeFolder(folder);
  pictures.forEach((picture, i) => {
    writePng(join(folder, `${i}.png`), picture, { parameters: `${prompts[i] ?? ''}\nstep ${step}` });
  });
  const path = join(output, 'previews.png');
  const sheet = await contactSheet(folderOf(output));
  writePng(path, sheet, { prompts: prompts.join('\n') });
  return { path, width: sheet.width, height: sheet.height };
}

/** Removes what a resumed run will draw again. */
export function rewindPreviews(output: string, step: number): void {
  for (const name of stepFolders(folderOf(output)))
    if (Number(name.slice('step-'.length)) > step) removeFolder(join(folderOf(output), name));
}

const stepFolders = (folder: string): string[] =>
  existsSync(folder) ? listFolder(folder).filter((name) => /^step-\d{8}$/.test(name)) : [];

/** A row for each step, oldest first, its pictures from left to right. */
async function contactSheet(folder: string): Promise<Picture> {
  const rows: Picture[][] = [];
  for (const name of stepFolders(folder)) {
    const files = listFolder(join(folder, name)).filter((file) => /^\d+\.png$/.test(file));
    files.sort((a, b) => Number.parseInt(a, 10) - Number.parseInt(b, 10));
    const pictures: Picture[] = [];
    for (const file of files) pictures.push(thumbnail(await readPicture(join(folder, name, file))));
    rows.push(pictures);
  }
  return grid(rows);
}

function thumbnail(picture: Picture): Picture {
  const share = Math.min(1, cell / Math.max(picture.width, picture.height));
  if (share === 1) return picture;
  const side = (length: number) => Math.max(1, Math.round(length * share));
  return resize(picture, side(picture.width), side(picture.height), 'lanczos');
}
