// What the two processes of `sdxl serve` tell each other: one answers HTTP and never waits for a step, the other draws. A GPU that fails
// for good, or a kernel that takes its process with it, so ends the one that draws alone, which is started again.
import type { Thresholds } from '../../io/canny.ts';
import type { SampleOptions } from '../sample/options.ts';

/** What a picture is asked for with, in `sdxl sample`'s options; the rest is as the server was started. */
export type Settings = Partial<SampleOptions>;

/** What is made of a picture that was sent before it is used. */
export type Made =
  /** What is transparent lies on white, as A1111's img2img has it; so it does in what is made of it by those that follow, but for masks. */
  | { by: 'white' }
  /** As A1111 reads a mask: its alpha in black and white, where anything is transparent, and else its levels. */
  | { by: 'alpha' }
  | { by: 'canny'; thresholds: Thresholds }
  /** sd-webui-controlnet's `invert`: black lines of white ones. */
  | { by: 'invert' }
  /** White where all channels lie above this level, and else black. */
  | { by: 'threshold'; above: number }
  /** So many times smaller. */
  | { by: 'shrink'; rate: number };

/** How a picture of another shape than what is drawn is brought to it, its middle staying: cut, or with the colour of its edges around it. */
export type Fit = 'crop' | 'fill';

/** A1111's upscaling of extras. */
export interface Enlarging {
  /** Plain ones by their names, networks by their files; a second is blended over the first, as far as it is visible. */
  upscalers: readonly [first: string] | readonly [first: string, second: string];
  visibility: number;
  /** So many times, or until both sides are as long, after which what is past them may be cut off. */
  size: { by: number } | { width: number; height: number; crop: boolean };
}

/** Options that name a picture (`image`, `mask`) say which of these is meant. */
export interface Order {
  settings: Settings;
  /** How far it is drawn anew over a picture where the settings do not say, but by a model that begins with noise always. */
  usualStrength?: number;
  /** Files as they were sent. */
  pictures: Readonly<Record<string, Uint8Array>>;
  /** Pictures that are files of others, by their names: what is made of them may differ. */
  same?: Readonly<Record<string, string>>;
  /** What is made of them, where they do not count as they are. */
  made?: Readonly<Record<string, Made>>;
  /** Those that are stretched are not in it. */
  fits?: Readonly<Record<string, Fit>>;
  /** Nothing is drawn: the pictures come back in their order, as they are made, and perhaps enlarged. */
  remade?: { enlarging?: Enlarging };
}

/** The server's own options, with those of `sdxl sample` that stand where an order says nothing. */
export type Standing = SampleOptions & { model: string };

/** What is put beside the UNet is open, and followed where an order says so. */
export const nothingFollowed = { controlnet: undefined, adapter: undefined, ipAdapter: undefined };

/** What draws. */
export interface ModelTold {
  device: string;
  dtype: string;
  /** Whether the model was trained under EDM's noise, which has samplers of its own. */
  edm: boolean;
}

export interface Drawn {
  png: Uint8Array;
  seed: number;
  /** A1111's text of its settings. */
  parameters: string;
}

export type ToDrawer =
  | { kind: 'open'; options: Standing }
  | { kind: 'draw'; id: number; order: Order }
  /** Wants the order ended after its step. */
  | { kind: 'stop'; id: number }
  /** Wants to see what the next step leaves. */
  | { kind: 'look'; id: number };

export type FromDrawer =
  | { kind: 'opened'; told: ModelTold }
  /** `share` of the whole order is done, 0 to 1. */
  | { kind: 'step'; id: number; share: number; step: number; steps: number }
  | { kind: 'preview'; id: number; png: Uint8Array }
  | { kind: 'picture'; id: number; drawn: Drawn }
  | { kind: 'warning'; line: string }
  | { kind: 'done'; id: number }
  /** Of opening where there is no id. `mistake`: in what was asked, and told in one sentence; else the process ends. */
  | { kind: 'failed'; id?: number; message: string; mistake: boolean };
