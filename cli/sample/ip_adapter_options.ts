// The flags of `sdxl sample` for IP-Adapters, what can be known to be wrong with them, and the part of a request that they come to.
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import { preprocessMask } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import type { IPAdapterRequest } from '../../models/ip_adapter/image_prompt.ts';
import type { Scale, ScalesByBlock } from '../../models/ip_adapter/ip_adapter_scale.ts';
import { numbers, scaledFile, texts } from '../option_values.ts';

export interface IPAdapterOptions {
  ipAdapter?: string[];
  ipAdapterImage?: string[];
  ipAdapterMask?: string[];
}

/** What these flags' files hold. */
export interface IPAdapterInputs {
  /** One for each IP-Adapter, or several for one. */
  ipAdapterImages?: readonly Picture[];
  /** One for each of these, or none. */
  ipAdapterMasks?: readonly Picture[];
}

export const addIPAdapterOptions = (command: Command): Command =>
  command
    .optionsGroup('Pictures as prompts (the base alone; several IP-Adapters add up):')
    .option(
      '--ip-adapter <PATH[:SCALE]>',
      'an IP-Adapter, plain or plus: a file, a folder or HUB_ID/FILE, with the image_encoder beside it or in ../models, and how strongly its picture counts: a number (default: 1), or numbers for parts of the UNet, where the others count 0, as InstantStyle: FILE:up.block_0=0,1,0 takes the style, FILE:down.block_2=0,1 the layout, FILE:up.block_0=0,1,0:down.block_2=0,1 both, and mid=1 is the middle; may be given more than once',
      texts,
    )
    .option(
      '--ip-adapter-image <FILE>',
      'the picture to draw by, whose middle square is seen; one for each --ip-adapter, in their order, or several for one alone',
      texts,
    )
    .option(
      '--ip-adapter-mask <FILE>',
      'where that picture counts: where this is white, stretched over what is drawn; one for each --ip-adapter-image, in their order (FILE:0.8,0.5 of an --ip-adapter is then a number for each of its pictures)',
      texts,
    );

/** `PATH:SCALE` as typed after --ip-adapter, with one number, one for each picture, or `PATH:BLOCK=N,...:BLOCK=N,...`. */
export function ipAdapterOf(text: string): { file: string; scale?: Scale | ScalesByBlock } {
  const [, before, blocks] = /^(.*?)((?::[\w.]+=[^:]*)*)$/s.exec(text) as RegExpExecArray;
  const [, file, list] = /^(.*):([-+\d.e]*,[-+\d.e,]*)$/is.exec(before) ?? [];
  if (blocks && (list || scaledFile('--ip-adapter', before).scale !== undefined))
    throw new UserError(
      `--ip-adapter ${text} has a scale beside those of blocks: leave it out, as what is not named counts 0`,
    );
  if (blocks) return { file: before, scale: scalesByBlock(blocks.slice(1).split(':')) };
  return list ? { file, scale: numbers('--ip-adapter FILE:SCALE')(list) } : scaledFile('--ip-adapter', text);
}

/** Of `up.block_0=0,1,0`, as diffusers' set_ip_adapter_scale has them; which blocks there are is known when the model is. */
function scalesByBlock(parts: readonly string[]): ScalesByBlock {
  const scales: Record<string, unknown> = {};
  for (const part of parts) {
    const [name, list] = part.split('=');
    const given = numbers(`--ip-adapter FILE:${name}`)(list);
    const value = given.length === 1 ? given[0] : given;
    const [side, block, ...rest] = name.split('.');
    const others = scales[side] ?? {};
    if (rest.length > 0 || block === '')
      throw new UserError(
        `--ip-adapter FILE:BLOCK=N takes a BLOCK such as mid, up or up.block_0, not "${name}"`,
      );
    if (
      block
        ? typeof others !== 'object' || Array.isArray(others) || Object.hasOwn(others, block)
        : Object.hasOwn(scales, side)
    )
      throw new UserError(`--ip-adapter FILE:${parts.join(':')} says ${name} twice; give it once`);
    scales[side] = block ? { ...others, [block]: value } : value;
  }
  return scales;
}

/** @throws UserError where there is not a picture for each adapter, or several for one, or a mask for some pictures alone */
export function checkIPAdapters({
  ipAdapter: adapters = [],
  ipAdapterImage: images = [],
  ipAdapterMask: masks = [],
}: IPAdapterOptions): void {
  adapters.map(ipAdapterOf);
  if (images.length !== adapters.length && !(adapters.length === 1 && images.length > 1))
    throw new UserError(
      `there are ${adapters.length} of --ip-adapter and ${images.length} of --ip-adapter-image: give a picture to each, or several to one alone`,
    );
  if (masks.length > 0 && masks.length !== images.length)
    throw new UserError(
      `there are ${images.length} of --ip-adapter-image and ${masks.length} of --ip-adapter-mask: give a mask to each picture, in their order (a white one for everywhere), or none`,
    );
}

/** The part that IP-Adapters heed, for a picture so large; nothing where there are none. */
export function ipAdapterRequest(
  { ipAdapter = [] }: IPAdapterOptions,
  { ipAdapterImages: pictures = [], ipAdapterMasks: masks = [] }: IPAdapterInputs,
  width: number,
  height: number,
): IPAdapterRequest {
  if (ipAdapter.length === 0) return {};
  const byAdapter = <T>(list: readonly T[]) => (ipAdapter.length === 1 ? [list] : list);
  const over = masks.map((mask) => preprocessMask(mask, width, height));
  return {
    ip_adapter_image: byAdapter(pictures),
    ip_adapter_scale: ipAdapter.map((text) => ipAdapterOf(text).scale),
    ip_adapter_masks: masks.length > 0 ? byAdapter(over) : undefined,
  };
}
