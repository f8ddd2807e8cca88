// What `npm run test:interop` draws with both programs: every scheduler with every spacing, and calls that no golden case
// has.
import { join } from 'node:path';
import { isEDM, schedulerClasses, schedulerDefaults } from '../../models/samplers/config.ts';
import { goldenFolder as golden, goldenLora } from '../support/golden.ts';
import type { Call, Settings } from './call.ts';

export const base = join(golden, 'tiny-sdxl');
const refiner = join(golden, 'tiny-sdxl-refiner');
export const adapter = goldenLora('lora/scaled_kohya.safetensors');
const plainAdapter = goldenLora('lora/plain_diffusers.safetensors');

const common = { prompt: 'a red fox', num_inference_steps: 5, guidance_scale: 5 };

/**
 * DPM++ SDE takes its noise from a Brownian tree in diffusers, seeded apart from the generator: not comparable. EDM's draw with models of
 * their own, and k-diffusion's functions are none of its.
 */
const comparable = schedulerClasses.filter(
  (name) => name.endsWith('Scheduler') && name !== 'DPMSolverSDEScheduler' && !isEDM(name),
);

const schedulers = comparable.flatMap((name) =>
  ['leading', 'trailing', 'linspace'].flatMap((timestep_spacing) => {
    const karras = 'use_karras_sigmas' in schedulerDefaults[name] ? [false, true] : [false];
    return karras.map((use_karras_sigmas) => ({
      label: `${name}, ${timestep_spacing}${use_karras_sigmas ? ', Karras' : ''}`,
      scheduler: {
        class: name,
        config: use_karras_sigmas ? { timestep_spacing, use_karras_sigmas } : { timestep_spacing },
      },
    }));
  }),
);

const small = { height: 64, width: 64 };
const named = (name: string) => ({ scheduler: { class: name } });
type Short = Partial<Omit<Call, 'label' | 'pipeline'>>;

const textToImage: Record<string, Short> = {
  'sides that differ': { settings: { width: 72, height: 200 } },
  'guidance rescale': { settings: { guidance_scale: 7.5, guidance_rescale: 0.7 } },
  'barely any guidance': { settings: { guidance_scale: 1.01 } },
  'guidance 0': { settings: { guidance_scale: 0 } },
  'one step': { settings: { num_inference_steps: 1 } },
  'no text': { settings: { prompt: '' } },
  'a prompt past 77 tokens': { settings: { prompt: 'a very long prompt about a fox '.repeat(20) } },
  'two prompts, two negative ones, clip skip': {
    settings: {
      ...{ prompt_2: 'painting of a fox', negative_prompt: 'ugly', negative_prompt_2: 'hands', clip_skip: 2 },
    },
  },
  'second prompts that are empty': {
    settings: { prompt_2: '', negative_prompt: 'ugly', negative_prompt_2: '' },
  },
  'a second negative prompt alone': { settings: { negative_prompt_2: 'bad hands' } },
  'all micro-conditioning, two images': {
    settings: {
      ...{ original_size: [100, 200], crops_coords_top_left: [3, 8], target_size: [96, 64] },
      ...{ negative_original_size: [50, 60], negative_crops_coords_top_left: [1, 2] },
      ...{ negative_target_size: [33, 44], num_images_per_prompt: 2 },
    },
  },
  'one negative size alone': { settings: { negative_original_size: [50, 60] } },
  'three images': { settings: { num_images_per_prompt: 3, negative_prompt: 'x' } },
  'two images, ancestral': {
    settings: { num_images_per_prompt: 2 },
    ...named('EulerAncestralDiscreteScheduler'),
  },
  'DDIM with noise': { settings: { eta: 0.4 }, ...named('DDIMScheduler') },
  'TCD with noise': { settings: { eta: 0.3 }, ...named('TCDScheduler') },
  'DPM++ 2M SDE Karras': {
    scheduler: {
      class: 'DPMSolverMultistepScheduler',
      config: { algorithm_type: 'sde-dpmsolver++', use_karras_sigmas: true },
    },
  },
  'Heun that stops on its way': {
    settings: { denoising_end: 0.55, num_inference_steps: 7 },
    ...named('HeunDiscreteScheduler'),
  },
  'an adapter at 0.6': { loras: [[adapter, 0.6]] },
  'two adapters': {
    loras: [
      [plainAdapter, 0.6],
      [adapter, -0.4],
    ],
  },
};

