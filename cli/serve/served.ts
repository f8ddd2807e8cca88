// What the routes know of the server that they are of, and the bounds of what may be asked of it.
import type { Settings } from './messages.ts';

/** The longest side of a picture, sent or drawn. */
export const mostSide = 4096;
export const mostSteps = 150;
/** Of one request. */
export const mostPictures = 16;

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
  /** The folder whose LoRAs prompts may name. */
  loraModelDir?: string;
  /** The LoRAs that there are: the folder's, or else those that are merged for good. */
  loras(): LoraTold[];
  /** What units of requests may follow, by their names. */
  followed: ReadonlyMap<string, Followed>;
  /** How prompts are read, where the flags say. */
  texts: Settings;
  /** Hears of keys that change nothing. */
  tellIgnored(key: string): void;
}
