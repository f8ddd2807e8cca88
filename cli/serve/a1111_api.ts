// The routes of A1111's API (`/sdapi/v1`) that a client draws with, in A1111's words and with its habits: weights in prompts are read, and
// so are long ones, and a sampler without a schedule type takes A1111's own for it. What changes a picture there and is not here is
// refused unless it is as good as left out; what only says what to keep on its disk is passed over.
import { UserError } from '../../io/errors.ts';
import { pngText } from '../../io/png.ts';
import { samplerLabels, schedulerOf } from '../a1111.ts';
import { hiresUpscalers } from '../hires_options.ts';
import { oneOf, side } from '../options.ts';
import { controlnetApi, controlsIn } from './controlnet_api.ts';
import { base64, type Field, numeric, only, pictureBytes, readFields, text, unheeded } from './fields.ts';
import type { Asked, Reply, Routes } from './http.ts';
import type { Drawn, Order, Settings } from './messages.ts';
import type { Queue } from './queue.ts';
import type { Served } from './served.ts';
import { mostPictures, mostSide, mostSteps } from './served.ts';

/** The schedule types that its samplers take by themselves ("Automatic"), where it is not one of timesteps. */
const ownTypes: Readonly<Record<string, string>> = {
  'DPM++ 2M': 'Karras',
  'DPM++ SDE': 'Karras',
  'DPM++ 2M SDE': 'Exponential',
  'DPM++ 2M SDE Heun': 'Exponential',
  DPM2: 'Karras',
  'DPM2 a': 'Karras',
};

const scheduleTypes = [
  'Automatic',
  'Uniform',
  'Karras',
  'Exponential',
  'SGM Uniform',
  'Simple',
  'Beta',
] as const;

/** Its names and labels of one thing: `sgm_uniform` is "SGM Uniform". */
const plain = (name: string): string => name.toLowerCase().replace(/[^a-z0-9+]/g, '');
const labelled = <T extends string>(key: string, value: string, labels: readonly T[]): T =>
  labels.find((label) => plain(label) === plain(value)) ?? oneOf(key, labels)(value);

const sideOf =
  (option: 'width' | 'height'): Field =>
  (value, key) => ({ ...numeric(option, { max: mostSide })(value, key), [option]: side(key)(String(value)) });

const isTrue: Field = (value, key) => {
  if (typeof value !== 'boolean')
    throw new UserError(`${key} takes true or false, not ${JSON.stringify(value)}`);
  return {};
};

/** Keys that every picture heeds. */
const picture: Readonly<Record<string, Field>> = {
  prompt: (value, key) => ({ prompt: [`${text('prompt2')(value, key).prompt2}`] }),
  negative_prompt: text('negativePrompt'),
  seed: numeric('seed', { min: -1, max: 2 ** 53 - 1, whole: true }),
  steps: numeric('steps', { min: 1, max: mostSteps, whole: true }),
  cfg_scale: numeric('guidanceScale', { min: 0 }),
  image_cfg_scale: numeric('imageGuidanceScale', { min: 0 }),
  width: sideOf('width'),
  height: sideOf('height'),
  eta: numeric('eta', { min: 0, max: 1 }),
};

/** Keys that readers below take apart. */
const taken = [
  ...[
    'sampler_name',
    'sampler_index',
    'scheduler',
    'batch_size',
    'n_iter',
    'override_settings',
    'send_images',
  ],
  ...['enable_hr', 'hr_scale', 'hr_upscaler', 'hr_second_pass_steps', 'hr_resize_x', 'hr_resize_y'],
  ...[
    'alwayson_scripts',
    'denoising_strength',
    'init_images',
    'mask',
    'inpaint_full_res',
    'inpaint_full_res_padding',
  ],
];