/** The golden picture is 128x128; `odd` is 117x149 and is cut to 112x144. */
function overPictures(odd: string, oddMask: string): Record<string, [Call['pipeline'], Short]> {
  const image = { image: odd, num_inference_steps: 9 };
  const masked = { image: odd, mask_image: oddMask, width: 112, height: 144, num_inference_steps: 6 };
  const over = Object.fromEntries(
    comparable.map((name): [string, [Call['pipeline'], Short]] => [
      `image to image, ${name}`,
      ['img2img', { settings: { ...image, strength: 0.55 }, ...named(name) }],
    ]),
  );
  return {
    ...over,
    'image to image at the default strength': ['img2img', { settings: image }],
    'image to image from nothing but its noise': ['img2img', { settings: { ...image, strength: 1 } }],
    'image to image, corner and sizes': [
      'img2img',
      {
        settings: {
          ...{ ...image, strength: 0.6, num_images_per_prompt: 2, crops_coords_top_left: [3, 8] },
          ...{ target_size: [33, 22], negative_original_size: [50, 60] },
        },
      },
    ],
    'image to image, a part of the way': [
      'img2img',
      { settings: { ...image, denoising_start: 0.4, denoising_end: 0.8 } },
    ],
    'inpainting at the default strength': ['inpaint', { settings: masked }],
    'inpainting at 0.6, two images': [
      'inpaint',
      { settings: { ...masked, strength: 0.6, num_images_per_prompt: 2 } },
    ],
    'inpainting at 1, ancestral': [
      'inpaint',
      { settings: { ...masked, strength: 1 }, ...named('EulerAncestralDiscreteScheduler') },
    ],
    'inpainting, Heun': ['inpaint', { settings: masked, ...named('HeunDiscreteScheduler') }],
    'inpainting at another size': ['inpaint', { settings: { ...masked, width: 80, height: 96 } }],
  };
}

const steps = { num_inference_steps: 10 };
const hands = (at: number, more: Settings = {}, scheduler?: Call['scheduler']): Short => ({
  settings: { ...steps, ...more, denoising_end: at },
  refiner: { model: refiner, settings: { ...common, ...steps, ...more, denoising_start: at } },
  scheduler,
});
const refined: Record<string, Short> = {
  'base and refiner': hands(0.8, { negative_prompt: 'bad' }),
  'base and refiner, two prompts': hands(0.8, {
    ...{ prompt_2: 'oil painting', negative_prompt: 'bad', negative_prompt_2: 'text' },
  }),
  'base and refiner, two images': hands(0.6, { num_images_per_prompt: 2 }),
  'base and refiner, DPM++ 2M': hands(0.7, {}, { class: 'DPMSolverMultistepScheduler' }),
  'base and refiner, ancestral': hands(0.7, {}, { class: 'EulerAncestralDiscreteScheduler' }),
  'refiner over finished pictures': {
    settings: { ...steps, num_images_per_prompt: 2 },
    refiner: { model: refiner, settings: { ...common, ...steps, num_images_per_prompt: 2, strength: 0.5 } },
  },
  'refiner over a finished picture at its default': {
    settings: steps,
    refiner: {
      model: refiner,
      settings: { ...common, ...steps, aesthetic_score: 7.5, negative_aesthetic_score: 1 },
    },
  },
};

