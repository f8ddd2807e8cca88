// How strongly an IP-Adapter counts in which of the UNet's transformers, as diffusers' set_ip_adapter_scale is told: by one number, or by
// sides and blocks, where what is not named counts nothing. InstantStyle (Wang et al. 2024) found that of SDXL { up: { block_0: [0, 1, 0] } }
// takes a picture's style alone, and { down: { block_2: [0, 1] } } its layout.
import { didYouMean, UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import type { UNetConfig } from '../unet/unet.ts';

/** One number, or under masks one for each picture of the adapter. */
export type Scale = number | readonly number[];
/** Of all transformers of a block, or a list of one for each. */
export type BlockScale = number | readonly Scale[];
type SideScale = BlockScale | Readonly<Record<`block_${number}`, BlockScale>>;

/** Of parts of the UNet; the middle block has one transformer. */
export interface ScalesByBlock {
  down?: SideScale;
  mid?: BlockScale;
  up?: SideScale;
}

/** By the paths of transformers, such as `up_blocks.0.attentions.1`. */
export type LayerScales = ReadonlyMap<string, Scale>;

interface Block {
  side: string;
  /** Absent of the middle block, which has no number. */
  key?: string;
  transformers: readonly string[];
}

/** The blocks that attend to the prompt. */
function blocksOf({
  down_block_types,
  up_block_types,
  layers_per_block,
  mid_block_type,
}: UNetConfig): Block[] {
  const of = (side: string, types: readonly string[], layers: number): Block[] =>
    types.flatMap((type, i) => {
      const transformers = Array.from({ length: layers }, (_, j) => `${side}_blocks.${i}.attentions.${j}`);
      return type.startsWith('CrossAttn') ? [{ side, key: `block_${i}`, transformers }] : [];
    });
  const middle = { side: 'mid', transformers: ['mid_block.attentions.0'] };
  const hasMiddle = mid_block_type !== null && mid_block_type !== 'UNetMidBlock2D';
  return [
    ...of('down', down_block_types, layers_per_block),
    ...(hasMiddle ? [middle] : []),
    ...of('up', up_block_types, layers_per_block + 1),
  ];
}

const nameOf = ({ side, key }: Block): string => (key ? `${side}.${key}` : side);

/**
 * What an adapter's scale comes to.
 * @param name the scale's own, for errors
 * @param masks of its pictures, where there are some
 * @throws UserError for a block that this UNet has not, another number of scales than there are transformers or pictures, or no number
 */
export function layerScales(
  config: UNetConfig,
  given: Scale | ScalesByBlock,
  { name, masks }: { name: string; masks?: number },
): LayerScales {
  const blocks = blocksOf(config);
  const checked = (scale: Scale, where: string): Scale => {
    const list = [scale].flat();
    if (list.length === 0 || !list.every(Number.isFinite))
      throw new UserError(`${where} is ${JSON.stringify(scale)}: give a number`);
    if (Array.isArray(scale) && list.length !== masks)
      throw new UserError(
        masks === undefined
          ? `${where} has a number for each picture, which masks alone keep apart: give ip_adapter_masks (--ip-adapter-mask), or one number`
          : `${where} has ${list.length} numbers for ${masks} pictures: give one, or one to each`,
      );
    return scale;
  };
  if (typeof given !== 'object' || Array.isArray(given)) {
    const scale = checked(given as Scale, name);
    return new Map(blocks.flatMap(({ transformers }) => transformers.map((path) => [path, scale])));
  }
  const scales = new Map<string, Scale>();
  for (const [side, value] of Object.entries(given as Record<string, unknown>)) {
    const own = blocks.filter((block) => block.side === side);
    const byBlock = isRecord(value) ? value : undefined;
    const unknown = Object.keys(byBlock ?? {}).find((key) => !own.some((block) => block.key === key));
    if (own.length === 0 || unknown !== undefined)
      throw noBlock(name, unknown === undefined ? side : `${side}.${unknown}`, blocks);
    for (const block of own) {
      const where = `${name} of ${nameOf(block)}`;
      const list = [byBlock ? (byBlock[block.key ?? ''] ?? 0) : value].flat() as Scale[];
      throwUnlessFits(where, list.length, block);
      for (const [i, path] of block.transformers.entries())
        scales.set(path, checked(list[list.length === 1 ? 0 : i], where));
    }
  }
  return scales;
}

function noBlock(name: string, word: string, blocks: readonly Block[]): UserError {
  const names = [...new Set(blocks.flatMap((block) => [block.side, nameOf(block)]))];
  return new UserError(
    `${name} names ${word}, and this UNet attends to the prompt in ${names.join(', ')}${didYouMean(word, names)}`,
  );
}

function throwUnlessFits(where: string, count: number, { transformers }: Block): void {
  if (count === 1 || count === transformers.length) return;
  throw new UserError(
    `${where} has ${count} scales for ${transformers.length} transformer${transformers.length > 1 ? 's: give one, or one to each' : ': give one'}`,
  );
}
