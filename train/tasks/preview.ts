// Pictures while a run trains: the same prompts and settings each time, as PNGs in previews/step-N/, and one contact sheet
// with a row for each time, so that the rows show the model learn. The sheet is made from the files on disk: a resumed run
// goes on with it.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { listFolder, makeFolder } from '../../io/files.ts';
import { removeFolder, replaceFolderAtomically } from '../../io/folders.ts';
import { grid } from '../../io/grid.ts';
import { readPicture, writePng } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { resize } from '../../io/resize.ts';
import { checkSquares } from '../../models/control/t2i_adapter.ts';
import { type Denoised, decode, denoise, denoiseToEnd, type Pipeline } from '../../models/pipeline.ts';
import { samplerFor } from '../../models/plan.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import type { PromptEmbeds } from '../../models/text/conditioning.ts';
import type { Stop } from '../passes/task.ts';
import type { Preview, PreviewSettings } from '../run/preview_prompts.ts';

/** Pixels of a picture in the sheet, at most. */
const cell = 192;

/** What ends a preview that the user no longer waits for. */
class Left extends Error {}

/** One picture a preview, or none at all once `stop.asked`. */
export async function samplePreviews(
  pipeline: Pipeline,
  requests: readonly Asked[],
  stop: Stop,
): Promise<Picture[]> {
  const pictures: Picture[] = [];
  const leave = () => {
    if (stop.asked) throw new Left();
  };
  try {
    for (const request of requests) {
      const { latents } = await denoiseToEnd(pipeline, request, leave);
      pictures.push(...decode(pipeline, latents));
    }
  } catch (error) {
    if (error instanceof Left) return [];
    throw error;
  }
  return pictures;
}

/**
 * Previews as requests, for one time: generators go on. `embeds` are the prompts', where the text encoders are gone. `more` is what each
 * is given besides.
 */
export const requestsOf = (
  previews: readonly Preview[],
  embeds?: readonly PromptEmbeds[],
  more: readonly Partial<Asked>[] = [],
): Asked[] =>
  previews.map(({ seed, scheduler, prompt, negative_prompt, ...preview }, i) => ({
    ...preview,
    ...(embeds ? embeds[i] : { prompt, negative_prompt: negative_prompt || undefined }),
    scheduler: { name: scheduler || undefined },
    generators: [new TorchGenerator(seed)],
    ...more[i],
  }));

/** @throws UserError for a scheduler, steps or a size that cannot be, so that it is told now and not at the first preview */
export function checkPreviews(
  pipeline: Pipeline,
  { scheduler: name }: PreviewSettings,
  previews: readonly Preview[],
): void {
  const { ratio, adapter } = pipeline;
  samplerFor(pipeline, { scheduler: { name: name || undefined } });
  previews.forEach((preview, i) => {
    samplerFor(pipeline, requestsOf([preview])[0]).plan(preview.num_inference_steps);
    for (const side of ['width', 'height'] as const)
      if (preview[side] % ratio)
        throw new UserError(
          `"previews.prompts[${i}].${side}" is ${preview[side]}, which is not divisible by ${ratio}; ${Math.max(ratio, preview[side] - (preview[side] % ratio))} is`,
        );
    for (const { config } of adapter) checkSquares(config, [preview.height, preview.width]);
  });
}

/** The most memory that previews take, each kind of them done for a step on a device without numbers. */
export function rehearsePreviews(pipeline: Pipeline, requests: readonly Asked[]): void {
  const kinds = new Map(requests.map((each) => [`${[each.width, each.height, each.guidance_scale]}`, each]));
  for (const request of kinds.values()) {
    const loop = denoise(pipeline, request);
    const { value } = loop.next();
    const { latents } = value;
    loop.return(value as Denoised);
    decode(pipeline, latents);
  }
}

/** Where the contact sheet is, and its size. */
interface Sheet {
  path: string;
  width: number;
  height: number;
}

export const previewFolder = (output: string): string => join(output, 'previews');
const stepName = (step: number): string => `step-${String(step).padStart(8, '0')}`;

/** Whether the pictures of a step are there; they are all there or none. */
export const hasPreviews = (output: string, step: number): boolean =>
  existsSync(join(previewFolder(output), stepName(step)));

/** Writes the pictures of a step, and the contact sheet. */
export async function writePreviews(
  output: string,
  step: number,
  pictures: readonly Picture[],
  prompts: readonly string[],
): Promise<Sheet> {
  makeFolder(previewFolder(output));
  replaceFolderAtomically(join(previewFolder(output), stepName(step)), (temporary) => {
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
  for (const name of stepFolders(previewFolder(output)))
    if (Number(name.slice('step-'.length)) > step) removeFolder(join(previewFolder(output), name));
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
