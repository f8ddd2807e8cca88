// Several ControlNets at work on one image, as diffusers' MultiControlNetModel: each has a picture, a scale and a part of the
// steps, and what they give is summed. Outside its part a ControlNet is not run, where diffusers runs it and takes it times 0.
import type { Device } from '../engine/device.ts';
import { holding } from '../engine/memory.ts';
import { add } from '../engine/ops/binary.ts';
import { concat, slice } from '../engine/ops/move.ts';
import { scale } from '../engine/ops/unary.ts';
import { Tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import type { ModelSource } from './checkpoint.ts';
import type { Size } from './conditioning.ts';
import {
  additionalResiduals,
  type ControlNet,
  controlnet,
  controlRatio,
  parseControlNetConfig,
} from './controlnet.ts';
import type { Latents } from './latents.ts';
import { keepInQ8 } from './q8.ts';
import type { AdditionalResiduals, UNetConfig } from './unet.ts';
import type { Question } from './unet_encoder.ts';

/** One number for all ControlNets, or a list with one, or nothing, for each. */
type Each = number | readonly (number | undefined)[];

/** The part of a request that ControlNets heed. */
export interface ControlRequest {
  /** A picture for each ControlNet, [1, 3, height, width] in [0, 1], of the size that is drawn. */
  control_image?: readonly Latents[];
  /** How strongly each is followed: 1 where absent, but 0.8 over a picture without a mask. */
  controlnet_conditioning_scale?: Each;
  /** The part of the steps, 0 to 1, from which on each is on; 0 where absent. */
  control_guidance_start?: Each;
  /** The part of the steps after which each is off; 1 where absent. */
  control_guidance_end?: Each;
  /** Controls the prompt's prediction alone, not the negative one's, and early features less than late ones. */
  guess_mode?: boolean;
}

/** A ControlNet and what it is asked to do. */
export interface Control {
  net: ControlNet;
  image: Latents;
  scale: number;
  start: number;
  end: number;
  /** Takes its share of guess_mode. */
  guess: boolean;
}

/** Loads a ControlNet onto a device. @throws UserError where it does not fit its config, or the UNet and the VAE */
export function loadControlNet(
  source: ModelSource,
  { unet, ratio }: { unet: UNetConfig; ratio: number },
  device: Device,
  dtype: FloatDType,
  { gradientCheckpointing = false, q8 = false }: { gradientCheckpointing?: boolean; q8?: boolean } = {},
): ControlNet {
  const config = parseControlNetConfig(source.config('controlnet'), `the config.json of ${source.path}`);
  for (const key of sharedKeys) {
    const [own, wanted] = [config[key], unet[key]].map((value) => JSON.stringify(value));
    if (own !== wanted)
      throw new UserError(
        `the ControlNet of ${source.path} has "${key}" ${own} and the UNet ${wanted}: take one that was made for this model`,
      );
  }
  if (controlRatio(config) !== ratio)
    throw new UserError(
      `the ControlNet of ${source.path} takes ${controlRatio(config)} pixels to a latent and the VAE ${ratio}: take one that was made for this model`,
    );
  const net = controlnet(config, { gradientCheckpointing });
  if (q8) keepInQ8(net);
  holding('controlnet', () => source.load('controlnet', net, device, dtype));
  return net;
}

/** What decides the shapes of inputs and features, in which a ControlNet cannot differ from its UNet. */
const sharedKeys = [
  'in_channels',
  'block_out_channels',
  'layers_per_block',
  'cross_attention_dim',
  'addition_time_embed_dim',
  'projection_class_embeddings_input_dim',
] as const;

type NumbersOf = 'controlnet_conditioning_scale' | 'control_guidance_start' | 'control_guidance_end';

/** What a request asks of each ControlNet. @throws UserError where it has not one of each thing for each, or is out of bounds */
export function controlsOf(
  nets: readonly ControlNet[],
  request: ControlRequest & { image?: Latents; mask?: Latents },
  [height, width]: Size,
): Control[] {
  const { control_image: images = [], guess_mode: guess = false, image, mask } = request;
  if (nets.length === 0 && images.length === 0) return [];
  if (images.length !== nets.length)
    throw new UserError(
      `control_image has ${images.length} pictures for ${nets.length} ControlNets: give one to each`,
    );
  for (const { shape } of images)
    if (shape.join() !== [1, 3, height, width].join())
      throw new UserError(
        `a picture in control_image is [${shape}], not [1,3,${height},${width}]: resize it`,
      );
  const forEach = (key: NumbersOf, otherwise: number): readonly number[] => {
    const given = request[key] ?? otherwise;
    const list = typeof given === 'number' ? nets.map(() => given) : given;
    if (list.length !== nets.length)
      throw new UserError(
        `${key} has ${list.length} numbers for ${nets.length} ControlNets: give one, or one to each`,
      );
    return list.map((each) => each ?? otherwise);
  };
  const scales = forEach('controlnet_conditioning_scale', image && !mask ? 0.8 : 1);
  const starts = forEach('control_guidance_start', 0);
  const ends = forEach('control_guidance_end', 1);
  starts.forEach((start, i) => {
    if (!(start >= 0 && start < ends[i] && ends[i] <= 1))
      throw new UserError(
        `control_guidance_start is ${start} and control_guidance_end ${ends[i]}: give parts of the way, the end after the start`,
      );
  });
  return nets.map((net, i) => ({
    ...{ net, image: images[i], scale: scales[i], start: starts[i], end: ends[i], guess },
  }));
}

/** Whether it has a part in a call of the network, the `i`-th of `calls`. */
export const isOn = ({ start, end }: Control, i: number, calls: number): boolean =>
  i / calls >= start && (i + 1) / calls <= end;

/** A Control whose picture is on the device, [1, height, width, 3]. */
export type PlacedControl = Control & { picture: Tensor };

/** What those that are on add to the UNet that is asked the same. Guided, the negative prompts' rows come first. */
export function residualsOf(
  on: readonly PlacedControl[],
  question: Question,
  guided: boolean,
): AdditionalResiduals | undefined {
  if (on.length === 0) return undefined;
  const [{ guess }] = on;
  const asked = guess && guided ? ofPrompts(question) : question;
  const given = on.map(({ net, picture, scale: factor }) => {
    const residuals = net(asked, picture);
    const last = residuals.length - 1;
    return residuals.map((x, i) => scaled(x, guess ? factor * 10 ** (i / last - 1) : factor));
  });
  const sums = given.reduce((sum, more) => sum.map((x, i) => add(x, more[i])));
  const all = asked === question ? sums : sums.map((x) => concat([scale(x, 0), x], 0));
  return additionalResiduals(all);
}

const scaled = (x: Tensor, factor: number): Tensor => (factor === 1 ? x : scale(x, factor));

/** The half of the rows that follows the negative prompts'. */
function ofPrompts({ sample, times, conditioning }: Question): Question {
  const later = (t: Tensor, axis = 0): Tensor => slice(t, axis, t.shape[axis] / 2, t.shape[axis] / 2);
  const { context, textEmbeds, timeIds, cache } = conditioning;
  return {
    sample: later(sample),
    times: times instanceof Tensor ? later(times) : { ...times, times: later(times.times, 1) },
    conditioning: {
      ...{ context: later(context), textEmbeds: later(textEmbeds), timeIds: later(timeIds) },
      cache,
    },
  };
}
