// The flags of `sdxl sample` that say how strongly what the UNet predicts is drawn from, and FreeU's; what can be known to be wrong with
// them, and the part of a request that they come to.
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import type { Request } from '../../models/request.ts';
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

/** They stand among those of the steps. */
export function addGuidanceOptions(command: Command): Command {
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
    )
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
    )
    .option(
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

const freeUTyped = (options: GuidanceOptions): { [K in keyof FreeU]?: number } => ({
  s1: options.freeuS1,
  s2: options.freeuS2,
  b1: options.freeuB1,
  b2: options.freeuB2,
});

/** @throws UserError for guidance that cannot hold, and what is of a method that is not asked for */
export function checkGuidance(options: GuidanceOptions): void {
  const { pagScale, pagAdaptiveScale, pagAppliedLayers, freeu } = options;
  guidedCalls({ guidance_start: options.guidanceStart, guidance_stop: options.guidanceStop }, 1);
  const idle = pagAdaptiveScale !== undefined ? '--pag-adaptive-scale' : '--pag-applied-layers';
  if (pagScale === undefined && (pagAdaptiveScale ?? pagAppliedLayers) !== undefined)
    throw new UserError(
      `${idle} needs --pag-scale: how strongly to leave the perturbed prediction, such as 3`,
    );
  const one = freeUNumbers.find((each) => freeUTyped(options)[each] !== undefined);
  if (one && !freeu)
    throw new UserError(`--freeu-${one} needs --freeu, which it is a number of: give it, or leave both out`);
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
  freeu: options.freeu ? freeUOf(options) : undefined,
});

function freeUOf(options: GuidanceOptions): FreeU {
  const typed = freeUTyped(options);
  const numbers = freeUNumbers.map((each) => [each, typed[each] ?? usualFreeU[each]]);
  return Object.fromEntries(numbers) as FreeU;
}
