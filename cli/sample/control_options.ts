// The flags of `sdxl sample` for ControlNets, what can be known to be wrong with them, and the part of a request that they come
// to. Lists go by the order of --controlnet; what is given once counts for all.
import { type Command, Option } from 'commander';
import { didYouMean, UserError } from '../../io/errors.ts';
import { preprocessControl } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { type ControlBalance, controlBalances } from '../../models/control/control_balance.ts';
import type { ControlRequest } from '../../models/control/control_request.ts';
import { controlModeOf, controlModes } from '../../models/control/controlnet_union.ts';
import { fraction, oneOf, type Pair, pair, repeated, scaledFile, texts } from '../option_values.ts';

export interface ControlOptions {
  controlnet?: string[];
  controlImage?: string[];
  /** Of the edges that are followed in the pictures' place, those of T2I-Adapters too. */
  canny?: Pair;
  controlMode?: number[];
  controlGuidanceStart?: number[];
  controlGuidanceEnd?: number[];
  guessMode?: boolean;
  controlBalance?: ControlBalance[];
}

export const addControlOptions = (command: Command): Command =>
  command
    .optionsGroup('Control (the base alone; several ControlNets and T2I-Adapters add up):')
    .option(
      '--controlnet <PATH[:SCALE]>',
      "a ControlNet of diffusers', or kohya's ControlNet-LLLite: a folder, a file or a hub id (perhaps one file of several there: OWNER/NAME/FILE), and how strongly to follow it (default, as diffusers': 1; over a picture 0.8); may be given more than once",
      texts,
    )
    .option(
      '--control-image <FILE>',
      'what it follows (edges, depth, ... as it was trained on), taken as it is; one for each --controlnet, in their order',
      texts,
    )
    .addOption(
      new Option(
        '--canny [LOW,HIGH]',
        "take the edges of each --control-image and --adapter-image in its place, as OpenCV's Canny finds them (default thresholds, as in diffusers' examples: 100,200)",
      )
        .argParser(pair('--canny', 'LOW,HIGH such as 100,200'))
        .preset('100,200'),
    )
    .option(
      '--control-mode <N|NAME>',
      `what the picture is, for a ControlNet union: ${controlModes.map((names, i) => `${i} or ${names.join(', ')}`).join('; ')}; given once for all unions, or once for each, in their order`,
      repeated(mode),
    )
    .option(
      '--control-guidance-start <F>',
      'the part of the steps from which on it is followed, 0 to 1 (default: 0); given once for all, or once for each',
      repeated(fraction('--control-guidance-start')),
    )
    .option(
      '--control-guidance-end <F>',
      'the part of the steps after which it no longer is (default: 1)',
      repeated(fraction('--control-guidance-end')),
    )
    .option('--guess-mode', "control the prompt's prediction alone, and early features less than late ones")
    .option(
      '--control-balance <NAME>',
      `what counts more, the prompt or what it follows, as control modes of A1111's ControlNets: ${controlBalances.join(', ')} (default: balanced); given once for all, or once for each`,
      repeated(oneOf('--control-balance', controlBalances)),
    );

function mode(text: string): number {
  const named = controlModeOf(text);
  if (named !== undefined) return named;
  if (/^\d+$/.test(text)) return Number(text);
  const names = controlModes.flat();
  throw new UserError(
    `--control-mode takes a number from 0 to ${controlModes.length - 1} or ${names.join(', ')}, not "${text}"${didYouMean(text, names)}`,
  );
}

/** `PATH:SCALE` as typed after --controlnet. */
export const controlnetOf = (text: string): { file: string; scale?: number } =>
  scaledFile('--controlnet', text);

/** @throws UserError where there is not one of each thing for each ControlNet */
export function checkControl(options: ControlOptions & { adapter?: string[] }): void {
  const {
    controlnet: nets = [],
    controlImage: images = [],
    controlGuidanceStart,
    controlGuidanceEnd,
  } = options;
  nets.map(controlnetOf);
  if (options.canny && nets.length + (options.adapter ?? []).length === 0)
    throw new UserError('--canny needs --controlnet or --adapter: something that follows edges');
  if (images.length !== nets.length)
    throw new UserError(
      `there are ${nets.length} of --controlnet and ${images.length} of --control-image: give a picture to each`,
    );
  const [starts, ends] = [controlGuidanceStart ?? [0], controlGuidanceEnd ?? [1]];
  for (const [flag, list] of [
    ['--control-mode', options.controlMode],
    ['--control-guidance-start', controlGuidanceStart],
    ['--control-guidance-end', controlGuidanceEnd],
    ['--control-balance', options.controlBalance],
    ['--guess-mode', options.guessMode ? nets.slice(0, 1) : undefined],
  ] as const) {
    if (list && nets.length === 0) throw new UserError(`${flag} needs --controlnet: something to follow`);
    // How many of them are unions is known when they are found.
    const fits =
      flag === '--control-mode' ? (list ?? []).length <= nets.length : list?.length === nets.length;
    if (list && list.length !== 1 && !fits)
      throw new UserError(
        `there are ${list.length} of ${flag} and ${nets.length} of --controlnet: give one, or one to each`,
      );
  }
  nets.forEach((_, i) => {
    const [start, end] = [starts, ends].map((list) => list[i] ?? list[0]);
    if (start >= end)
      throw new UserError(
        `--control-guidance-start ${start} is not before --control-guidance-end ${end}: nothing would be followed`,
      );
  });
}

/** What is given once is for all. */
export const oneOrAll = <T>(list: T[] | undefined): T | T[] | undefined =>
  list?.length === 1 ? list[0] : list;

/** The part that ControlNets heed; nothing where there are none. A scale that is not typed is the pipeline's own. */
export function controlRequest(
  {
    controlnet = [],
    controlMode: modes,
    controlGuidanceStart: starts,
    controlGuidanceEnd: ends,
    guessMode,
    controlBalance,
  }: ControlOptions,
  controls: readonly Picture[],
  width: number,
  height: number,
): ControlRequest {
  if (controlnet.length === 0) return {};
  return {
    control_image: controls.map((picture) => preprocessControl(picture, width, height)),
    controlnet_conditioning_scale: controlnet.map((text) => controlnetOf(text).scale),
    control_mode: oneOrAll(modes),
    control_guidance_start: oneOrAll(starts),
    control_guidance_end: oneOrAll(ends),
    guess_mode: guessMode,
    control_balance: oneOrAll(controlBalance),
  };
}
