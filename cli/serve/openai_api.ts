// OpenAI's routes for images (`/v1`), which many programs speak: pictures from a prompt, or of a picture with a mask whose transparent
// parts are painted anew, as base64, and on wish as events with previews while they are drawn. What OpenAI has no word for is in
// diffusers' words, and prompts are read as `sdxl sample` reads them.
import { UserError } from '../../io/errors.ts';
import { decodeAlpha } from '../../io/image.ts';
import { encodePng } from '../../io/png.ts';
import { oneOf, side } from '../option_values.ts';
import {
  type Body,
  base64,
  type Field,
  numberOf,
  numeric,
  only,
  prompt,
  readFields,
  spelled,
  text,
  unheeded,
} from './fields.ts';
import { type HttpRequest, Refusal, type Reply, type Routes } from './http.ts';
import type { Drawn, Order, Settings } from './messages.ts';
import { type Queue, tellingBy } from './queue.ts';
import { mostPictures, mostSide, mostSteps, type Served, usualStrength } from './served.ts';

const size: Field = (value, key) => {
  if (value === 'auto') return {};
  const [, width, height] = /^(\d+)x(\d+)$/.exec(spelled(value)) ?? [];
  if (width === undefined)
    throw new UserError(`${key} takes WIDTHxHEIGHT such as 1024x1024, or auto, not ${JSON.stringify(value)}`);
  const read = (pixels: string): number => {
    if (Number(pixels) > mostSide) throw new UserError(`${key} ${value}: the longest side is ${mostSide}`);
    return side(key)(pixels);
  };
  return { width: read(width), height: read(height) };
};

/** The files that are made of the pictures' PNGs. */
const formats = ['png', 'jpeg', 'webp'] as const;
type Format = (typeof formats)[number];

/** Keys of both routes. */
const fields: Readonly<Record<string, Field>> = {
  prompt,
  n: numeric('batchCount', { min: 1, max: mostPictures, whole: true }),
  size,
  seed: numeric('seed', { min: -1, max: 2 ** 53 - 1, whole: true }),
  negative_prompt: text('negativePrompt'),
  num_inference_steps: numeric('steps', { min: 1, max: mostSteps, whole: true }),
  guidance_scale: numeric('guidanceScale', { min: 0 }),
  strength: numeric('strength', { min: 0, max: 1 }),
  scheduler: text('scheduler'),
  background: only('auto', 'opaque'),
  // Read below, or a wish that there is one answer to.
  ...Object.fromEntries(
    [
      ...['response_format', 'output_format', 'output_compression', 'stream', 'partial_images'],
      ...['model', 'quality', 'style', 'user', 'moderation', 'input_fidelity'],
    ].map((key) => [key, unheeded]),
  ),
};

/** What a flag of `sdxl sample` is called here. */
const flagKeys: Readonly<Record<string, string>> = {
  ...{ '--prompt': 'prompt', '--negative-prompt': 'negative_prompt', '--seed': 'seed' },
  ...{ '--width': 'size', '--height': 'size', '--steps': 'num_inference_steps' },
  ...{ '--guidance-scale': 'guidance_scale', '--scheduler': 'scheduler' },
  ...{ '--image': 'image', '--mask': 'mask', '--strength': 'strength' },
};

/** Previews of an answer: OpenAI has up to 3, and the page asks for more. */
export const mostPartials = 20;

/** How the pictures are handed over. */
function answerOf(body: Body) {
  const usual = /^dall-e/.test(spelled(body.model ?? '')) ? 'url' : 'b64_json'; // as OpenAI has it
  const kind = oneOf('response_format', ['b64_json', 'url'])(spelled(body.response_format ?? usual));
  const format = oneOf('output_format', formats)(spelled(body.output_format ?? 'png'));
  const whole = (key: string, usual: number, max: number): number =>
    numberOf(body[key] ?? usual, key, { min: 0, max, whole: true });
  return {
    format,
    isUrl: kind === 'url',
    quality: Math.max(1, whole('output_compression', 100, 100)),
    partials: whole('partial_images', 0, mostPartials),
    stream: body.stream === true || body.stream === 'true',
  };
}

type Answer = ReturnType<typeof answerOf>;

/** A picture's file in the format that is wished. PNGs keep their text. */
async function encoded({ png }: Drawn, { format, quality }: Answer): Promise<string> {
  if (format === 'png') return base64(png);
  const { default: sharp } = await import('sharp');
  return base64(await sharp(png)[format as Exclude<Format, 'png'>]({ quality }).toBuffer());
}

const now = (): number => Math.floor(Date.now() / 1000);

