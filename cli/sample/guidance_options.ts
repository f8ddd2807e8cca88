// The flags of `sdxl sample` that say how strongly what the UNet predicts is drawn from, and FreeU's; what can be known to be wrong with
// them, and the part of a request that they come to. A method of several numbers is a switch, which has those in use for SDXL, and a flag
// for each number.
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import type { Request } from '../../models/request.ts';
import type { APG } from '../../models/unet/apg.ts';
import { type FreeU, freeUNumbers } from '../../models/unet/freeu.ts';
import { guidedCalls } from '../../models/unet/guidance.ts';
import { fraction, number, texts } from '../option_values.ts';

export interface GuidanceOptions {
  guidanceScale: number;
  guidanceRescale: number;
  guidanceStart: number;
  guidanceStop: number;
  imageGuidanceScale?: number;
  pagScale?: number;
  pagAdaptiveScale?: number;
  pagAppliedLayers?: string[];
  apg?: boolean;
  apgMomentum?: number;
  apgRescale?: number;
  apgEta?: number;
  freeu?: boolean;
  freeuS1?: number;
  freeuS2?: number;
  freeuB1?: number;
  freeuB2?: number;
}

/** Its authors' for SDXL. */
const usualFreeU: FreeU = { s1: 0.9, s2: 0.2, b1: 1.3, b2: 1.4 };

const freeUHelp: Readonly<Record<keyof FreeU, string>> = {
  s1: 'how much is left of the lowest frequencies of what its first level takes from the way down',
  s2: 'the same of its second level',
  b1: "what half of the first level's own channels are taken times: more is a stronger structure",
  b2: 'the same of its second level',
};

/** In use for SDXL. diffusers' guider has of these by default the length alone: { momentum: 0, rescale: 15, eta: 1 }. */
const usualAPG: APG = { momentum: -0.5, rescale: 15, eta: 0 };

/** They stand among those of the steps. */
export const addGuidanceOptions = (command: Command): Command =>
  addFreeUOptions(addAPGOptions(addPAGOptions(addScaleOptions(command))));

const addScaleOptions = (command: Command): Command =>
  command
    .option(
      '--guidance-scale <F>',
      'how closely to follow the prompt; 1 or less switches guidance off',
      number('--guidance-scale', { min: 0 }),
      5,
    )
    .option(
      '--guidance-rescale <F>',
      'against overexposure at high guidance, 0 to 1',
      fraction('--guidance-rescale'),
      0,
    )
    .option(
      '--guidance-start <F>',
      'the part of the steps, 0 to 1, before which there is no guidance: such a step does half the work',
      fraction('--guidance-start'),
      0,
    )
    .option(
      '--guidance-stop <F>',
      "the part after which there is none, such as 0.7: faster, and another picture; the refiner's steps are not meant",
      fraction('--guidance-stop'),
      1,
    );

const addPAGOptions = (command: Command): Command =>
  command
    .option(
      '--pag-scale <F>',
      'perturbed-attention guidance, such as 3: how far to leave what the model would draw without regard for structure; a step takes half as long again (default: 0, off)',
      number('--pag-scale', { min: 0 }),
    )
    .option(
      '--pag-adaptive-scale <F>',
      'how much that scale falls with each timestep below 1000, such as 0.005 (default: 0)',
      number('--pag-adaptive-scale', { min: 0 }),
    )
    .option(
      '--pag-applied-layers <NAME>',
      'the layers that it perturbs, by a part of their names in diffusers, such as mid, up or down_blocks.2 (default: mid); may be given more than once',
      texts,
    );