/** Keys that say nothing of the picture here, or that only what follows them would. */
const idle = [
  ...[
    'save_images',
    'do_not_save_samples',
    'do_not_save_grid',
    'override_settings_restore_afterwards',
    'comments',
  ],
  ...[
    'force_task_id',
    'disable_extra_networks',
    'include_init_images',
    'subseed',
    's_tmax',
    'hr_additional_modules',
  ],
  ...[
    'mask_blur',
    'mask_blur_x',
    'mask_blur_y',
    'mask_round',
    'clip_skip',
    'infotext',
    'initial_noise_multiplier',
  ],
];

/** Keys of what is not there, with what leaves it out. */
const absent: Readonly<Record<string, Field>> = {
  restore_faces: only(false),
  tiling: only(false),
  subseed_strength: only(0),
  seed_resize_from_h: only(-1, 0),
  seed_resize_from_w: only(-1, 0),
  styles: only([]),
  s_churn: only(0),
  s_tmin: only(0),
  s_noise: only(1),
  s_min_uncond: only(0),
  script_name: only(''),
  script_args: only([]),
  refiner_checkpoint: only(''),
  refiner_switch_at: only(0, 1),
  firstphase_width: only(0),
  firstphase_height: only(0),
  hr_checkpoint_name: only('', 'Use same checkpoint'),
  hr_sampler_name: only('', 'Use same sampler'),
  hr_scheduler: only('', 'Use same scheduler'),
  hr_prompt: only(''),
  hr_negative_prompt: only(''),
  inpainting_fill: only(1),
  inpainting_mask_invert: only(0),
  resize_mode: only(0),
  latent_mask: only(''),
};

const nothing = (keys: readonly string[]) => Object.fromEntries(keys.map((key) => [key, unheeded]));
const fields = { ...picture, ...nothing(taken), ...nothing(idle), ...absent };

const asText = (body: Body, key: string): string | undefined => {
  const value = body[key] ?? undefined;
  if (value === undefined || value === '') return undefined;
  if (typeof value !== 'string') throw new UserError(`${key} takes a text, not ${JSON.stringify(value)}`);
  return value;
};

type Body = Readonly<Record<string, unknown>>;

/** The sampler and how its noise levels lie. */
function samplerOf(body: Body): Settings {
  const name = asText(body, 'sampler_name') ?? asText(body, 'sampler_index');
  const type = labelled('scheduler', asText(body, 'scheduler') ?? 'Automatic', scheduleTypes);
  if (name === undefined) return {};
  const label = Object.keys(ownTypes).find((each) => plain(each) === plain(name));
  const own = label === undefined ? type : ownTypes[label];
  const { unheeded: left, ...laidOut } = schedulerOf(name, type === 'Automatic' ? own : type);
  if (left) throw new UserError(`scheduler "${left}" is not there for ${name}; take Automatic`);
  return laidOut;
}

/** So many pictures, from the seeds that follow. */
function countOf(body: Body): Settings {
  const bounds = { min: 1, max: mostPictures, whole: true };
  const [size, iterations] = ['batch_size', 'n_iter'].map(
    (key) => numeric('batchCount', bounds)(body[key] ?? 1, key).batchCount as number,
  );
  if (size * iterations > mostPictures)
    throw new UserError(
      `batch_size x n_iter is ${size * iterations}, and ${mostPictures} is the most at once`,
    );
  return { batchCount: size * iterations };
}

