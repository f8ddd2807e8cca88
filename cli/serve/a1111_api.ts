// A1111's routes (`/sdapi/v1`) that clients draw with; those that they ask what there is before they draw are in a1111_lists.ts.
import { pngText } from '../../io/png.ts';
import { readParameters } from '../sample/a1111_read.ts';
import { a1111Extras } from './a1111_extras.ts';
import { labelledParameters } from './a1111_infotext.ts';
import { a1111Lists } from './a1111_lists.ts';
import { flagKeys, orderOf } from './a1111_order.ts';
import { controlnetApi } from './controlnet_api.ts';
import { base64, booleanOf, pictureBytes } from './fields.ts';
import type { HttpRequest, Reply, Routes } from './http.ts';
import type { Drawn, Settings } from './messages.ts';
import { type Queue, tellingBy } from './queue.ts';
import type { Served } from './served.ts';

export function a1111Api(served: Served, orders: Queue): Routes {
  const queue = tellingBy(flagKeys, orders);
  const interrupt = (): Reply => {
    queue.interrupt();
    return { json: {} };
  };
  return {
    ...controlnetApi(served, queue),
    ...a1111Lists(served, queue),
    ...a1111Extras(served, queue),
    'POST /sdapi/v1/txt2img': (asked) => draw(asked, false, served, queue),
    'POST /sdapi/v1/img2img': (asked) => draw(asked, true, served, queue),
    'GET /sdapi/v1/progress': ({ url }) =>
      progress(queue, url.searchParams.get('skip_current_image') !== 'true'),
    'POST /sdapi/v1/interrupt': interrupt,
    'POST /sdapi/v1/skip': interrupt, // a picture is all that there is to skip
    'POST /sdapi/v1/unload-checkpoint': () => {
      queue.unload();
      return { json: {} };
    },
    'POST /sdapi/v1/reload-checkpoint': async () => {
      await queue.reload();
      return { json: {} };
    },
    'POST /sdapi/v1/png-info': async ({ json }) => {
      const { image } = await json();
      const { parameters: info = '', ...items } = pngText(pictureBytes(image, 'image'), 'image');
      return { json: { info, items, parameters: labelledParameters(info) } };
    },
  };
}

/** Pictures, drawn over the one that is sent or from the prompt alone. */
async function draw(
  { json, signal }: HttpRequest,
  overPicture: boolean,
  served: Served,
  queue: Queue,
): Promise<Reply> {
  const body = await json();
  const order = orderOf(body, overPicture, served);
  const isSent = booleanOf(body.send_images ?? true, 'send_images');
  const drawn = await queue.draw(order, signal);
  const { init_images: _, mask: __, alwayson_scripts: ___, ...parameters } = body;
  return {
    json: {
      images: isSent ? drawn.map(({ png }) => base64(png)) : [],
      parameters,
      info: JSON.stringify(infoOf(order.settings, drawn, Number(body.subseed ?? -1))),
    },
  };
}

/** When something began so many seconds ago, as A1111 has it: the local time's digits. */
function stampOf(seconds: number): string {
  const began = new Date(Date.now() - 1000 * seconds);
  const local = new Date(began.getTime() - 60_000 * began.getTimezoneOffset());
  return local.toISOString().replace(/\D/g, '').slice(0, 14);
}

/** How far the picture at work is; the newest look at it, and a wish for the next. */
function progress(queue: Queue, withImage: boolean): Reply {
  const working = queue.working();
  if (withImage) queue.look();
  const share = working?.share ?? 0;
  const { settings, remade } = working?.order ?? { settings: {} };
  const job = remade ? 'extras' : settings.image === undefined ? 'txt2img' : 'img2img';
  const seconds = working ? (performance.now() - working.began) / 1000 : 0;
  const jobs = queue.waiting() + Number(working !== undefined);
  return {
    json: {
      progress: share,
      eta_relative: share > 0 ? (seconds / share) * (1 - share) : 0,
      state: {
        ...{ skipped: false, interrupted: false, stopping_generation: false },
        ...{ job: working ? job : '', job_timestamp: stampOf(seconds), job_count: jobs, job_no: 0 },
        ...{ sampling_step: working?.step ?? 0, sampling_steps: working?.steps ?? 0 },
      },
      current_image: withImage && working?.preview ? base64(working.preview) : null,
      textinfo: null,
    },
  };
}

/**
 * What A1111 tells of the pictures, of which clients read seeds and texts. A subseed that was `sent` without a strength counts for
 * nothing, and comes back.
 */
function infoOf(
  { prompt: [prompt] = [''], negativePrompt = '', batchCount, subseedStrength = 0 }: Settings,
  drawn: readonly Drawn[],
  sent: number,
) {
  const seeds = drawn.map(({ seed }) => seed);
  const read = drawn.map(({ parameters }) => readParameters(parameters).settings);
  const subseeds = read.map(({ subseed }, i) => Number(subseed ?? (sent < 0 ? -1 : sent + i)));
  const [{ steps, width, height, guidanceScale } = {}] = read;
  const numbers = Object.entries({ steps, width, height, cfg_scale: guidanceScale });
  return {
    ...{ prompt, all_prompts: drawn.map(() => prompt) },
    ...{ negative_prompt: negativePrompt, all_negative_prompts: drawn.map(() => negativePrompt) },
    ...{
      seed: seeds[0] ?? -1,
      all_seeds: seeds,
      subseed: subseeds[0] ?? -1,
      all_subseeds: subseeds,
      subseed_strength: subseedStrength,
    },
    ...Object.fromEntries(numbers.map(([key, value]) => [key, Number(value)])),
    ...{ batch_size: batchCount, index_of_first_image: 0 },
    infotexts: drawn.map(({ parameters }) => parameters),
  };
}
