// Learning rates of the UNet's blocks (kohya's block_lr, and for adapters its down_lr_weight and their kin) and of each text encoder. What
// has a rate of 0 is not trained: it has no adapters, no gradient and nothing in the optimizer.
import { UserError } from '../../io/errors.ts';
import { blockCount, blockOf, blocksOfWay } from '../../models/formats/unet_blocks.ts';
import type { UNetConfig } from '../../models/unet/unet.ts';
import type { Run } from '../run/run.ts';

/** The rate of a key of the UNet, where blocks have rates of their own. @throws UserError where these are not as many as the blocks */
export function blockRates(
  { optimizer: { block_lr } }: Run,
  config: UNetConfig,
): (key: string) => number | undefined {
  if (block_lr.length === 0) return () => undefined;
  const [count, way] = [blockCount(config), blocksOfWay(config)];
  if (block_lr.length !== count)
    throw new UserError(
      `optimizer.block_lr has ${block_lr.length} rates, and the model's UNet ${count} blocks: its embeddings, ${way} on the way down, 3 in the middle, ${way} on the way up, and its last layers; give each its rate`,
    );
  return (key) => block_lr[blockOf(key, config)];
}

/** The rate of a text encoder, where that is not the run's: of two rates the second is text_encoder_2's. */
export function textEncoderRate({ optimizer }: Pick<Run, 'optimizer'>, name: string): number | undefined {
  const rates = [optimizer.text_encoder_lr].flat();
  return rates.length === 1 ? rates[0] || undefined : rates[name === 'text_encoder_2' ? 1 : 0];
}

/** The rates in words, neighbours of one rate together; nothing where there are none. */
export function blockRatesInWords({ optimizer: { block_lr } }: Run): string {
  const runs: { first: number; last: number; rate: number }[] = [];
  for (const [block, rate] of block_lr.entries()) {
    const before = runs.at(-1);
    if (before?.rate === rate) before.last = block;
    else runs.push({ first: block, last: block, rate });
  }
  const told = runs.map(
    ({ first, last, rate }) => `${first === last ? first : `${first} to ${last}`}: ${rate || 'frozen'}`,
  );
  return told.length ? ` (blocks ${told.join(', ')})` : '';
}
