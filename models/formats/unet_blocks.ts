// The UNet's blocks in one row, as kohya's block_lr counts them by the original's names: 0 the embeddings of time and sizes, then
// input_blocks (of SDXL's base nine), middle_block (three), output_blocks (nine), and last the layers behind them: 23 of the base. A distilled
// UNet's blocks keep these numbers; those that its middle block lacks are empty.

import type { UNetConfig } from '../unet/unet.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';

type Layout = Pick<UNetConfig, 'layers_per_block' | 'up_block_types'>;

/** Resnets, attention and resnet. */
const MIDDLE = 3;

/** Blocks on the way down, and as many on the way up. */
export const blocksOfWay = ({ layers_per_block, up_block_types }: Layout): number =>
  up_block_types.length * (layers_per_block + 1);

/** Blocks in all. */
export const blockCount = (config: Layout): number => 2 * blocksOfWay(config) + MIDDLE + 2;

/** The number of the block that a diffusers key is of. */
export function blockOf(key: string, config: Layout): number {
  const [part, row] = unetKeyInSgm(key, config).split('.');
  const way = blocksOfWay(config);
  const first = { input_blocks: 1, middle_block: 1 + way, output_blocks: 1 + way + MIDDLE }[part];
  if (first !== undefined) return first + Number(row);
  return part === 'out' ? blockCount(config) - 1 : 0;
}

/** Ratios that supermerger (MBW) has for such a UNet and what is beside it: BASE, IN00 and on, M00, OUT00 and on. */
export const mergedBlockCount = (config: Layout): number => 2 * blocksOfWay(config) + 2;

/** Which of these a diffusers key goes by: the embeddings by IN00, the middle by one, and what is behind the blocks by the last. */
export function mergedBlockOf(key: string, config: Layout): number {
  const [block, way] = [blockOf(key, config), blocksOfWay(config)];
  if (block <= way) return Math.max(1, block);
  return block <= way + MIDDLE ? way + 1 : Math.min(block + 1 - MIDDLE, mergedBlockCount(config) - 1);
}
