// What the denoising loop starts from, and what follows each step: pure noise, a picture or its latents under noise, or what an earlier
// stage left under its own. The order of draws is diffusers', so that a seed gives the same numbers. Inpainting keeps the known part
// of the picture by putting it back after each step (RePaint's simple form, as diffusers does with a four-channel UNet), but for an
// inpainting model, which is shown it (control/inpainting.ts); an InstructPix2Pix model sees the picture too, and begins with noise.
import type { Device } from '../engine/device.ts';
import { add, mul } from '../engine/ops/binary.ts';
import { combine } from '../engine/ops/combine.ts';
import { concat } from '../engine/ops/move.ts';
import { torchNormal } from '../engine/ops/random.ts';
import { keep, scope } from '../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import { besideLatents, isInpainting, maskAt } from './control/inpainting.ts';
import { isInstructPix2Pix, originalLatents } from './control/instruct_pix2pix.ts';
import type { NoiseGenerator } from './random/generator.ts';
import type { Draw, Plan, Sampler } from './samplers/sampler.ts';
import type { UNetConfig } from './unet/unet.ts';
import type { Autoencoder } from './vae/autoencoder.ts';
import { checkShape, encodeImage, joined, type Latents, stacked, type VaeRequest } from './vae/latents.ts';

/** What A1111 has under a mask before drawing begins, besides pixels. */
export const latentContents = ['latent-noise', 'latent-nothing'] as const;

/** The part of a request that says where the loop begins. */
export interface StartRequest extends VaeRequest {
  /** Pixels; over a picture its own size counts. */
  height: number;
  width: number;
  /** One generator for all images, or one each. */
  generators: readonly NoiseGenerator[];
  /** Pixels [1, 3, h, w] in [-1, 1], or the latents of a picture, or of one for each image, as they are. */
  image?: Latents;
  /** [1, 1, h, w], 1 where to paint anew. */
  mask?: Latents;
  /**
   * What is under the mask in the picture's place when drawing begins: the seed's noise, with that of the first step above it, or
   * zeros. At a strength of 1 it begins with noise anyway.
   */
  masked_content?: (typeof latentContents)[number];
  /** The part of the steps to do over a picture: 0.3 where absent, 0.8 under a ControlNet, 0.9999 with a mask. */
  strength?: number;
  /**
   * What to begin with in place of what is drawn: noise of unit variance, or where `denoising_start` says so, and over a picture without
   * a mask, latents that have their noise already.
   */
  latents?: Latents;
  denoising_start?: number;
}

/** What a picture is encoded with, and for. `ratio` is pixels per latent. */
interface Coder {
  device: Device;
  vae: Autoencoder;
  ratio: number;
  unetConfig: UNetConfig;
}

