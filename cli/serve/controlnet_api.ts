// The units of sd-webui-controlnet, which A1111's clients send under `alwayson_scripts`: each has a ControlNet, a T2I-Adapter or an
// IP-Adapter of those that the server was started with, and a picture that it follows, as a preprocessor makes it (preprocessors.ts). An
// IP-Adapter's is what its vision encoder is called, which comes with it.
import { UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import { type ControlBalance, controlBalances } from '../../models/control/control_balance.ts';
import { controlModeOf, controlModes } from '../../models/control/controlnet_union.ts';
import { oneOf } from '../option_values.ts';
import { base64, booleanOf, numberOf, only, pictureBytes, readFields, textOf } from './fields.ts';
import type { HttpRequest, Reply, Routes } from './http.ts';
import type { Fit, Made, Order, Settings } from './messages.ts';
import { madeBy, moduleDetail, modules } from './preprocessors.ts';
import type { Queue } from './queue.ts';
import { type Followed, mostPictures, type Served } from './served.ts';

interface Unit extends Followed {
  /** By which the order, and what is said of it, calls its picture. */
  name: string;
  /** The init image's where absent. */
  picture?: Buffer;
  weight: number;
  start: number;
  end: number;
  /** What its preprocessor makes of it. */
  made: Made;
  fit?: Fit;
  /** What the picture is, for a union; -1 where it is not said. */
  mode: number;
  balance: ControlBalance;
}

/** Each has a picture, which is small in a body and large in memory. */
const mostUnits = 10;

/**
 * What the scripts of a request come to, which draws over a picture or not: one is followed by units without a picture, cut as the request
 * says. @throws UserError for other scripts than ControlNets
 */
export function controlsIn(scripts: unknown, over: Order, served: Served): Order {
  if (!isRecord(scripts ?? {}))
    throw new UserError('alwayson_scripts takes an object, by the names of scripts');
  const entries = Object.entries(scripts ?? {});
  const isOff = (script: unknown): boolean =>
    isRecord(script) && Array.isArray(script.args) && (script.args[0] ?? false) === false;
  const other = entries.find(([name, script]) => name.toLowerCase() !== 'controlnet' && !isOff(script));
  if (other) throw new UserError(`alwayson_scripts: there is no script "${other[0]}" here; leave it out`);
  const sent = entries.flatMap(([name, script]) => {
    if (name.toLowerCase() !== 'controlnet') return [];
    if (isRecord(script) && Array.isArray(script.args)) return script.args;
    throw new UserError(`alwayson_scripts: "${name}" takes an object with args, a list of units`);
  });
  const units = sent.flatMap((unit, i): Unit[] =>
    isRecord(unit) && booleanOf(unit.enabled ?? true, "a ControlNet unit's enabled")
      ? [{ ...unitOf(unit, over, served), name: `the image of ControlNet unit ${i}` }]
      : [],
  );
  if (units.length > mostUnits)
    throw new UserError(`${units.length} ControlNet units are followed, and ${mostUnits} is the most`);
  return {
    settings: settingsOf(units),
    pictures: Object.fromEntries(units.flatMap(({ name, picture }) => (picture ? [[name, picture]] : []))),
    same: Object.fromEntries(units.flatMap(({ name, picture }) => (picture ? [] : [[name, initImage]]))),
    fits: Object.fromEntries(units.flatMap(({ name, fit }) => (fit ? [[name, fit]] : []))),
    made: Object.fromEntries(units.map(({ name, made }) => [name, made])),
  };
}

/** The options of `sdxl sample` that units come to, by their kind. */
function settingsOf(units: readonly Unit[]): Settings {
  const of = (kind: Followed['kind']) => units.filter((unit) => unit.kind === kind);
  const scaled = (some: readonly Unit[]) => some.map(({ file, weight }) => `${file}:${weight}`);
  const named = (some: readonly Unit[]) => some.map(({ name }) => name);
  const [nets, adapters, prompts] = [of('controlnet'), of('adapter'), of('ipAdapter')];
  const [factor = 1, ...others] = new Set(adapters.map(({ end }) => end));
  if (others.length > 0 || adapters.some(({ start }) => start > 0))
    throw new UserError(
      'T2I-Adapters are followed from the first step on (guidance_start 0), and all of a request to the same guidance_end',
    );
  if (prompts.some(({ start, end }) => start > 0 || end < 1))
    throw new UserError('an IP-Adapter is followed in all steps: leave guidance_start and guidance_end out');
  return {
    ...(nets.length > 0 && {
      controlnet: scaled(nets),
      controlImage: named(nets),
      controlMode: nets.map(({ mode }) => mode),
      controlGuidanceStart: nets.map(({ start }) => start),
      controlGuidanceEnd: nets.map(({ end }) => end),
      ...(nets.some(({ balance }) => balance !== 'balanced') && {
        controlBalance: nets.map(({ balance }) => balance),
      }),
    }),
    ...(adapters.length > 0 && {
      adapter: scaled(adapters),
      adapterImage: named(adapters),
      adapterConditioningFactor: factor,
    }),
    ...(prompts.length > 0 && { ipAdapter: scaled(prompts), ipAdapterImage: named(prompts) }),
  };
}

/** Keys of a unit that would change the picture, and are not there. */
const absent = {
  effective_region_mask: only(''),
  advanced_weighting: only([]),
  ipadapter_input: only([]),
  mask: only(''),
  mask_image: only(''),
  hr_option: only('Both'),
};

/** By which an order calls what it draws over. */
export const initImage = 'init_images';

function unitOf(unit: Record<string, unknown>, over: Order, { followed }: Served): Omit<Unit, 'name'> {
  const model = unit.model ?? '';
  readFields(unit, absent, () => {});
  // A1111 shows a name with a hash behind it.
  const name = textOf(model, "a ControlNet unit's model").replace(/ \[\w*\]$/, '');
  const found =
    followed.get(name) ?? (name === '' && followed.size === 1 ? [...followed.values()][0] : undefined);
  if (found === undefined)
    throw new UserError(
      `a ControlNet unit names ${JSON.stringify(model || null)}, and this server has ${[...followed.keys()].join(', ') || 'none (--controlnet, --adapter, --ip-adapter)'}`,
    );
  const read = (key: string, usual: number, bounds: Parameters<typeof numberOf>[2]): number =>
    numberOf(unit[key] ?? usual, `a ControlNet unit's ${key}`, bounds);
  const picture = pictureOf(unit, over, found);
  const fit = fitOf(unit.resize_mode ?? 1, found);
  return {
    ...found,
    weight: read('weight', 1, { min: 0 }),
    picture,
    start: read('guidance_start', 0, { min: 0, max: 1 }),
    end: read('guidance_end', 1, { min: 0, max: 1 }),
    made: moduleOf(unit, found),
    mode: modeOf(unit.union_control_type ?? 'Unknown'),
    fit: picture || found.kind === 'ipAdapter' ? fit : over.fits?.[initImage],
    balance: balanceOf(unit.control_mode ?? 0, found),
  };
}

/** A unit's own picture; undefined where it follows the one that is drawn over. @throws UserError where there is neither */
function pictureOf(
  { image, input_image }: Record<string, unknown>,
  { pictures, settings }: Order,
  { kind }: Followed,
): Buffer | undefined {
  const given = image ?? input_image;
  const picture = isRecord(given) && 'image' in given ? given.image : given;
  const isNone = picture === undefined || picture === null || picture === '';
  if (!isNone || !(initImage in pictures)) return pictureBytes(picture, "a ControlNet unit's image");
  if (kind === 'ipAdapter' && settings.paddingMaskCrop !== undefined)
    throw new UserError(
      'an IP-Adapter sees no part of init_images that inpaint_full_res draws: send it, as the image of its unit',
    );
  return undefined;
}

/** sd-webui-controlnet's words for how a picture is brought to the shape that is drawn, by their numbers, and older ones. */
const resizeModes: readonly (readonly [fit: Fit | undefined, ...words: string[]])[] = [
  [undefined, 'Just Resize'],
  ['crop', 'Crop and Resize', 'Scale to Fit (Inner Fit)', 'Inner Fit (Scale to Fit)'],
  ['fill', 'Resize and Fill', 'Envelope (Outer Fit)', 'Outer Fit (Shrink to Fit)'],
];

/** @throws UserError; an IP-Adapter's encoder has a way of its own */
function fitOf(given: unknown, { kind }: Followed): Fit | undefined {
  const mode = resizeModes.find(
    ([, ...words], i) => i === given || (typeof given === 'string' && words.includes(given)),
  );
  if (!mode)
    throw new UserError(
      `a ControlNet unit's resize_mode takes ${resizeModes.map(([, word]) => word).join(', ')}, or 0 to 2, not ${JSON.stringify(given)}`,
    );
  return kind === 'ipAdapter' ? undefined : mode[0];
}

/** sd-webui-controlnet's words for what counts more, by their numbers. */
const modes = ['Balanced', 'My prompt is more important', 'ControlNet is more important'];

/** @throws UserError; webuiapi sends the first as a list of one */
function balanceOf(given: unknown, { kind }: Followed): ControlBalance {
  const [mode] = Array.isArray(given) && given.length === 1 ? given : [given];
  const i = typeof mode === 'number' ? mode : modes.indexOf(mode);
  if (modes[i] === undefined)
    throw new UserError(
      `a ControlNet unit's control_mode takes ${modes.join(', ')}, or 0 to 2, not ${JSON.stringify(given)}`,
    );
  if (i > 0 && kind !== 'controlnet')
    throw new UserError(
      `a ControlNet unit's control_mode is "${modes[i]}", and T2I-Adapters and IP-Adapters are followed by "Balanced" alone`,
    );
  return controlBalances[i];
}

/** @throws UserError for another preprocessor; what sees an IP-Adapter's picture is none, but for faces */
function moduleOf(unit: Record<string, unknown>, { kind }: Followed): Made {
  const module = textOf(unit.module ?? 'none', "a ControlNet unit's module");
  const sees = /ip-?adapter/i.test(module) && !/face|pulid/i.test(module);
  if (kind === 'ipAdapter' && sees) return { by: 'white' };
  const { threshold_a, threshold_b } = unit;
  const made = madeBy(module, { threshold_a, threshold_b }, 'a ControlNet unit');
  if (kind !== 'ipAdapter' || made.by === 'white') return made;
  throw new UserError(
    `a ControlNet unit has the module "${module}", and an IP-Adapter sees pictures as they are; leave it out`,
  );
}

/** sd-webui-controlnet's words for what a union is shown, by diffusers'. */
const unionTypes: Readonly<Record<string, string>> = {
  OpenPose: 'openpose',
  Depth: 'depth',
  'Soft Edge': 'hed',
  'Hard Edge': 'canny',
  'Normal Map': 'normal',
  Segmentation: 'segment',
};

/** @throws UserError */
function modeOf(type: unknown): number {
  if (type === 'Unknown') return -1;
  const words = [...Object.keys(unionTypes), ...controlModes.flat()];
  const word = oneOf('union_control_type', words)(textOf(type, 'union_control_type'));
  return controlModeOf(unionTypes[word] ?? word) as number;
}

/** What a preprocessor makes of pictures. */
async function detect({ json, signal }: HttpRequest, queue: Queue): Promise<Reply> {
  const body = await json();
  const made = madeBy(
    textOf(body.controlnet_module ?? 'none', 'controlnet_module'),
    { threshold_a: body.controlnet_threshold_a, threshold_b: body.controlnet_threshold_b },
    'controlnet_module',
  );
  const images = body.controlnet_input_images;
  if (!Array.isArray(images) || images.length === 0 || images.length > mostPictures)
    throw new UserError(`controlnet_input_images takes a list of 1 to ${mostPictures} pictures in base64`);
  const names = images.map((_, i) => `picture ${i} of controlnet_input_images`);
  const order: Order = {
    settings: {},
    pictures: Object.fromEntries(names.map((name, i) => [name, pictureBytes(images[i], name)])),
    made: Object.fromEntries(names.map((name) => [name, made])),
    remade: {},
  };
  const drawn = await queue.draw(order, signal);
  return { json: { info: 'Success', images: drawn.map(({ png }) => base64(png)) } };
}

export const controlnetApi = ({ followed }: Served, queue: Queue): Routes => {
  const models = [...followed.keys()];
  return {
    'GET /controlnet/version': () => ({ json: { version: 2 } }),
    'GET /controlnet/settings': () => ({ json: { control_net_unit_count: mostUnits } }),
    'GET /controlnet/model_list': () => ({ json: { model_list: models } }),
    'GET /controlnet/module_list': () => ({ json: { module_list: modules, module_detail: moduleDetail } }),
    'POST /controlnet/detect': (asked) => detect(asked, queue),
    'GET /controlnet/control_types': () => ({
      json: {
        control_types: {
          All: {
            module_list: modules,
            model_list: models,
            default_option: 'none',
            default_model: models[0] ?? 'None',
          },
        },
      },
    }),
  };
};
