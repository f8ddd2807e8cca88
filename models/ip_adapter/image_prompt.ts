// Pictures to draw by, as a request asks of IP-Adapters, and as the UNet attends to them. Its keys and values change in no step, so they are
// made once an image, with the scale in the values, for those attentions alone where that is not 0. The pictures of one adapter are attended
// to together, but under masks each apart: + scale mask attn(q, k_ip, v_ip), the mask as large as the attention's image (diffusers'
// IPAdapterMaskProcessor, which has to guess that size).
import { placeOf } from '../../engine/module.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import { scale } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { preprocessClip } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ImageTokens } from '../unet/transformer.ts';
import { crossAttentions, type UNet, type UNetConfig } from '../unet/unet.ts';
import { interpolate } from '../vae/interpolate.ts';
import { type Latents, toDevice } from '../vae/latents.ts';
import type { IPAdapter } from './ip_adapter.ts';
import { type LayerScales, layerScales, type Scale, type ScalesByBlock } from './ip_adapter_scale.ts';

/** The part of a request that IP-Adapters heed. */
export interface IPAdapterRequest {
  /** A picture for each IP-Adapter, of any size, or several, which it attends to together. */
  ip_adapter_image?: readonly (Picture | readonly Picture[])[];
  /**
   * How strongly each counts beside the prompt, everywhere or by block, { up: { block_0: [0, 1, 0] } }: one for all, or a list of one, or
   * nothing, for each; 1 where absent.
   */
  ip_adapter_scale?: number | ScalesByBlock | readonly (Scale | ScalesByBlock | undefined)[];
  /**
   * For each IP-Adapter where its picture acts, by preprocessMask, [1, 1, h, w] from 0 to 1, or a list of one for each of its pictures;
   * nothing where they act everywhere. Of another shape than what is drawn they are stretched.
   */
  ip_adapter_masks?: readonly (Latents | readonly Latents[] | undefined)[];
}

/** What a request asks of an adapter. */
export interface AskedPictures {
  pictures: readonly Picture[];
  scales: LayerScales;
  /** One for each picture. */
  masks?: readonly Latents[];
}

/** Pictures to draw by. */
export interface ImagePrompt extends AskedPictures {
  adapter: IPAdapter;
}

/** What a request asks of each of `count` adapters. @throws UserError where one has no picture, or a scale or masks that do not fit */
export function askedPictures(
  count: number,
  { ip_adapter_image: given = [], ip_adapter_scale: scale = 1, ip_adapter_masks: masking }: IPAdapterRequest,
  config: UNetConfig,
): AskedPictures[] {
  if (count === 0 && given.length === 0 && !masking) return [];
  const scales = Array.isArray(scale) ? scale : Array<number | ScalesByBlock>(count).fill(scale as number);
  for (const [what, list, mend] of [
    ['ip_adapter_image has # pictures', given, 'give one to each'],
    ['ip_adapter_scale has # scales', scales, 'give one, or one to each'],
    [
      'ip_adapter_masks has # entries',
      masking,
      'give one to each, perhaps a list of one for each of its pictures',
    ],
  ] as const)
    if (list && list.length !== count)
      throw new UserError(`${what.replace('#', `${list.length}`)} for ${count} IP-Adapters: ${mend}`);
  return given.map((each, i) => {
    const pictures = [each].flat() as Picture[];
    if (pictures.length === 0)
      throw new UserError(`ip_adapter_image[${i}] is a list of no pictures: give one or more`);
    const masks = masksOf(masking?.[i], pictures.length, `ip_adapter_masks[${i}]`);
    const name = `ip_adapter_scale[${i}] (--ip-adapter FILE:SCALE)`;
    return {
      pictures,
      masks,
      scales: layerScales(config, scales[i] ?? 1, { name, masks: masks?.length }),
    };
  });
}