async function whole(queue: Queue, order: Order, answer: Answer, signal: AbortSignal): Promise<Reply> {
  const drawn = await queue.draw(order, signal);
  const data = await Promise.all(
    drawn.map(async (each) => {
      const file = await encoded(each, answer);
      // The server keeps no pictures: a URL is the picture itself.
      const given = answer.isUrl ? { url: `data:image/${answer.format};base64,${file}` } : { b64_json: file };
      return { ...given, seed: each.seed };
    }),
  );
  return { json: { created: now(), output_format: answer.format, data } };
}

/** So many previews, spread over the steps, and each picture as it is finished. */
function events(queue: Queue, order: Order, answer: Answer, signal: AbortSignal, kind: string): Reply {
  return {
    async events(send) {
      const told = { created_at: now(), output_format: answer.format };
      const [all, partial, completed] = [answer.partials, `${kind}.partial_image`, `${kind}.completed`];
      let [asked, shown] = [0, 0];
      let sent = Promise.resolve();
      await queue.draw(order, signal, {
        step(share) {
          if (asked === all || share < (asked + 1) / (all + 1)) return;
          asked++;
          queue.look();
        },
        preview: (png) =>
          send(partial, {
            ...{ type: partial, b64_json: base64(png), partial_image_index: shown++ },
            ...{ ...told, output_format: 'png' },
          }),
        picture(drawn) {
          sent = sent.then(async () =>
            send(completed, {
              ...{ type: completed, b64_json: await encoded(drawn, answer), seed: drawn.seed },
              ...told,
            }),
          );
          sent.catch(() => {}); // told of below
        },
      });
      await sent;
    },
  };
}

export function openaiApi(served: Served, orders: Queue): Routes {
  const queue = tellingBy(flagKeys, orders);
  const draw = async (body: Body, over: Order, kind: string, signal: AbortSignal): Promise<Reply> => {
    const read = readFields(body, fields, served.tellIgnored);
    if (!read.prompt) throw new UserError('prompt is not there; say what to draw');
    const answer = answerOf(body);
    const settings: Settings = { ...read, ...over.settings };
    const order = { ...over, settings };
    return answer.stream ? events(queue, order, answer, signal, kind) : whole(queue, order, answer, signal);
  };
  const model = { id: served.name, object: 'model', created: 0, owned_by: 'sdxl' };
  return {
    'POST /v1/images/generations': async ({ json, signal }) =>
      draw(await json(), { settings: {}, pictures: {} }, 'image_generation', signal),
    'POST /v1/images/edits': async (asked) => {
      const { body, over } = await editOf(asked);
      return draw(body, over, 'image_edit', asked.signal);
    },
    'POST /v1/images/variations': () => {
      throw new Refusal(
        501,
        'variations of a picture are not there; send it to /v1/images/edits with a prompt',
      );
    },
    'GET /v1/models': () => ({ json: { object: 'list', data: [model] } }),
    [`GET /v1/models/${served.name}`]: () => ({ json: model }),
  };
}

/** A form with a picture, and perhaps a mask. */
async function editOf({ form }: HttpRequest): Promise<{ body: Body; over: Order }> {
  const entries = [...(await form())];
  const files = entries.filter(([, value]) => typeof value !== 'string') as [string, Blob][];
  const named = (...keys: string[]) => files.filter(([key]) => keys.includes(key)).map(([, file]) => file);
  const [image, ...more] = named('image', 'image[]');
  if (!image) throw new UserError('image is not there; send the picture to edit as a file of the form');
  if (more.length > 0)
    throw new UserError(
      `image has ${1 + more.length} pictures, and the model edits one, without others to go by; send that one alone`,
    );
  const [mask] = named('mask');
  const bytes = new Uint8Array(await image.arrayBuffer());
  const body = Object.fromEntries(entries.filter(([, value]) => typeof value === 'string'));
  if (!mask)
    return { body, over: { settings: { image: 'image' }, usualStrength, pictures: { image: bytes } } };
  const painted = await paintedWhere(new Uint8Array(await mask.arrayBuffer()));
  return {
    body,
    over: { settings: { image: 'image', mask: 'mask' }, pictures: { image: bytes, mask: painted } },
  };
}

/** OpenAI's mask, which is transparent where to paint, as ours, which is white there; one without transparent parts is ours. */
async function paintedWhere(file: Uint8Array): Promise<Uint8Array> {
  const alpha = await decodeAlpha(file, 'mask', { mostPixels: mostSide ** 2 });
  if (alpha.data.every((opacity) => opacity === 255)) return file;
  return encodePng({ ...alpha, data: alpha.data.map((opacity) => 255 - opacity) });
}
