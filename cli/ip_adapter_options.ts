// The flags of `sdxl sample` for IP-Adapters, what can be known to be wrong with them, and the part of a request that they come to.
import type { Command } from 'commander';
import { UserError } from '../io/errors.ts';
import type { Picture } from '../io/pixels.ts';
import type { IPAdapterRequest } from '../models/ip_adapter.ts';
import { repeated, scaledFile } from './options.ts';

export interface IPAdapterOptions {
  ipAdapter?: string[];
  ipAdapterImage?: string[];
}

export const addIPAdapterOptions = (command: Command): Command =>
  command
    .optionsGroup('Pictures as prompts (the base alone; several IP-Adapters add up):')
    .option(
      '--ip-adapter <FILE|DIR|HUB_ID/FILE[:SCALE]>',
      'an IP-Adapter, plain or plus, and how strongly its picture counts (default: 1), with the image_encoder beside it or in ../models; may be given more than once',
      repeated((text) => text),
    )
    .option(
      '--ip-adapter-image <FILE>',
      'the picture to draw by, whose middle square is seen; one for each --ip-adapter, in their order, or several for one alone',
      repeated((text) => text),
    );

/** `PATH:SCALE` as typed after --ip-adapter. */
export const ipAdapterOf = (text: string): { file: string; scale?: number } =>
  scaledFile('--ip-adapter', text);

/** @throws UserError where there is not a picture for each adapter, or several for one */
export function checkIPAdapters({
  ipAdapter: adapters = [],
  ipAdapterImage: images = [],
}: IPAdapterOptions): void {
  adapters.map(ipAdapterOf);
  if (images.length !== adapters.length && !(adapters.length === 1 && images.length > 1))
    throw new UserError(
      `there are ${adapters.length} of --ip-adapter and ${images.length} of --ip-adapter-image: give a picture to each, or several to one alone`,
    );
}

/** The part that IP-Adapters heed; nothing where there are none. */
export const ipAdapterRequest = (
  { ipAdapter = [] }: IPAdapterOptions,
  pictures: readonly Picture[],
): IPAdapterRequest =>
  ipAdapter.length === 0
    ? {}
    : {
        ip_adapter_image: ipAdapter.length === 1 ? [pictures] : pictures,
        ip_adapter_scale: ipAdapter.map((text) => ipAdapterOf(text).scale),
      };