function masksOf(
  given: Latents | readonly Latents[] | undefined,
  pictures: number,
  name: string,
): Latents[] | undefined {
  if ((given ?? undefined) === undefined) return undefined;
  const masks = [given].flat() as Latents[];
  if (masks.length !== pictures)
    throw new UserError(`${name} has ${masks.length} masks for ${pictures} pictures: give one to each`);
  for (const { shape, data } of masks) {
    const [n, c, h, w] = shape;
    if (shape.length !== 4 || n * c !== 1 || h * w !== data.length || data.length === 0)
      throw new UserError(
        `${name} is ${data.length} numbers of shape [${shape}], no mask of [1, 1, h, w]: take what preprocessMask gives`,
      );
  }
  return masks;
}

/** What a request asks of a pipeline's adapters; those that count nothing anywhere have no part. @throws UserError as askedPictures */
export const imagePromptsOf = (
  { ipAdapter, unetConfig }: { ipAdapter: readonly IPAdapter[]; unetConfig: UNetConfig },
  request: IPAdapterRequest,
): ImagePrompt[] =>
  askedPictures(ipAdapter.length, request, unetConfig)
    .map((asked, i) => ({ adapter: ipAdapter[i], ...asked }))
    .filter(({ scales }) => [...scales.values()].flat().some((each) => each !== 0));

/** What is drawn: latents of a shape, in so many rows of a pass. */
export interface Drawn {
  guided: boolean;
  /** The latents' [n, c, h, w]. */
  shape: readonly number[];
  /** All rows of a pass. */
  rows: number;
}

/**
 * Keys and values for the pictures to draw, once for all of an adapter's pictures or, under masks, for each. Guided, rows that know of no
 * picture come first: an embedding, or pixels, of zeros.
 */
export function imageTokens(
  { adapter: { config, module: adapter, encoder }, pictures, scales, masks }: ImagePrompt,
  unet: UNet,
  { guided, shape, rows }: Drawn,
): ImageTokens[] {
  const { device, dtype } = placeOf(encoder);
  const side = encoder.config.image_size;
  const pixels = concat(
    pictures.map((picture) => toDevice(preprocessClip(picture, side), device, dtype)),
    0,
  );
  const beside = (x: Tensor): Tensor => (guided ? concat([scale(x, 0), x], 0) : x);
  const states = config.resampler
    ? encoder(beside(pixels), 'penultimate')
    : beside(encoder(pixels, 'image_embeds'));
  const pairs = adapter(states);
  const tokensOf = (first: number, count: number): ImageTokens => {
    // The tokens of pictures that are attended to together stand one after the other.
    const rowsOf = (t: Tensor): Tensor => {
      const [, tokens, width] = t.shape;
      const own = slice(t.reshape(-1, pictures.length * tokens, width), 1, first * tokens, count * tokens);
      return broadcast(own, 1, shape[0]).reshape(-1, count * tokens, width);
    };
    const maskAt = masks && maskOver(masks[first], shape, rows, (mask) => toDevice(mask, device, dtype));
    return new Map(
      crossAttentions(unet).flatMap(({ transformer, halvings, children }, i) => {
        const factors = scales.get(transformer) ?? 0;
        const factor = typeof factors === 'number' ? factors : factors[first];
        if (factor === 0) return [];
        const [k, v] = pairs[i];
        const values = rowsOf(factor === 1 ? v : scale(v, factor));
        return [[children, [rowsOf(k), values, maskAt?.(halvings, v.shape[2])] as const] as const];
      }),
    );
  };
  return masks ? pictures.map((_, i) => tokensOf(i, 1)) : [tokensOf(0, pictures.length)];
}

/** The mask by how often the latents are halved: for each row, pixel and channel of an attention's image a number, shared by its level. */
function maskOver(
  mask: Latents,
  [, , height, width]: readonly number[],
  rows: number,
  placed: (mask: Latents) => Tensor,
): (halvings: number, channels: number) => Tensor {
  const made = new Map<number, Tensor>();
  return (halvings, channels) => {
    const [h, w] = [height, width].map((side) => Math.ceil(side / 2 ** halvings));
    const small = () => placed(interpolate(mask, [h, w], { mode: 'bicubic' })).reshape(h * w);
    const over = made.get(halvings) ?? broadcast(broadcast(small(), 0, rows), 2, channels);
    made.set(halvings, over);
    return over;
  };
}