/** The second pass. A1111 takes 0 for what is not said. */
function hiresOf(body: Body): Settings {
  isTrue(body.enable_hr ?? false, 'enable_hr');
  if (body.enable_hr !== true) return {};
  const said = (key: string) => (body[key] === 0 ? undefined : (body[key] ?? undefined));
  const [width, height] = ['hr_resize_x', 'hr_resize_y'].map(said);
  const isSized = (width ?? height) !== undefined;
  const keys: Record<string, [value: unknown, field: Field]> = {
    hr_scale: [isSized ? undefined : said('hr_scale'), numeric('hiresScale', { min: 1, max: 8 })],
    hr_resize_x: [width, (value, key) => ({ hiresWidth: side(key)(String(value)) })],
    hr_resize_y: [height, (value, key) => ({ hiresHeight: side(key)(String(value)) })],
    hr_second_pass_steps: [
      said('hr_second_pass_steps'),
      numeric('hiresSteps', { min: 1, max: mostSteps, whole: true }),
    ],
    denoising_strength: [
      said('denoising_strength') ?? 0.75,
      numeric('hiresDenoisingStrength', { min: 0.01, max: 1 }),
    ],
    hr_upscaler: [
      asText(body, 'hr_upscaler'),
      (value, key) => ({ hiresUpscaler: labelled(key, String(value), hiresUpscalers) }),
    ],
  };
  const read = Object.entries(keys).map(([key, [value, field]]) =>
    value === undefined ? {} : field(value, key),
  );
  return Object.assign({ hires: true }, ...read);
}

/** What is drawn over. */
function overOf(body: Body): Order {
  const images = body.init_images;
  if (!Array.isArray(images) || images.length !== 1)
    throw new UserError('init_images takes a list of one picture in base64');
  const image = pictureBytes(images[0], 'init_images');
  const strength = numeric('strength', { min: 0, max: 1 })(
    body.denoising_strength ?? 0.75,
    'denoising_strength',
  );
  if ((body.mask ?? undefined) === undefined)
    return { settings: { image: 'init_images', ...strength }, pictures: { init_images: image } };
  const inFull = body.inpaint_full_res ?? true; // "only masked", its default
  const padding = numeric('paddingMaskCrop', { min: 0, max: mostSide, whole: true });
  const part = inFull ? padding(body.inpaint_full_res_padding ?? 0, 'inpaint_full_res_padding') : {};
  return {
    settings: { image: 'init_images', mask: 'mask', ...strength, ...part },
    pictures: { init_images: image, mask: pictureBytes(body.mask, 'mask') },
  };
}

/** Another checkpoint than the one that is open cannot be had. */
function checkOverrides(value: unknown, served: Served): void {
  const overrides = typeof value === 'object' && value !== null ? value : {};
  for (const [key, wanted] of Object.entries(overrides)) {
    if (key === 'sd_model_checkpoint' && wanted !== null && wanted !== '' && wanted !== served.name)
      throw new UserError(
        `this server draws with ${served.name} alone; start another for ${JSON.stringify(wanted)}`,
      );
    if (!['sd_model_checkpoint', 'CLIP_stop_at_last_layers', 'sd_vae'].includes(key)) served.tellIgnored(key);
  }
}