/** Under control of what lies in `full` and `small`, by pictures of other sides than the drawn. */
function controlled(
  { odd, oddMask }: Pictures,
  { full, small: little }: ControlNets,
): Record<string, [Call['pipeline'], Short]> {
  const masked = { image: odd, mask_image: oddMask, width: 112, height: 144, num_inference_steps: 6 };
  const over = { image: odd, width: 112, height: 144, num_inference_steps: 9 };
  const one: Short = { controlnets: [[full, odd, 0.7]] };
  const two: Short = {
    controlnets: [
      [full, odd, 0.7],
      [little, oddMask, 1.2],
    ],
  };
  return {
    'a ControlNet': ['text2img', { controlnets: [[full, odd]] }],
    'a ControlNet, two images, ancestral': [
      'text2img',
      { ...one, settings: { num_images_per_prompt: 2 }, ...named('EulerAncestralDiscreteScheduler') },
    ],
    'a ControlNet in a part of the steps, DPM++ 2M': [
      'text2img',
      {
        ...one,
        settings: { num_inference_steps: 11, control_guidance_start: 0.1, control_guidance_end: 0.64 },
        ...named('DPMSolverMultistepScheduler'),
      },
    ],
    'a ControlNet without guidance': ['text2img', { ...one, settings: { guidance_scale: 1 } }],
    'two ControlNets, UniPC': ['text2img', { ...two, ...named('UniPCMultistepScheduler') }],
    'two ControlNets, PNDM, until half': [
      'text2img',
      { ...two, settings: { control_guidance_end: 0.5 }, ...named('PNDMScheduler') },
    ],
    'a ControlNet and a refiner': ['text2img', { ...hands(0.7), ...one }],
    'a ControlNet over a picture': ['img2img', { controlnets: [[full, odd]], settings: over }],
    'two ControlNets over a picture, Heun, from 0.3 on': [
      'img2img',
      {
        ...two,
        settings: { ...over, strength: 0.6, control_guidance_start: 0.3 },
        ...named('HeunDiscreteScheduler'),
      },
    ],
    'a ControlNet in a part of a picture': ['inpaint', { ...one, settings: masked }],
    'two ControlNets in a part of a picture, two images': [
      'inpaint',
      { ...two, settings: { ...masked, strength: 0.7, num_images_per_prompt: 2 } },
    ],
  };
}

/** In a part of a picture, by an inpainting model. */
function seeing(
  { odd, oddMask }: Pictures,
  { full }: ControlNets,
  model: string,
): Record<string, [Call['pipeline'], Short]> {
  const masked = { image: odd, mask_image: oddMask, width: 112, height: 144, num_inference_steps: 6 };
  const calls: Record<string, Short> = {
    'at the default strength': { settings: masked },
    'at 0.6, two images, ancestral': {
      settings: { ...masked, strength: 0.6, num_images_per_prompt: 2 },
      ...named('EulerAncestralDiscreteScheduler'),
    },
    'at 1, without guidance, DPM++ 2M': {
      settings: { ...masked, strength: 1, guidance_scale: 1 },
      ...named('DPMSolverMultistepScheduler'),
    },
    'with an adapter': { settings: masked, loras: [[adapter, 0.6]] },
    'under a ControlNet': { settings: masked, controlnets: [[full, odd, 0.7]] },
  };
  return Object.fromEntries(
    Object.entries(calls).map(([label, call]) => [
      `an inpainting model ${label}`,
      ['inpaint', { ...call, model }],
    ]),
  );
}

/** With models as those that were trained under EDM's noise. */
function underEDM(
  { odd }: Pictures,
  { full }: ControlNets,
  { playground, cosxl }: EDMModels,
): Record<string, [Call['pipeline'], Short]> {
  const over = { image: odd, strength: 0.6, num_inference_steps: 6 };
  return {
    'as Playground': ['text2img', { model: playground, settings: { num_images_per_prompt: 2 } }],
    'as Playground, Euler': ['text2img', { model: playground, ...named('EDMEulerScheduler') }],
    'as Playground, over a picture': ['img2img', { model: playground, settings: over }],
    'as Playground, under a ControlNet': ['text2img', { model: playground, controlnets: [[full, odd, 0.7]] }],
    'as CosXL': ['text2img', { model: cosxl, loras: [[adapter, 0.6]] }],
    'as CosXL, over a picture': ['img2img', { model: cosxl, settings: over }],
  };
}

