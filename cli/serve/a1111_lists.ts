// A1111's routes that tell what there is, which clients ask before they draw, some of them to know whether it is A1111 at all. What this
// server has none of is an empty list.
import { freemem, totalmem } from 'node:os';
import { samplerLabels, scheduleTypes } from '../sample/a1111_samplers.ts';
import { hiresUpscalers } from '../sample/hires_options.ts';
import { readStyles } from '../sample/styles.ts';
import { upscalerNames } from './a1111_extras.ts';
import { checkOverrides } from './a1111_order.ts';
import { plain } from './fields.ts';
import { Refusal, type Reply, type Routes } from './http.ts';
import type { Queue } from './queue.ts';
import { edmSampler, type Served } from './served.ts';

/** Of things that are looked for when they are asked for, or that there are none of. */
const toRefresh = ['refresh-loras', 'refresh-checkpoints', 'refresh-vae', 'refresh-embeddings'];
const absent = ['hypernetworks', 'face-restorers', 'realesrgan-models', 'script-info', 'extensions'];

/** What A1111 does and this server does not, with the mend. */
const refused: Readonly<Record<string, string>> = {
  interrogate: 'a picture is not put into words here; ask a program that has BLIP or DeepBooru',
  ...Object.fromEntries(
    ['create', 'train'].flatMap((verb) => [
      [`${verb}/embedding`, 'this server trains nothing; `sdxl train` makes textual inversions'],
      [`${verb}/hypernetwork`, 'hypernetworks are not there; `sdxl train` makes LoRAs'],
    ]),
  ),
};

const each = (paths: readonly string[], method: string, json: unknown): Routes =>
  Object.fromEntries(paths.map((path) => [`${method} /sdapi/v1/${path}`, (): Reply => ({ json })]));

/** What draws, and what it has been given. */
const ofModel = (served: Served): Routes => ({
  'GET /sdapi/v1/options': () => ({
    json: {
      ...{ sd_model_checkpoint: served.name, sd_vae: 'Automatic', samples_format: 'png' },
      ...{ CLIP_stop_at_last_layers: 1, inpainting_mask_weight: 1 },
    },
  }),
  'POST /sdapi/v1/options': async ({ json }) => {
    checkOverrides(await json(), served);
    return { json: {} };
  },
  'GET /sdapi/v1/sd-models': () => ({
    json: [
      {
        ...{ title: served.name, model_name: served.name, filename: served.name },
        ...{ hash: null, sha256: null, config: null },
      },
    ],
  }),
  'GET /sdapi/v1/sd-vae': () => ({ json: [] }),
  'GET /sdapi/v1/loras': () => ({ json: served.loras().map((each) => ({ ...each, alias: each.name })) }),
  'GET /sdapi/v1/prompt-styles': () => ({
    json: served.stylesFile === undefined ? [] : readStyles(served.stylesFile),
  }),
  'GET /sdapi/v1/embeddings': () => ({
    json: {
      loaded: Object.fromEntries(
        [...served.embeddings].map(([name, vectors]) => [
          name,
          { step: null, sd_checkpoint: null, sd_checkpoint_name: null, shape: 2048, vectors },
        ]),
      ),
      skipped: {},
    },
  }),
});

/** What a request may choose from. */
const choices = (served: Served, queue: Queue): Routes => ({
  'GET /sdapi/v1/samplers': () => ({
    json: Object.values(samplerLabels)
      .filter((name) => !queue.model()?.edm || edmSampler(name) !== undefined)
      .map((name) => ({ name, aliases: [plain(name)], options: {} })),
  }),
  'GET /sdapi/v1/schedulers': () => ({
    json: scheduleTypes.map((label) => ({
      name: label.toLowerCase().replaceAll(' ', '_'),
      label,
      aliases: null,
    })),
  }),
  'GET /sdapi/v1/upscalers': () => ({
    json: ['None', ...upscalerNames(served)].map((name) => ({
      ...{ name, model_name: null, model_path: served.networks.get(name) ?? null, model_url: null, scale: 4 },
    })),
  }),
  'GET /sdapi/v1/latent-upscale-modes': () => ({
    json: hiresUpscalers.filter((name) => name.startsWith('Latent')).map((name) => ({ name })),
  }),
});

export const a1111Lists = (served: Served, queue: Queue): Routes => ({
  ...ofModel(served),
  ...choices(served, queue),
  ...each(toRefresh, 'POST', null),
  ...each(absent, 'GET', []),
  ...Object.fromEntries(
    Object.entries(refused).map(([path, why]) => [
      `POST /sdapi/v1/${path}`,
      (): Reply => {
        throw new Refusal(501, why);
      },
    ]),
  ),
  'GET /sdapi/v1/scripts': () => ({ json: { txt2img: ['controlnet'], img2img: ['controlnet'] } }),
  'GET /sdapi/v1/cmd-flags': () => ({ json: {} }),
  'GET /sdapi/v1/memory': () => ({
    json: {
      ram: { free: freemem(), used: totalmem() - freemem(), total: totalmem() },
      cuda: { error: 'not told here' },
    },
  }),
});
