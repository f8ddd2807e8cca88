// Copies of tensors between devices of one kind that each work through a queue of their own: after what is queued on the source
// and on the target, and before what is queued on either later. Copies made in one call do not wait for each other, though a
// device may be the source of some and the target of others, so those onto different devices run at the same time.
import { UserError } from '../io/errors.ts';
import type { Block, Exchange } from './driver.ts';
import type { Tensor } from './tensor.ts';

/** What one device is to receive. */
interface Delivery {
  readonly sources: Set<Exchange>;
  readonly copies: { to: Block; from: Block; source: Exchange; bytes: number }[];
}

/** Copies tensors into others of the same sizes, on other devices; all of them go on when they have to. */
export function copyBetween(pairs: readonly (readonly [to: Tensor, from: Tensor])[]): void {
  const deliveries = new Map<Exchange, Delivery>();
  for (const [to, from] of pairs) {
    const [target, source] = exchangesOf(to, from);
    const delivery = deliveries.get(target) ?? { sources: new Set(), copies: [] };
    deliveries.set(target, delivery);
    delivery.sources.add(source);
    delivery.copies.push({ to: to.block, from: from.block, source, bytes: from.byteLength });
  }
  const sources = new Set([...deliveries.values()].flatMap((delivery) => [...delivery.sources]));
  const ready = [...sources].map((source) => [source, source.mark()] as const);
  try {
    for (const [target, delivery] of deliveries)
      for (const [source, mark] of ready) if (delivery.sources.has(source)) target.after(mark);
    for (const [target, { copies }] of deliveries)
      for (const { to, from, source, bytes } of copies) target.copy(to, from, source, bytes);
    // Nothing may write there before it has been read.
    const read = [...deliveries].map(([target, { sources }]) => [target.mark(), sources] as const);
    for (const [mark, sources] of read) for (const source of sources) source.after(mark);
  } catch (error) {
    for (const target of deliveries.keys()) finish(target);
    throw error;
  }
}

/** Waits for a device's copies, when those that they read cannot be told to. */
function finish(target: Exchange): void {
  try {
    target.finish();
  } catch {
    // It is lost, and what has been thrown before tells more.
  }
}

function exchangesOf({ device: target }: Tensor, { device: source }: Tensor): [Exchange, Exchange] {
  const [to, from] = [target.driver.exchange, source.driver.exchange];
  if (to && from) return [to, from];
  throw new UserError(`${target.name} cannot take tensors from ${source.name}: only GPUs work together`);
}
