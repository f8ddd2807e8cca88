// The flags of `sdxl sample` for what is done with a mask and beneath it, as A1111's img2img does (diffusers leaves it to its callers):
// they are its words, but for --padding-mask-crop, which is diffusers'. All happens to 8-bit pixels before and after the model,
// but for content that is latents (models/start.ts).
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import { blurMask } from '../../io/mask_blur.ts';
import { layBack } from '../../io/mask_crop.ts';
import { fillMasked } from '../../io/mask_fill.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import { resize } from '../../io/resize.ts';
import { latentContents } from '../../models/start.ts';
import { number, oneOf } from '../option_values.ts';

/** In the order of its numbers (`inpainting_fill`). */
export const maskedContents = ['fill', 'original', ...latentContents] as const;

export interface MaskOptions {
  mask?: string;
  invertMask?: boolean;
  maskBlur?: number;
  maskedContent?: (typeof maskedContents)[number];
  paddingMaskCrop?: number;
}

/** They stand among those over a picture. */
export const addMaskOptions = (command: Command): Command =>
  command
    .option(
      '--mask <FILE>',
      'paint anew where this is white (needs --image); an inpainting model sees both while it draws',
    )
    .option('--invert-mask', 'paint anew where it is black')
    .option(
      '--mask-blur <N>',
      'soften its edge by so many pixels, as A1111, which has 4, and lay the result back over the picture (default: leave both out, as diffusers)',
      number('--mask-blur', { min: 0, max: 256, whole: true }),
    )
    .option(
      '--masked-content <NAME>',
      "what is under the mask before drawing begins, in A1111's words: original, fill (the colours around it), latent-noise or latent-nothing (default: original)",
      oneOf('--masked-content', maskedContents),
    )
    .option(
      '--padding-mask-crop <N>',
      "draw only what is masked, with so many pixels around it, as large as --width and --height (default: the model's size), and lay it back over the picture",
      number('--padding-mask-crop', { min: 0, whole: true }),
    );

/** @throws UserError for flags of a mask that is not there */
export function checkMask(options: MaskOptions): void {
  if (options.mask) return;
  const idle = Object.entries({
    '--invert-mask': options.invertMask,
    '--mask-blur': options.maskBlur,
    '--masked-content': options.maskedContent,
  }).find(([, value]) => value !== undefined);
  if (idle) throw new UserError(`${idle[0]} needs --mask: what to paint anew`);
  if (options.paddingMaskCrop !== undefined)
    throw new UserError('--padding-mask-crop needs --mask: what to draw a part around');
}

/** A mask as it was read, turned round and softened. */
export function preparedMask({ invertMask, maskBlur = 0 }: MaskOptions, mask: Mask): Mask {
  const turned = invertMask ? { ...mask, data: mask.data.map((level) => 255 - level) } : mask;
  return blurMask(turned, maskBlur);
}

/** What the model is given for a picture under a mask of its size. */
export const contentUnder = ({ maskedContent }: MaskOptions, image: Picture, mask: Mask): Picture =>
  maskedContent === 'fill' ? fillMasked(image, mask) : image;

/** A whole picture that is drawn over under a mask, at the size that is drawn, and how the result is laid back over it. */
export function wholeUnder(options: MaskOptions, image: Picture, mask: Mask, width: number, height: number) {
  const [seen, marked] = [resize(image, width, height, 'lanczos'), resize(mask, width, height, 'lanczos')];
  return {
    inputs: { image: contentUnder(options, seen, marked), mask: marked },
    finish: (drawn: Picture) => (options.maskBlur === undefined ? drawn : layBack(seen, marked, drawn)),
  };
}