export interface Start {
  /** Of the latents, [n, c, h, w]. */
  shape: readonly number[];
  /** The latents, whose noise is drawn now: the device may be at work on the prompts meanwhile. */
  begin(): Tensor;
  draw(): Tensor;
  /** Inpainting by a plain UNet puts the known part back, noised to the level of the next step. */
  afterStep?(x: Tensor, index: number): Tensor;
  /** What an inpainting or an InstructPix2Pix model sees beside the latents at each step. */
  beside?: Latents;
  release(): void;
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

/** The same on a device, which makes most of it there: by the host's arithmetic it takes a third of a GPU's step. */
const noiseOn = (device: Device, generators: readonly NoiseGenerator[], shape: readonly number[]): Tensor =>
  scope(() => {
    const count = sizeOf(shape) / generators.length;
    const parts = generators.map((generator) => {
      const words = generator.words?.(count);
      if (!words) return tensor(generator.randn(count), [count], { device });
      return torchNormal(tensor(words, [count], { device, dtype: 'int32' }));
    });
    return (parts.length === 1 ? parts[0] : concat(parts, 0)).reshape(...shape);
  });

/** The noise that pictures begin with. */
function firstNoiseOn(
  device: Device,
  generators: readonly NoiseGenerator[],
  shape: readonly number[],
): Tensor {
  if (generators.every(({ first }) => first === undefined)) return noiseOn(device, generators, shape);
  const own = [shape[0] / generators.length, ...shape.slice(1)];
  const parts = generators.map((each) => each.first?.(own) ?? each.randn(sizeOf(own)));
  return tensor(joined(parts), shape, { device });
}

export function startOf(
  coder: Coder,
  request: StartRequest,
  sampler: Sampler,
  plan: Plan,
  images: number,
): Start {
  const { generators, image, mask, latents, denoising_start } = request;
  const shape = [images, coder.vae.config.latent_channels, ...latentSides(request, coder.ratio)];
  if (latents) checkShape('latents', latents, shape);
  const onDevice = (data: Float32Array) => tensor(data, shape, { device: coder.device });
  const draw = () => noiseOn(coder.device, generators, shape);
  const drawFirst = () => firstNoiseOn(coder.device, generators, shape);
  if (image && mask) {
    const start = isInpainting(coder.unetConfig) ? seeing : paintingIn;
    return start(coder, { ...request, image, mask }, sampler, plan, { shape, draw, drawFirst });
  }
  const noise = () => combine([plan.initNoiseSigma, latents ? onDevice(latents.data) : drawFirst()]);
  if (image && isInstructPix2Pix(coder.unetConfig)) {
    const scaled = sampler.config.sigma_data !== undefined;
    const beside = originalLatents(coder, { ...request, image, scaled }, shape);
    return { shape, draw, beside, begin: () => scope(noise), release() {} };
  }
  const told = denoising_start !== undefined;
  const from = image && !latents ? latentsOf(coder, { ...request, image }, images) : undefined;
  const begin = () => {
    // Told where to start, diffusers takes the picture for one that has its noise already.
    if (latents && (told || image)) return onDevice(latents.data);
    if (from) return told ? onDevice(from.data) : sampler.addNoise(plan, onDevice(from.data), drawFirst());
    return noise();
  };
  return { shape, draw, begin: () => scope(begin), release() {} };
}

/** Sides of the latents: a picture's, cut to whole ones, or as asked. */
function latentSides({ image, height, width }: StartRequest, ratio: number): number[] {
  if (!image) return [height / ratio, width / ratio];
  const sides = image.shape.slice(2);
  return isPixels(image) ? sides.map((side) => Math.floor(side / ratio)) : sides;
}

/** Inpainting by a plain UNet. The picture is what the mask keeps, also where an earlier stage's latents go on. */
function paintingIn(
  coder: Coder,
  request: StartRequest & { image: Latents; mask: Latents },
  sampler: Sampler,
  plan: Plan,
  { shape, draw, drawFirst }: Pick<Start, 'shape' | 'draw'> & { drawFirst: Draw },
): Start {
  const { generators, image, mask, latents, denoising_start } = request;
  const { data: picture } = latentsOf(coder, request, shape[0]);
  const noisy = denoising_start !== undefined;
  const [known, noise, painted, kept] = scope(() => {
    const onDevice = (data: Float32Array) => tensor(data, shape, { device: coder.device });
    const noise = latents && !noisy ? onDevice(latents.data) : drawFirst();
    const { painted, kept } = partsOf(mask, shape, coder.device);
    return [onDevice(picture), noise, painted, kept];
  }).map(keep);
  // Diffusers encodes the masked picture here too; with four channels only its draw remains.
  if (coder.vae.posterior && isPixels(image)) drawNoise(generators.slice(0, 1), sizeOf(shape.slice(1)));
  // A caller's noise is all that diffusers begins with, at whatever strength.
  const pure = latents !== undefined || strengthOf(request) >= 1;
  const knownAt = (i: number) => (i < plan.end ? sampler.addNoise(plan, known, noise, i) : known);
  return {
    ...{ shape, draw },
    begin: () =>
      scope(() => {
        if (noisy) return latents ? tensor(latents.data, shape, { device: coder.device }) : known.handle();
        if (pure) return combine([plan.initNoiseSigma, noise]);
        return sampler.addNoise(plan, contentOf(request, known, noise, { painted, kept }), noise);
      }),
    afterStep: (x, index) => scope(() => add(mul(knownAt(index + 1), kept), mul(x, painted))),
    release() {
      for (const t of [known, noise, painted, kept]) t.release();
    },
  };
}

/** Ones where the mask marks and zeros elsewhere, for each of the latents, and the other way round. */
function partsOf(mask: Latents, shape: readonly number[], device: Device) {
  const plane = maskAt(mask, shape.slice(2));
  const painted = Float32Array.from({ length: sizeOf(shape) }, (_, i) => plane[i % plane.length]);
  return {
    painted: tensor(painted, shape, { device }),
    kept: tensor(
      painted.map((part) => 1 - part),
      shape,
      { device },
    ),
  };
}

/** What drawing begins with, before its noise: the picture's latents, with what is asked for where they are painted anew. */
function contentOf(
  { masked_content: content }: StartRequest,
  picture: Tensor,
  noise: Tensor,
  { painted, kept }: { painted: Tensor; kept: Tensor },
): Tensor {
  if (content === undefined) return picture;
  const known = mul(picture, kept);
  return content === 'latent-noise' ? add(known, mul(noise, painted)) : known;
}

/** Inpainting by a model for it. It begins as a plain UNet does; what it does not begin with is not encoded, nor drawn for. */
function seeing(
  coder: Coder,
  request: StartRequest & { image: Latents; mask: Latents },
  sampler: Sampler,
  plan: Plan,
  { shape, draw, drawFirst }: Pick<Start, 'shape' | 'draw'> & { drawFirst: Draw },
): Start {
  const { generators, latents, denoising_start } = request;
  const noisy = denoising_start !== undefined;
  const pure = !noisy && (latents !== undefined || strengthOf(request) >= 1);
  const given = noisy ? latents : undefined;
  const from = given ?? (pure ? undefined : latentsOf(coder, request, shape[0]));
  const { first, beside } = scope(() => {
    const onDevice = (data: Float32Array) => tensor(data, shape, { device: coder.device });
    const noise = latents && !noisy ? onDevice(latents.data) : drawFirst();
    const beginning = (): Tensor => {
      if (!from) return combine([plan.initNoiseSigma, noise]);
      if (noisy) return onDevice(from.data);
      const picture = onDevice(from.data);
      const content = request.masked_content
        ? contentOf(request, picture, noise, partsOf(request.mask, shape, coder.device))
        : picture;
      return sampler.addNoise(plan, content, noise);
    };
    const drawBeside = (count: number) => drawNoise(generators.slice(0, 1), count);
    return { first: beginning(), beside: besideLatents(coder, request, shape, drawBeside) };
  });
  keep(first);
  return { ...{ shape, draw, beside }, begin: () => first.handle(), release: () => first.release() };
}

const isPixels = ({ shape }: Latents): boolean => shape[1] === 3;

/** A picture's latents, a row for each image; pixels are encoded. */
function latentsOf(coder: Coder, request: StartRequest & { image: Latents }, images: number): Latents {
  const { image, mask, generators } = request;
  const [n, , ...sides] = image.shape;
  const rows = (parts: Latents[]) =>
    stacked(parts.length === images ? parts : Array<Latents>(images).fill(parts[0]));
  if (!isPixels(image)) {
    checkShape('image', image, [n === 1 ? 1 : images, coder.vae.config.latent_channels, ...sides]);
    return n === images ? image : rows([image]);
  }
  checkShape('image', image, [1, 3, ...sides.map((side) => side - (side % coder.ratio))]);
  // Of several generators each draws its own image's encoding, but inpainting encodes once, with the first.
  const encoders = mask ? generators.slice(0, 1) : generators;
  return rows(
    encoders.map((own) => encodeImage(coder.vae, image, (count) => drawNoise([own], count), request)),
  );
}
