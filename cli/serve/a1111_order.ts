// What a request in A1111's words comes to, with A1111's habits: weights in prompts are read, and so are long ones, and a sampler without a
// schedule type takes A1111's own for it. What changes a picture there and is not here is refused unless it is as good as left out; what
// only says what to keep on its disk is passed over.
import { UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import { side } from '../option_values.ts';
import { hiresUpscalers } from '../sample/hires_options.ts';
import { maskedContents } from '../sample/mask_options.ts';
import { chosenStyles, styled } from '../sample/styles.ts';
import { hiresSamplerOf, samplerOf } from './a1111_samplers.ts';
import { controlsIn, initImage } from './controlnet_api.ts';
import {
  type Body,
  booleanOf,
  type Field,
  labelled,
  numberOf,
  numeric,
  only,
  pictureBytes,
  prompt,
  readFields,
  said,
  spelled,
  text,
  textOf,
  unheeded,
} from './fields.ts';
import type { Order, Settings } from './messages.ts';
import { mostPictures, mostSide, mostSteps, type Served, usualStrength } from './served.ts';

const sideOf =
  (option: 'width' | 'height' | 'seedResizeFromW' | 'seedResizeFromH'): Field =>
  (value, key) => ({
    ...numeric(option, { max: mostSide })(value, key),
    [option]: side(key)(spelled(value)),
  });

const seedNumber = (option: 'seed' | 'subseed'): Field =>
  numeric(option, { min: -1, max: 2 ** 53 - 1, whole: true });

/** Keys that every picture heeds. */
const picture: Readonly<Record<string, Field>> = {
  prompt,
  negative_prompt: text('negativePrompt'),
  seed: seedNumber('seed'),
  steps: numeric('steps', { min: 1, max: mostSteps, whole: true }),
  cfg_scale: numeric('guidanceScale', { min: 0 }),
  image_cfg_scale: numeric('imageGuidanceScale', { min: 0 }),
  width: sideOf('width'),
  height: sideOf('height'),
  eta(value, key) {
    const eta = numberOf(value, key, { min: 0, max: 1 });
    return { eta, etaAncestral: eta }; // a sampler has one of them
  },
  tiling: (value, key) => (booleanOf(value, key) ? { seamless: 'xy' } : {}),
};

const words = (text: string): string[] => text.trim().split(/\s+/);

/** Keys that readers below take apart. */
const taken = words(`
  sampler_name sampler_index scheduler batch_size n_iter override_settings send_images alwayson_scripts denoising_strength
  init_images mask mask_blur mask_blur_x mask_blur_y inpainting_fill inpainting_mask_invert inpaint_full_res
  inpaint_full_res_padding enable_hr hr_scale hr_upscaler hr_second_pass_steps hr_resize_x hr_resize_y hr_prompt
  hr_negative_prompt hr_cfg hr_sampler_name hr_scheduler subseed subseed_strength seed_resize_from_w seed_resize_from_h`);

/** Keys that say nothing of the picture here, or that only what is refused below would heed. */
const idle = words(`
  save_images do_not_save_samples do_not_save_grid override_settings_restore_afterwards comments force_task_id
  include_init_images s_tmin s_tmax s_noise hr_additional_modules clip_skip script_args
  refiner_switch_at`);

/** Keys of what is not there, with what leaves it out. */
const absent: Readonly<Record<string, Field>> = {
  restore_faces: only(false, 0),
  styles: only([]),
  s_churn: only(0),
  s_min_uncond: only(0),
  initial_noise_multiplier: only(1),
  script_name: only('', 'None'),
  refiner_checkpoint: only('', 'None'),
  firstphase_width: only(0),
  firstphase_height: only(0),
  disable_extra_networks: only(false),
  infotext: only(''),
  lora: only([]), // stable-diffusion.cpp's server
  resize_mode: only(0, 1), // 1 is heeded below
};

/** The same of the second pass alone. */
const absentOfHires: Readonly<Record<string, Field>> = {
  hr_checkpoint_name: only('', 'Use same checkpoint'),
  firstpass_image: only(''),
};

/** The same of a mask alone. */
const absentOfMask: Readonly<Record<string, Field>> = {
  latent_mask: only(''),
  mask_round: only(true),
};

/** What a flag of `sdxl sample` is called here, for its messages. */
export const flagKeys: Readonly<Record<string, string>> = {
  ...{
    '--prompt': 'prompt',
    '--negative-prompt': 'negative_prompt',
    '--width': 'width',
    '--height': 'height',
  },
  ...{ '--steps': 'steps', '--guidance-scale': 'cfg_scale', '--scheduler': 'sampler_name', '--eta': 'eta' },
  ...{ '--seed': 'seed', '--subseed': 'subseed', '--subseed-strength': 'subseed_strength' },
  ...{ '--seed-resize-from-w': 'seed_resize_from_w', '--seed-resize-from-h': 'seed_resize_from_h' },
  ...{
    '--image': 'init_images',
    '--strength': 'denoising_strength',
    '--image-guidance-scale': 'image_cfg_scale',
  },
  ...{ '--mask': 'mask', '--padding-mask-crop': 'inpaint_full_res', '--mask-blur': 'mask_blur' },
  ...{ '--masked-content': 'inpainting_fill', '--invert-mask': 'inpainting_mask_invert' },
  ...{ '--hires-prompt': 'hr_prompt', '--hires-negative-prompt': 'hr_negative_prompt' },
  ...{ '--hires-scheduler': 'hr_sampler_name', '--seamless': 'tiling' },
  ...{ '--control-balance': 'control_mode', '--control-mode': 'union_control_type' },
  ...{ '--hires': 'enable_hr', '--hires-scale': 'hr_scale', '--hires-steps': 'hr_second_pass_steps' },
  ...{ '--hires-width': 'hr_resize_x', '--hires-height': 'hr_resize_y', '--hires-upscaler': 'hr_upscaler' },
  ...{ '--hires-denoising-strength': 'denoising_strength', '--hires-guidance-scale': 'hr_cfg' },
  ...{ '--control-image': "a unit's image", '--adapter-image': "a unit's image" },
  ...{ '--control-guidance-start': 'guidance_start', '--control-guidance-end': 'guidance_end' },
};

const nothing = (keys: readonly string[]) => Object.fromEntries(keys.map((key) => [key, unheeded]));

/** An empty text is none, as there. */
const hasMask = ({ mask }: Body): boolean => mask !== undefined && mask !== null && mask !== '';

/** The keys of a request. Clients send those of a second pass and of a mask where there is none, too. */
const fieldsOf = (body: Body, { stylesFile }: Served): Readonly<Record<string, Field>> => ({
  ...{ ...picture, ...nothing(taken), ...nothing(idle), ...absent },
  ...(stylesFile === undefined ? {} : { styles: unheeded }), // taken before
  ...(body.enable_hr ? absentOfHires : nothing(Object.keys(absentOfHires))),
  ...(hasMask(body) ? absentOfMask : nothing(Object.keys(absentOfMask))),
});

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

/** A variation, where there is one: clients send a subseed without a strength, and 0 or -1 for no size. */
function variationOf(body: Body): Settings {
  const given = (key: string) =>
    [0, -1].includes(Number(spelled(body[key]))) ? undefined : (body[key] ?? undefined);
  const [width, height] = ['seed_resize_from_w', 'seed_resize_from_h'].map(given);
  const [w, h] = [sideOf('seedResizeFromW'), sideOf('seedResizeFromH')];
  const subseed = seedNumber('subseed')(body.subseed ?? -1, 'subseed');
  const strength = numeric('subseedStrength', { min: 0, max: 1 })(
    body.subseed_strength ?? 0,
    'subseed_strength',
  );
  return {
    ...(strength.subseedStrength ? { ...subseed, ...strength } : {}),
    ...(width !== undefined &&
      height !== undefined && { ...w(width, 'seed_resize_from_w'), ...h(height, 'seed_resize_from_h') }),
  };
}

/** A network's file, or the name of another way. */
function upscalerOf(key: string, value: string, networks: Served['networks']): string {
  const name = labelled(key, value, [...hiresUpscalers, ...networks.keys()]);
  return networks.get(name) ?? name;
}

/** The second pass. A1111 takes 0 for what is not said; of its upscalers "None" is a plain one, of the picture. */
function hiresOf(body: Body, { networks }: Served): Settings {
  if (!booleanOf(body.enable_hr ?? false, 'enable_hr')) return {};
  const given = (key: string) => (body[key] === 0 ? undefined : (body[key] ?? undefined));
  const [width, height] = ['hr_resize_x', 'hr_resize_y'].map(given);
  const isSized = (width ?? height) !== undefined;
  const keys: Record<string, [value: unknown, field: Field]> = {
    hr_scale: [isSized ? undefined : given('hr_scale'), numeric('hiresScale', { min: 1, max: 8 })],
    hr_resize_x: [width, (value, key) => ({ hiresWidth: side(key)(`${numberOf(value, key)}`) })],
    hr_resize_y: [height, (value, key) => ({ hiresHeight: side(key)(`${numberOf(value, key)}`) })],
    hr_second_pass_steps: [
      given('hr_second_pass_steps'),
      numeric('hiresSteps', { min: 1, max: mostSteps, whole: true }),
    ],
    denoising_strength: [
      given('denoising_strength') ?? 0.75,
      numeric('hiresDenoisingStrength', { min: 0.01, max: 1 }),
    ],
    hr_upscaler: [
      said(body, 'hr_upscaler'),
      (value, key) => ({
        hiresUpscaler: value === 'None' ? 'Lanczos' : upscalerOf(key, String(value), networks),
      }),
    ],
    hr_prompt: [said(body, 'hr_prompt'), text('hiresPrompt')],
    hr_negative_prompt: [said(body, 'hr_negative_prompt'), text('hiresNegativePrompt')],
    hr_cfg: [given('hr_cfg'), numeric('hiresGuidanceScale', { min: 0 })],
  };
  const read = Object.entries(keys).map(([key, [value, field]]) =>
    value === undefined ? {} : field(value, key),
  );
  return Object.assign({ hires: true, ...hiresSamplerOf(body) }, ...read);
}

/** How far a mask's edge is softened: one number for both of its ways. */
function blurOf(body: Body): Settings {
  const blur = numeric('maskBlur', { min: 0, max: 256, whole: true });
  const given = (key: string, usual: unknown): Settings => blur(body[key] ?? usual, key);
  if ((body.mask_blur ?? undefined) !== undefined) return given('mask_blur', undefined);
  const [x, y] = [given('mask_blur_x', 4), given('mask_blur_y', 4)];
  if (x.maskBlur === y.maskBlur) return x;
  throw new UserError(
    `mask_blur_x ${x.maskBlur} and mask_blur_y ${y.maskBlur} are one number here; give mask_blur`,
  );
}

/** What is done under a mask and around it, with A1111's defaults for its routes. */
function underMask(body: Body): Settings {
  const number = (key: string, max: number): number =>
    numberOf(body[key] ?? 0, key, { min: 0, max, whole: true });
  const invert = booleanOf(body.inpainting_mask_invert ?? false, 'inpainting_mask_invert');
  const inFull = booleanOf(body.inpaint_full_res ?? true, 'inpaint_full_res'); // "only masked"
  return {
    ...blurOf(body),
    maskedContent: maskedContents[number('inpainting_fill', maskedContents.length - 1)],
    ...(invert ? { invertMask: true } : {}),
    ...(inFull ? { paddingMaskCrop: number('inpaint_full_res_padding', mostSide) } : {}),
  };
}

/** What is drawn over. */
function overOf(body: Body): Order {
  const images = body.init_images;
  if (!Array.isArray(images) || images.length !== 1)
    throw new UserError('init_images takes a list of one picture in base64');
  const image = pictureBytes(images[0], 'init_images');
  const strength = body.denoising_strength ?? undefined;
  const over = {
    image: initImage,
    ...(strength !== undefined && numeric('strength', { min: 0, max: 1 })(strength, 'denoising_strength')),
  };
  const made: Order['made'] = { [initImage]: { by: 'white' } };
  const fits: Order['fits'] = body.resize_mode === 1 ? { [initImage]: 'crop', mask: 'crop' } : {};
  if (!hasMask(body)) return { settings: over, usualStrength, pictures: { [initImage]: image }, made, fits };
  return {
    usualStrength,
    settings: { ...over, mask: 'mask', ...underMask(body) },
    pictures: { [initImage]: image, mask: pictureBytes(body.mask, 'mask') },
    made: { ...made, mask: { by: 'alpha' } },
    fits,
  };
}

/** Options that are checked, or that clients set to what holds here. */
const knownOptions = words('sd_model_checkpoint CLIP_stop_at_last_layers sd_vae samples_format');

/** Another checkpoint or VAE than those that are open cannot be had. @throws UserError */
export function checkOverrides(value: unknown, served: Served): void {
  if (!isRecord(value ?? {}))
    throw new UserError('override_settings takes an object, by the names of options');
  for (const [key, wanted] of Object.entries(value ?? {})) {
    if (key === 'sd_model_checkpoint' && wanted !== null && wanted !== '' && wanted !== served.name)
      throw new UserError(
        `this server draws with ${served.name} alone; start another for ${JSON.stringify(wanted)}`,
      );
    if (key === 'sd_vae' && ![null, '', 'Automatic', 'None'].includes(wanted as string | null))
      throw new UserError(
        `this server decodes by the VAE that it was started with; start another for ${JSON.stringify(wanted)} (--vae)`,
      );
    if (!knownOptions.includes(key)) served.tellIgnored(key);
  }
}

/** @throws UserError for what A1111 would take out of a prompt, and nobody takes here */
function checkTags(body: Body, { loraModelDir }: Served): void {
  const tagsOf = (key: string): string[] =>
    (said(body, key) ?? '').match(/<(lora|lyco|hypernet):[^<>]+>/g) ?? [];
  const tag = tagsOf('prompt').find((each) => loraModelDir === undefined || each.startsWith('<hypernet:'));
  if (tag !== undefined)
    throw new UserError(
      `a prompt takes no ${tag} here: LoRAs are named where the server is started with --lora-model-dir, and hypernetworks are not there`,
    );
  const [own] = body.enable_hr ? tagsOf('hr_prompt') : [];
  if (own !== undefined)
    throw new UserError(
      `hr_prompt takes no ${own}: the LoRAs of prompt count in both passes; leave it out there`,
    );
}

/** A request whose texts are in the styles that it names, where there are styles. @throws UserError */
function inStyles(body: Body, { stylesFile }: Served): Body {
  const names = body.styles ?? [];
  if (stylesFile === undefined || (Array.isArray(names) && names.length === 0)) return body;
  if (!Array.isArray(names)) throw new UserError('styles takes a list of names of styles');
  const styles = chosenStyles(
    stylesFile,
    names.map((name) => textOf(name, 'styles')),
    'styles',
  );
  const of = (key: string, part: 'prompt' | 'negative_prompt') => {
    const before = said(body, key);
    // Without one of its own a second pass has the first's.
    if (before === undefined && key.startsWith('hr_')) return {};
    const after = styled(
      before ?? '',
      styles.map((style) => style[part]),
    );
    return after === '' ? {} : { [key]: after };
  };
  return {
    ...{ ...body, ...of('prompt', 'prompt'), ...of('negative_prompt', 'negative_prompt') },
    ...{ ...of('hr_prompt', 'prompt'), ...of('hr_negative_prompt', 'negative_prompt') },
  };
}

/** The order of a request, drawn over the picture that it sends or from its prompt alone. @throws UserError */
export function orderOf(asked: Body, overPicture: boolean, served: Served): Order {
  const body = inStyles(asked, served);
  const settings = readFields(body, fieldsOf(body, served), served.tellIgnored);
  checkTags(body, served);
  checkOverrides(body.override_settings, served);
  const over: Order = overPicture ? overOf(body) : { settings: hiresOf(body, served), pictures: {} };
  const controls = controlsIn(body.alwayson_scripts, over, served);
  const habits: Settings = { emphasis: 'original', maxTokenLength: 225, prompt: [''], ...served.texts };
  const drawn = { ...samplerOf(body), ...countOf(body), ...variationOf(body) };
  return {
    usualStrength: over.usualStrength,
    settings: { ...habits, ...settings, ...drawn, ...over.settings, ...controls.settings },
    pictures: { ...over.pictures, ...controls.pictures },
    same: controls.same,
    made: { ...over.made, ...controls.made },
    fits: { ...over.fits, ...controls.fits },
  };
}