/** By pictures, through what lies in `plain` and `plus`. */
function byPictures(
  { odd, oddMask }: Pictures,
  { full }: ControlNets,
  { plain, plus }: IPAdapters,
): Record<string, [Call['pipeline'], Short]> {
  const masked = { image: odd, mask_image: oddMask, width: 112, height: 144, num_inference_steps: 6 };
  const one: Short = { ipAdapters: [[plain, odd, 0.7]] };
  const two: Short = {
    ipAdapters: [
      [plain, odd, 0.7],
      [plus, oddMask, -0.5],
    ],
  };
  return {
    'an IP-Adapter': ['text2img', { ipAdapters: [[plain, odd]] }],
    'a plus IP-Adapter, two images, ancestral': [
      'text2img',
      {
        ipAdapters: [[plus, odd, 0.6]],
        settings: { num_images_per_prompt: 2 },
        ...named('EulerAncestralDiscreteScheduler'),
      },
    ],
    'an IP-Adapter without guidance': ['text2img', { ...one, settings: { guidance_scale: 1 } }],
    'two IP-Adapters, DPM++ 2M': ['text2img', { ...two, ...named('DPMSolverMultistepScheduler') }],
    'an IP-Adapter and a refiner': ['text2img', { ...hands(0.7), ...one }],
    'two IP-Adapters over a picture': ['img2img', { ...two, settings: { image: odd, strength: 0.6 } }],
    'an IP-Adapter in a part of a picture, two images': [
      'inpaint',
      { ...one, settings: { ...masked, num_images_per_prompt: 2 } },
    ],
    'an IP-Adapter beside a ControlNet': ['text2img', { ...two, controlnets: [[full, odd, 0.7]] }],
  };
}

/** What lies in `edges` and `sketch` follows pictures of other sides than the drawn, the latter in grey. */
function followed(
  { odd, oddMask }: Pictures,
  { edges, sketch }: T2IAdapters,
  { plain }: IPAdapters,
): Record<string, Short> {
  const one: Short = { t2iAdapters: [[edges, odd, 0.8]] };
  return {
    'a T2I-Adapter': { t2iAdapters: [[edges, odd]] },
    'a T2I-Adapter for grey pictures, two images, ancestral': {
      ...{ t2iAdapters: [[sketch, odd]], settings: { num_images_per_prompt: 2, width: 80, height: 48 } },
      ...named('EulerAncestralDiscreteScheduler'),
    },
    'two T2I-Adapters in half of the steps, DPM++ 2M': {
      t2iAdapters: [
        [edges, odd, 0.6],
        [sketch, oddMask, 1.2],
      ],
      settings: { adapter_conditioning_factor: 0.5 },
      ...named('DPMSolverMultistepScheduler'),
    },
    'a T2I-Adapter beside an IP-Adapter, without guidance': {
      ...{ ...one, ipAdapters: [[plain, odd, 0.7]], settings: { guidance_scale: 1 } },
    },
    'a T2I-Adapter and a refiner': { ...hands(0.6), ...one },
  };
}

export interface Pictures {
  odd: string;
  oddMask: string;
}

interface ControlNets {
  full: string;
  small: string;
}

interface IPAdapters {
  plain: string;
  plus: string;
}

interface T2IAdapters {
  edges: string;
  sketch: string;
}

export interface EDMModels {
  playground: string;
  cosxl: string;
}

export function allCalls(
  pictures: Pictures,
  controlnets: ControlNets,
  t2iAdapters: T2IAdapters,
  ipAdapters: IPAdapters,
  inpainting: string,
  edm: EDMModels,
): Call[] {
  const overNoise = { ...textToImage, ...refined, ...followed(pictures, t2iAdapters, ipAdapters) };
  const short: [label: string, pipeline: Call['pipeline'], call: Short][] = [
    ...schedulers.map(({ label, scheduler }, i): [string, 'text2img', Short] => [
      label,
      'text2img',
      { scheduler, settings: { num_inference_steps: 3 + (i % 6) } },
    ]),
    ...Object.entries(overNoise).map(([label, call]): [string, 'text2img', Short] => [
      label,
      'text2img',
      call,
    ]),
    ...Object.entries({
      ...overPictures(pictures.odd, pictures.oddMask),
      ...controlled(pictures, controlnets),
      ...seeing(pictures, controlnets, inpainting),
      ...byPictures(pictures, controlnets, ipAdapters),
      ...underEDM(pictures, controlnets, edm),
    }).map(([label, [pipeline, call]]): [string, Call['pipeline'], Short] => [label, pipeline, call]),
  ];
  return short.map(([label, pipeline, call], i) => {
    const size = pipeline === 'text2img' ? small : {};
    const settings = { ...common, ...size, ...call.settings };
    return { ...{ label, pipeline, model: base, seed: 100 + i }, ...call, settings };
  });
}
