// What the routes know of the server that they are of, and the bounds of what may be asked of it.
import { basename, dirname, resolve } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { plainSpelling, samplerNames } from '../../models/samplers/registry.ts';
import { readTextualInversion } from '../../models/text/textual_inversion.ts';
import { shippedModel } from '../model.ts';
import { adapterOf } from '../sample/adapter_options.ts';
import { controlnetOf } from '../sample/control_options.ts';
import { ipAdapterOf } from '../sample/ip_adapter_options.ts';
import { metadataOf, openLoraFolder } from '../sample/lora_folder.ts';
import { loraOf, textualInversionOf } from '../sample/options.ts';
import { readStyles } from '../sample/styles.ts';
import type { Settings, Standing } from './messages.ts';

/** The longest side of a picture, sent or drawn. */
export const mostSide = 4096;
export const mostSteps = 150;
/** Over a picture: A1111's, and stable-diffusion.cpp's. diffusers' 0.3 hardly heeds the prompt, and a client may have no word to mend that. */
export const usualStrength = 0.75;
/** Of one request. */
export const mostPictures = 16;

/**
 * What a sampler is for models of EDM's noise, which A1111's samplers draw with under the names that they have for others. Uniform, the type
 * of those without one, is of timesteps, which such models have not.
 */
export function edmSampler(name: string): string | undefined {
  const wanted = plainSpelling(`edm_${name.replace(/ Uniform$/, '')}`);
  return samplerNames.find((each) => plainSpelling(each) === wanted);
}

/** Something that is put beside the UNet, by the option that names its file. */
export interface Followed {
  kind: 'controlnet' | 'adapter' | 'ipAdapter';
  file: string;
}

/** As A1111 tells of it. */
interface LoraTold {
  name: string;
  path: string;
  metadata: Record<string, unknown>;
}

export interface Served {
  /** What clients call the model. */
  name: string;
  /** The file whose styles requests may name. */
  stylesFile?: string;
  /** The folder whose LoRAs prompts may name. */
  loraModelDir?: string;
  /** The LoRAs that there are: the folder's, or else those that are merged for good. */
  loras(): LoraTold[];
  /** The textual inversions, by what calls them in prompts, with how many vectors each has. */
  embeddings: ReadonlyMap<string, number>;
  /** What units of requests may follow, by their names. */
  followed: ReadonlyMap<string, Followed>;
  /** The networks that enlarge pictures, by their names: their files. */
  networks: ReadonlyMap<string, string>;
  /** How prompts are read, where the flags say. */
  texts: Settings;
  /** Hears of keys that change nothing. */
  tellIgnored(key: string): void;
}

/** What people call a model by its folder, file or hub id; what a run has made (`runs/NAME/final`) by the run's. */
function nameOf(path: string): string {
  const name = basename(path);
  return name === 'final' ? basename(dirname(resolve(path))) : name.replace(/\.(safetensors|gguf)$/, '');
}

/** So many keys that say nothing are told of: clients have a few, and who makes up more fills no log. */
const mostTold = 100;

const followedOf = ({ controlnet = [], adapter = [], ipAdapter = [] }: Standing): Followed[] => [
  ...controlnet.map((text): Followed => ({ kind: 'controlnet', file: controlnetOf(text).file })),
  ...adapter.map((text): Followed => ({ kind: 'adapter', file: adapterOf(text).file })),
  ...ipAdapter.map((text): Followed => ({ kind: 'ipAdapter', file: ipAdapterOf(text).file })),
];

/** By the names that units call them. @throws UserError where two have one */
function byName(followed: readonly Followed[]): Served['followed'] {
  const found = new Map<string, Followed>();
  for (const each of followed) {
    const name = nameOf(each.file);
    const other = found.get(name);
    if (other)
      throw new UserError(
        `${other.file} and ${each.file} would both be called ${name}, by which A1111's clients choose; give one of them another name`,
      );
    found.set(name, each);
  }
  return found;
}

/** Of a server with these options; `texts` are those of prompts that were typed. @throws UserError for names that two have */
export function servedOf(standing: Standing, texts: Settings, log: (line: string) => void): Served {
  const told = new Set<string>();
  const { lora = [], loraModelDir, upscaleModel, stylesFile } = standing;
  if (stylesFile !== undefined) readStyles(stylesFile); // a mistake in it is told at the start
  return {
    name: standing.model === shippedModel ? 'emoji' : nameOf(standing.model),
    ...{ loraModelDir, stylesFile },
    loras: () =>
      loraModelDir === undefined
        ? lora.map((text) => loraOf(text).file).map((path) => ({ name: nameOf(path), path, metadata: {} }))
        : openLoraFolder(loraModelDir)
            .all()
            .map((each) => ({ ...each, metadata: metadataOf(each.path) })),
    embeddings: new Map(
      (standing.textualInversion ?? [])
        .map(textualInversionOf)
        .map(({ file, token }) => readTextualInversion(file, token))
        .map(({ token, clip_l }) => [token, clip_l.count]),
    ),
    followed: byName(followedOf(standing)),
    networks: new Map(upscaleModel === undefined ? [] : [[nameOf(upscaleModel), upscaleModel]]),
    texts,
    tellIgnored(key) {
      if (told.has(key) || told.size === mostTold) return;
      told.add(key);
      log(`"${key.slice(0, 60)}" of a request says nothing to this server`);
    },
  };
}
