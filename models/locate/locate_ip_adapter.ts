// Finding an IP-Adapter by what the user names, and the vision encoder that it was made with. Files lie as in h94/IP-Adapter:
// sdxl_models/*.safetensors, ViT-bigG in sdxl_models/image_encoder and ViT-H in models/image_encoder; their widths tell which is meant.
import { existsSync, statSync } from 'node:fs';
import { dirname, join, posix, relative } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { listFolder } from '../../io/files.ts';
import { hubPath, NothingWantedError, resolveHub } from '../../io/hub.ts';
import { readJsonObject } from '../../io/json.ts';
import { type ModelSource, openComponent } from '../checkpoint/checkpoint.ts';
import { refusePickle } from '../checkpoint/weights_file.ts';
import { parseVisionConfig } from '../ip_adapter/clip_vision.ts';
import { type IPAdapterSource, openIPAdapter, readIPAdapter, widthRead } from '../ip_adapter/ip_adapter.ts';
import { download as fromHub, type LocateOptions, ofClass, weightsOf } from './locate.ts';

const mend =
  "an IP-Adapter's .safetensors file, its folder, or a hub id and file such as h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors";

/**
 * An IP-Adapter with its vision encoder, for `loadPipeline`: a .safetensors file, the folder of one, or OWNER/NAME/FILE on the hub, which is
 * downloaded first.
 * @throws UserError where there is none, it is a pickle, or has no vision encoder with it
 */
export async function locateIPAdapter(path: string, options: LocateOptions = {}): Promise<IPAdapterSource> {
  if (!existsSync(path)) return locateOnHub(path, options);
  if (!statSync(path).isDirectory()) return withEncoder(path, options);
  const own = adapterAmong(filesIn(path), path);
  if (!own) throw new UserError(`${path} has no IP-Adapter; give ${mend}`);
  return withEncoder(join(path, own), options);
}

/** `OWNER/NAME`, and perhaps a file's path in it. */
async function locateOnHub(path: string, options: LocateOptions): Promise<IPAdapterSource> {
  const hub = hubPath(path);
  if (!hub) throw new UserError(`no IP-Adapter at ${path}; give ${mend}`);
  const { id, inner } = hub;
  if (inner) refusePickle(path);
  let name: string | undefined;
  const adapterAndConfigs = (all: readonly string[]): string[] => {
    name = inner ?? adapterAmong(all, id);
    if (!name || !all.includes(name)) return [];
    const configs = encodersFor(name, posix.join).map((place) => posix.join(place, 'config.json'));
    return [name, ...configs.filter((each) => all.includes(each))];
  };
  const download = (what: string, files: typeof adapterAndConfigs) =>
    resolveHub(id, { files, onProgress: (progress) => options.onProgress?.(what, progress) });
  const folder = await download(path, adapterAndConfigs).catch((error) => {
    if (!(error instanceof NothingWantedError)) throw error;
    throw new UserError(`${id} on the hub has no ${inner ?? 'IP-Adapter'}; give ${mend}`);
  });
  const file = join(folder, name ?? '');
  const encoder = relative(folder, encoderOf(file)).replaceAll('\\', '/');
  const weights = (all: readonly string[]): string[] => {
    const own = all.filter((each) => posix.dirname(each) === encoder && each.endsWith('.safetensors'));
    return weightsOf(own, options.variant);
  };
  await download(`${id}/${encoder}`, weights);
  return withEncoder(file, options);
}

const encoderClass = 'CLIPVisionModelWithProjection';

/** A vision encoder alone: its folder, or one that has it as image_encoder, or where in a repository either is. @throws UserError */
export async function locateImageEncoder(path: string, options: LocateOptions = {}): Promise<ModelSource> {
  const mend = `the folder of a ${encoderClass}, or a hub id and folder such as h94/IP-Adapter/models/image_encoder`;
  const folder = existsSync(path) ? path : await encoderOnHub(path, mend, options);
  const own = [folder, join(folder, 'image_encoder')].find((each) => existsSync(join(each, 'config.json')));
  if (!own) throw new UserError(`${path} has no image encoder; give ${mend}`);
  return ofClass(openComponent(own, { variant: options.variant }), [encoderClass], 'an image encoder', mend);
}

async function encoderOnHub(path: string, mend: string, options: LocateOptions): Promise<string> {
  const { id, inner = '.' } = hubPath(path) ?? {};
  if (!id) throw new UserError(`no image encoder at ${path}; give ${mend}`);
  const files = (all: readonly string[]): string[] => {
    const own = [inner, posix.join(inner, 'image_encoder')].find((place) =>
      all.includes(posix.join(place, 'config.json')),
    );
    if (own === undefined) return [];
    const inIt = all.filter((each) => posix.dirname(each) === own);
    const weights = inIt.filter((each) => each.endsWith('.safetensors'));
    return [posix.join(own, 'config.json'), ...weightsOf(weights, options.variant)];
  };
  try {
    return join(await fromHub(id, files, options), inner);
  } catch (error) {
    if (!(error instanceof NothingWantedError)) throw error;
    throw new UserError(`${id} on the hub has no image encoder in ${inner}; give ${mend}`);
  }
}

/** A folder's files, and those of sdxl_models in it. */
const filesIn = (folder: string): string[] => {
  const inner = 'sdxl_models';
  const more = existsSync(join(folder, inner)) ? listFolder(join(folder, inner)) : [];
  return [...listFolder(folder), ...more.map((name) => posix.join(inner, name))];
};

/** The one adapter among a folder's files, of several the one for SDXL. @throws UserError for more, or a pickle alone */
function adapterAmong(all: readonly string[], where: string): string | undefined {
  const adapters = all.filter((name) => /ip[-_]?adapter[^/]*$/i.test(name));
  const forSdxl = adapters.filter((name) => /sdxl/i.test(name));
  const own = forSdxl.length > 0 ? forSdxl : adapters;
  const files = own.filter((name) => name.endsWith('.safetensors'));
  if (files.length > 1)
    throw new UserError(
      `${where} has several IP-Adapters: give one of them, ${files.map((name) => posix.join(where, name)).join(' or ')}`,
    );
  if (files.length === 0) for (const name of own) refusePickle(join(where, name));
  return files[0];
}

const encodersFor = (file: string, joined: (...parts: string[]) => string): string[] =>
  [['image_encoder'], ['..', 'models', 'image_encoder']].map((parts) => joined(dirname(file), ...parts));

/** The folder of the vision encoder of an adapter's width; where none has it the first, of which loading tells. */
function encoderOf(file: string): string {
  const config = readIPAdapter(file);
  const places = encodersFor(file, join).filter((place) => existsSync(join(place, 'config.json')));
  if (places.length === 0)
    throw new UserError(
      `${file} has no image_encoder beside it: put the folder of that name there (or into ../models), with its config.json and .safetensors, as h94/IP-Adapter has it`,
    );
  const fits = (place: string) =>
    widthRead(config, parseVisionConfig(readJsonObject(join(place, 'config.json')))) === config.inputs;
  return places.find(fits) ?? places[0];
}

function withEncoder(file: string, { variant }: LocateOptions): IPAdapterSource {
  const encoder = encoderOf(file);
  return openIPAdapter(file, encoder, variant);
}
