// What the denoising loop starts from, and what follows each step: pure noise, a picture under noise, or latents of an
// earlier stage. The order of draws is diffusers', so that a seed gives the same numbers. Inpainting keeps the known part
// of the picture by putting it back after each step (RePaint's simple form, as diffusers does with a four-channel UNet).
import { UserError } from '../io/errors.ts';
import type { Autoencoder } from './autoencoder.ts';
import { encodeImage, joined, type Latents, stacked } from './latents.ts';
import type { Plan, Sampler } from './samplers/sampler.ts';

/** Where noise comes from: TorchGenerator's CPU stream, or CudaGenerator's. */
export interface NoiseGenerator {
  /** `n` standard normals. Calls advance one stream. */
  randn(n: number): Float32Array;
}

/** The part of a request that says where the loop begins. */
export interface StartRequest {
  /** Pixels; for image-to-image the picture's own size counts. */
  height: number;
  width: number;
  /** One generator for all images, or one each. */
  generators: readonly NoiseGenerator[];
  /** [1, 3, h, w] in [-1, 1]. */
  image?: Latents;
  /** [1, 1, h, w], 1 where to paint anew. */
  mask?: Latents;
  /** The part of the steps to do over a picture: 0.3 where absent, 0.8 under a ControlNet, 0.9999 with a mask. */
  strength?: number;
  /** Latents to go on from: with their noise where `denoising_start` says so, else a finished picture's. */
  latents?: Latents;
  denoising_start?: number;
  vae_tiling?: boolean;
}

/** What a picture is encoded with. `ratio` is pixels per latent. */
interface Coder {
  vae: Autoencoder;
  ratio: number;
}

export interface Start {
  /** Of the latents, [n, c, h, w]. */
  shape: readonly number[];
  /** The latents, whose noise is drawn now: the device may be at work on the prompts meanwhile. */
  begin: () => Float32Array;
  draw: () => Float32Array;
  /** Inpainting puts the known part back, noised to the level of the next step. */
  afterStep?: (x: Float32Array, index: number) => Float32Array;
}

/** The part of the steps that are done over a picture where the request does not say: the defaults of diffusers' pipelines. */
export const strengthOf = ({
  strength,
  mask,
  control_image,
}: Pick<StartRequest, 'strength' | 'mask'> & { control_image?: readonly unknown[] }): number =>
  strength ?? (mask ? 0.9999 : control_image?.length ? 0.8 : 0.3);

/** Standard normal noise of a batch: one stream, or one per image. */
const drawNoise = (generators: readonly NoiseGenerator[], count: number): Float32Array =>
  joined(generators.map((generator) => generator.randn(count / generators.length)));

export function startOf(
  coder: Coder,
  request: StartRequest,
  sampler: Sampler,
  plan: Plan,
  images: number,
): Start {
  const { generators, image, latents } = request;
  if (image) return overPicture(coder, { ...request, image }, sampler, plan, images);
  // What comes from a run that stopped on its way has its noise; a finished picture gets it here.
  if (latents) {
    const draw = () => drawNoise(generators, latents.data.length);
    const { shape, data } = latents;
    const [, , h, w] = shape;
    checkShape('latents', latents, [images, coder.vae.config.latent_channels, h, w]);
    const noisy = request.denoising_start !== undefined;
    return { shape, draw, begin: () => (noisy ? data : sampler.addNoise(plan, data, draw())) };
  }
  const channels = coder.vae.config.latent_channels;
  const shape = [images, channels, request.height / coder.ratio, request.width / coder.ratio];
  const count = shape.reduce((a, b) => a * b, 1);
  const draw = () => drawNoise(generators, count);
  return { shape, draw, begin: () => draw().map((x) => x * plan.initNoiseSigma) };
}

/** Image-to-image and inpainting. With latents beside the picture, those go on and the picture is what a mask keeps. */
function overPicture(
  coder: Coder,
  request: StartRequest & { image: Latents },
  sampler: Sampler,
  plan: Plan,
  images: number,
): Start {
  const { generators, image, mask, vae_tiling: tiling = false } = request;
  const [h, w] = image.shape.slice(2).map((side) => side - (side % coder.ratio));
  checkShape('image', image, [1, 3, h, w]);
  // Of several generators each draws its own image's encoding, but inpainting encodes once, with the first.
  const encoders = mask ? generators.slice(0, 1) : generators;
  const encoded = encoders.map((own) =>
    encodeImage(coder.vae, image, (count) => drawNoise([own], count), tiling),
  );
  const known = stacked(encoded.length === images ? encoded : Array<Latents>(images).fill(encoded[0]));
  const { shape } = known;
  if (request.latents) checkShape('latents', request.latents, shape);
  const from = request.latents?.data ?? known.data;
  const draw = () => drawNoise(generators, known.data.length);
  // Told where to start, diffusers takes the picture for one that has its noise already.
  const noisy = request.denoising_start !== undefined;
  if (!mask) return { shape, draw, begin: () => (noisy ? from : sampler.addNoise(plan, from, draw())) };
  const noise = draw();
  // Diffusers also encodes the masked picture for a UNet of nine channels; with four only its draw remains.
  if (coder.vae.posterior) drawNoise(encoders, known.data.length / images);
  const pure = () => noise.map((x) => x * plan.initNoiseSigma);
  const noised = () => (strengthOf(request) >= 1 ? pure() : sampler.addNoise(plan, from, noise));
  const knownAt = (i: number) => (i < plan.end ? sampler.addNoise(plan, known.data, noise, i) : known.data);
  return {
    ...{ shape, draw },
    begin: () => (noisy ? from : noised()),
    afterStep: keepKnown(mask, known, knownAt),
  };
}

/** @throws UserError where a program's own numbers do not fit the rest of its request */
function checkShape(name: string, { shape, data }: Latents, wanted: readonly number[]): void {
  if (`${shape}` === `${wanted}` && data.length === wanted.reduce((a, b) => a * b, 1)) return;
  throw new UserError(
    `${name}: ${data.length} numbers of shape [${shape.join(', ')}], where the request takes [${wanted.join(', ')}]`,
  );
}

function keepKnown(mask: Latents, { shape }: Latents, knownAt: (index: number) => Float32Array) {
  const [, , h, w] = shape;
  const [, , mh, mw] = mask.shape;
  // Nearest, as torch's interpolate picks them.
  const small = Float32Array.from(
    { length: h * w },
    (_, p) => mask.data[Math.floor((Math.floor(p / w) * mh) / h) * mw + Math.floor(((p % w) * mw) / w)],
  );
  return (x: Float32Array, index: number): Float32Array => {
    const known = knownAt(index + 1);
    return x.map((value, i) => (1 - small[i % (h * w)]) * known[i] + small[i % (h * w)] * value);
  };
}
