// The units of sd-webui-controlnet, which A1111's clients send under `alwayson_scripts`: each has a ControlNet of those that the server
// was started with, and a picture that it follows as it is, as there are no preprocessors here.
import { UserError } from '../../io/errors.ts';
import { isObject } from '../../models/request.ts';
import { number } from '../option_values.ts';
import { pictureBytes } from './fields.ts';
import type { Routes } from './http.ts';
import type { Order } from './messages.ts';
import type { Served } from './served.ts';

interface Unit {
  controlnet: string;
  picture: Buffer;
  start: number;
  end: number;
}

/** Each has a picture, which is small in a body and large in memory. */
const mostUnits = 10;

/** What the scripts of a request come to. @throws UserError for other scripts than ControlNets */
export function controlsIn(scripts: unknown, served: Served): Order {
  if (!isObject(scripts ?? {}))
    throw new UserError('alwayson_scripts takes an object, by the names of scripts');
  const entries = Object.entries(scripts ?? {});
  const isOff = (script: unknown): boolean =>
    isObject(script) && Array.isArray(script.args) && (script.args[0] ?? false) === false;
  const other = entries.find(([name, script]) => name.toLowerCase() !== 'controlnet' && !isOff(script));
  if (other) throw new UserError(`alwayson_scripts: there is no script "${other[0]}" here; leave it out`);
  const sent = entries.flatMap(([name, script]) =>
    name.toLowerCase() === 'controlnet' && isObject(script) && Array.isArray(script.args) ? script.args : [],
  );
  const units = sent
    .filter(isObject)
    .filter(({ enabled }) => enabled !== false)
    .map((unit) => unitOf(unit, served));
  if (units.length > mostUnits)
    throw new UserError(`${units.length} ControlNet units are followed, and ${mostUnits} is the most`);
  if (units.length === 0) return { settings: {}, pictures: {} };
  const names = units.map((_, i) => `controlnet_${i}`);
  return {
    settings: {
      controlnet: units.map(({ controlnet }) => controlnet),
      controlImage: names,
      controlGuidanceStart: units.map(({ start }) => start),
      controlGuidanceEnd: units.map(({ end }) => end),
    },
    pictures: Object.fromEntries(units.map(({ picture }, i) => [names[i], picture])),
  };
}

function unitOf(unit: Record<string, unknown>, { controlnets }: Served): Unit {
  const { model, module = 'none', control_mode = 0, image = unit.input_image } = unit;
  if (!/^none$/i.test(String(module ?? 'none')))
    throw new UserError(
      `a ControlNet unit has the module "${module}": there are no preprocessors here, send what it would make`,
    );
  if (![0, 'Balanced', null].includes(control_mode as number))
    throw new UserError(
      `a ControlNet unit's control_mode takes Balanced alone, not ${JSON.stringify(control_mode)}`,
    );
  // A1111 shows a name with a hash behind it.
  const name = String(model ?? '').replace(/ \[\w*\]$/, '');
  const file =
    controlnets.get(name) ??
    (name === '' && controlnets.size === 1 ? [...controlnets.values()][0] : undefined);
  if (file === undefined)
    throw new UserError(
      `a ControlNet unit names ${JSON.stringify(model ?? null)}, and this server has ${[...controlnets.keys()].join(', ') || 'none (--controlnet)'}`,
    );
  const read = (key: string, usual: number, bounds: Parameters<typeof number>[1]): number =>
    number(`a ControlNet unit's ${key}`, bounds)(String(unit[key] ?? usual));
  const picture = typeof image === 'object' && image !== null && 'image' in image ? image.image : image;
  return {
    controlnet: `${file}:${read('weight', 1, { min: 0 })}`,
    picture: pictureBytes(picture, "a ControlNet unit's image"),
    start: read('guidance_start', 0, { min: 0, max: 1 }),
    end: read('guidance_end', 1, { min: 0, max: 1 }),
  };
}

export const controlnetApi = ({ controlnets }: Served): Routes => ({
  'GET /controlnet/model_list': () => ({ json: { model_list: [...controlnets.keys()] } }),
  'GET /controlnet/module_list': () => ({ json: { module_list: ['none'] } }),
});
