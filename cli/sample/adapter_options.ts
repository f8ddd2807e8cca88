// The flags of `sdxl sample` for T2I-Adapters, what can be known to be wrong with them, and the part of a request that they come to.
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import type { T2IAdapterRequest } from '../../models/control/t2i_adapter.ts';
import { fraction, scaledFile, texts } from '../option_values.ts';

export interface AdapterOptions {
  adapter?: string[];
  adapterImage?: string[];
  adapterConditioningFactor?: number;
}

/** They stand among those of ControlNets. */
export const addAdapterOptions = (command: Command): Command =>
  command
    .option(
      '--adapter <PATH[:SCALE]>',
      "a T2I-Adapter of diffusers' (lighter than a ControlNet, run once a picture): a folder, a file or a hub id, and how strongly to follow it (default: 1); may be given more than once",
      texts,
    )
    .option(
      '--adapter-image <FILE>',
      'what it follows, taken as --control-image is; one for each --adapter, in their order',
      texts,
    )
    .option(
      '--adapter-conditioning-factor <F>',
      'the part of the steps after which no --adapter is followed any more (default: 1)',
      fraction('--adapter-conditioning-factor'),
    );

/** `PATH:SCALE` as typed after --adapter. */
export const adapterOf = (text: string): { file: string; scale?: number } => scaledFile('--adapter', text);

/** @throws UserError where there is not a picture for each adapter, or none for the factor to be of */
export function checkAdapters({
  adapter: adapters = [],
  adapterImage: images = [],
  adapterConditioningFactor: factor,
}: AdapterOptions): void {
  adapters.map(adapterOf);
  if (images.length !== adapters.length)
    throw new UserError(
      `there are ${adapters.length} of --adapter and ${images.length} of --adapter-image: give a picture to each`,
    );
  if (factor !== undefined && adapters.length === 0)
    throw new UserError('--adapter-conditioning-factor needs --adapter: something to follow');
}

/** The part that T2I-Adapters heed; nothing where there are none. */
export const adapterRequest = (
  { adapter = [], adapterConditioningFactor }: AdapterOptions,
  pictures: readonly Picture[],
): T2IAdapterRequest =>
  adapter.length === 0
    ? {}
    : {
        adapter_image: pictures,
        adapter_conditioning_scale: adapter.map((text) => adapterOf(text).scale),
        adapter_conditioning_factor: adapterConditioningFactor,
      };