const addAPGOptions = (command: Command): Command =>
  command
    .option(
      '--apg',
      'adaptive projected guidance: against the oversaturation of a high --guidance-scale, such as 10',
    )
    .option(
      '--apg-momentum <F>',
      `how much of the guidance of the steps before is added to each, -1 to 1; below 0 it is taken away (default: ${usualAPG.momentum})`,
      number('--apg-momentum', { min: -1, max: 1 }),
    )
    .option(
      '--apg-rescale <F>',
      `the length that guidance is cut to where it is longer; less is weaker, and 0 is no bound (default: ${usualAPG.rescale})`,
      number('--apg-rescale', { min: 0 }),
    )
    .option(
      '--apg-eta <F>',
      `how much is left of what oversaturates, its part along the prediction; 1 is all (default: ${usualAPG.eta})`,
      number('--apg-eta'),
    );

function addFreeUOptions(command: Command): Command {
  command.option(
    '--freeu',
    "FreeU: have the UNet's way up weigh its own image more, and what it takes from the way down less; another picture",
  );
  for (const each of freeUNumbers)
    command.option(
      `--freeu-${each} <F>`,
      `${freeUHelp[each]} (default: ${usualFreeU[each]}, its authors' for SDXL)`,
      number(`--freeu-${each}`, { min: 0 }),
    );
  return command;
}

const apgTyped = (options: GuidanceOptions): Partial<APG> => ({
  momentum: options.apgMomentum,
  rescale: options.apgRescale,
  eta: options.apgEta,
});

const freeUTyped = (options: GuidanceOptions): Partial<FreeU> => ({
  s1: options.freeuS1,
  s2: options.freeuS2,
  b1: options.freeuB1,
  b2: options.freeuB2,
});

/** @throws UserError for guidance that cannot hold, and what is of a method that is not asked for */
export function checkGuidance(options: GuidanceOptions): void {
  const { pagScale, pagAdaptiveScale, pagAppliedLayers, apg, freeu } = options;
  guidedCalls({ guidance_start: options.guidanceStart, guidance_stop: options.guidanceStop }, 1);
  const idle = pagAdaptiveScale !== undefined ? '--pag-adaptive-scale' : '--pag-applied-layers';
  if (pagScale === undefined && (pagAdaptiveScale ?? pagAppliedLayers) !== undefined)
    throw new UserError(
      `${idle} needs --pag-scale: how strongly to leave the perturbed prediction, such as 3`,
    );
  if (!apg) refuseTyped('--apg', apgTyped(options));
  if (!freeu) refuseTyped('--freeu', freeUTyped(options));
}

function refuseTyped(flag: string, numbers: object): void {
  const [one] = Object.entries(numbers).find(([, value]) => value !== undefined) ?? [];
  if (one)
    throw new UserError(`${flag}-${one} needs ${flag}, which it is a number of: give it, or leave both out`);
}

/** The part that guidance and FreeU heed. */
export const guidanceRequest = (
  options: GuidanceOptions,
): Omit<Partial<Request>, 'guidance_scale'> & Pick<Request, 'guidance_scale'> => ({
  guidance_scale: options.guidanceScale,
  guidance_rescale: options.guidanceRescale,
  guidance_start: options.guidanceStart,
  guidance_stop: options.guidanceStop,
  image_guidance_scale: options.imageGuidanceScale,
  pag_scale: options.pagScale,
  pag_adaptive_scale: options.pagAdaptiveScale,
  pag_applied_layers: options.pagAppliedLayers,
  adaptive_projected_guidance: options.apg ? numbersOf(usualAPG, apgTyped(options)) : undefined,
  freeu: options.freeu ? numbersOf(usualFreeU, freeUTyped(options)) : undefined,
});

function numbersOf<T extends APG | FreeU>(usual: T, typed: Partial<T>): T {
  const given = Object.entries(typed).filter(([, value]) => value !== undefined);
  return { ...usual, ...Object.fromEntries(given) };
}

/** The guidance of another pass: where its own scale leaves none, there is nothing to project. */
export const guidanceAt = (
  guidance_scale: number,
  { adaptive_projected_guidance }: Partial<Request>,
): Partial<Request> & Pick<Request, 'guidance_scale'> => ({
  guidance_scale,
  adaptive_projected_guidance: guidance_scale > 1 ? adaptive_projected_guidance : undefined,
});