export function a1111Api(served: Served, queue: Queue): Routes {
  const draw = async ({ json, signal }: Asked, over: (body: Body) => Order): Promise<Reply> => {
    const body = await json();
    const settings = readFields(body, fields, served.tellIgnored);
    if (settings.prompt?.[0].match(/<(lora|lyco|hypernet):[^<>]+>/))
      throw new UserError(
        'a prompt takes no <lora:NAME:1>; this server has the adapters that it was started with (--lora)',
      );
    checkOverrides(body.override_settings, served);
    const [drawnOver, controls] = [over(body), controlsIn(body.alwayson_scripts, served)];
    const habits: Settings = { emphasis: 'original', maxTokenLength: 225, prompt: [''], ...served.texts };
    const order = {
      settings: {
        ...habits,
        ...settings,
        ...samplerOf(body),
        ...countOf(body),
        ...drawnOver.settings,
        ...controls.settings,
      },
      pictures: { ...drawnOver.pictures, ...controls.pictures },
    };
    const drawn = await queue.draw(order, signal);
    const { init_images: _, mask: __, alwayson_scripts: ___, ...parameters } = body;
    const images = body.send_images === false ? [] : drawn.map(({ png }) => base64(png));
    return { json: { images, parameters, info: JSON.stringify(infoOf(order.settings, drawn)) } };
  };
  return {
    ...controlnetApi(served),
    'POST /sdapi/v1/txt2img': (asked) => draw(asked, (body) => ({ settings: hiresOf(body), pictures: {} })),
    'POST /sdapi/v1/img2img': (asked) => draw(asked, overOf),
    'GET /sdapi/v1/progress': ({ url }) =>
      progress(queue, url.searchParams.get('skip_current_image') !== 'true'),
    'POST /sdapi/v1/interrupt': () => {
      queue.interrupt();
      return { json: {} };
    },
    'POST /sdapi/v1/png-info': async ({ json }) => {
      const { image } = await json();
      const items = pngText(pictureBytes(image, 'image'), 'image');
      return { json: { info: items.parameters ?? '', items, parameters: {} } };
    },
    'GET /sdapi/v1/options': () => ({ json: { sd_model_checkpoint: served.name, samples_format: 'png' } }),
    'POST /sdapi/v1/options': async ({ json }) => {
      checkOverrides(await json(), served);
      return { json: {} };
    },
    'GET /sdapi/v1/sd-models': () => ({
      json: [
        {
          title: served.name,
          model_name: served.name,
          hash: null,
          sha256: null,
          filename: served.name,
          config: null,
        },
      ],
    }),
    'GET /sdapi/v1/sd-vae': () => ({ json: [] }),
    'GET /sdapi/v1/loras': () => ({
      json: served.loras.map((name) => ({ name, alias: name, path: name, metadata: {} })),
    }),
    'GET /sdapi/v1/samplers': () => ({
      json: Object.values(samplerLabels).map((name) => ({ name, aliases: [plain(name)], options: {} })),
    }),
    'GET /sdapi/v1/schedulers': () => ({
      json: scheduleTypes.map((label) => ({
        name: label.toLowerCase().replaceAll(' ', '_'),
        label,
        aliases: null,
      })),
    }),
    'GET /sdapi/v1/upscalers': () => ({ json: upscalers((name) => !name.startsWith('Latent')) }),
    'GET /sdapi/v1/latent-upscale-modes': () => ({ json: upscalers((name) => name.startsWith('Latent')) }),
  };
}

const upscalers = (isOne: (name: string) => boolean) =>
  hiresUpscalers
    .filter(isOne)
    .map((name) => ({ name, model_name: null, model_path: null, model_url: null, scale: 4 }));

/** How far the picture at work is; the newest look at it, and a wish for the next. */
function progress(queue: Queue, withImage: boolean): Reply {
  const working = queue.working();
  if (withImage) queue.look();
  const share = working?.share ?? 0;
  const seconds = working ? (performance.now() - working.began) / 1000 : 0;
  const jobs = queue.waiting() + Number(working !== undefined);
  return {
    json: {
      progress: share,
      eta_relative: share > 0 ? (seconds / share) * (1 - share) : 0,
      state: {
        ...{ skipped: false, interrupted: false, job: working ? 'txt2img' : '', job_count: jobs, job_no: 0 },
        ...{ sampling_step: working?.step ?? 0, sampling_steps: working?.steps ?? 0 },
      },
      current_image: withImage && working?.preview ? base64(working.preview) : null,
      textinfo: null,
    },
  };
}

/** What A1111 tells of the pictures, of which clients read seeds and texts. */
function infoOf(
  { prompt: [prompt] = [''], negativePrompt = '', batchCount }: Settings,
  drawn: readonly Drawn[],
) {
  const seeds = drawn.map(({ seed }) => seed);
  return {
    ...{ prompt, all_prompts: drawn.map(() => prompt) },
    ...{ negative_prompt: negativePrompt, all_negative_prompts: drawn.map(() => negativePrompt) },
    ...{ seed: seeds[0] ?? -1, all_seeds: seeds, subseed: -1, all_subseeds: seeds.map(() => -1) },
    ...{ batch_size: batchCount, index_of_first_image: 0 },
    infotexts: drawn.map(({ parameters }) => parameters),
  };
}
