// The process of `sdxl serve` that draws: it opens the models once, keeps them, and draws one order after the other as `sdxl sample`
// would; for one that names other LoRAs what these change is read again. It ends with the server, when its pipe closes, and by itself after
// an error that may have left the device broken.
import { CudaError, isOutOfMemory } from '../../engine/cuda/errors.ts';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { unionConfigOf } from '../../models/control/controlnet_union.ts';
import { isInstructPix2Pix } from '../../models/control/instruct_pix2pix.ts';
import { denoiseToEnd, type Pipeline, sizesOf } from '../../models/pipeline.ts';
import type { Request } from '../../models/request.ts';
import { isEDM } from '../../models/samplers/config.ts';
import type { DecodedPicture, Latents } from '../../models/vae/latents.ts';
import { encodeAside } from '../png_threads.ts';
import { adapterOf } from '../sample/adapter_options.ts';
import { planCall } from '../sample/call.ts';
import { controlnetOf } from '../sample/control_options.ts';
import { drawCall } from '../sample/draw.ts';
import { namesNetwork } from '../sample/hires_options.ts';
import { ipAdapterOf } from '../sample/ip_adapter_options.ts';
import { openPipeline } from '../sample/models.ts';
import { checkSample, checkSizes, checkTexts, promptsOf } from '../sample/options.ts';
import { type Look, openLook } from '../sample/preview.ts';
import { canvasOf, readInputs } from '../sample/request.ts';
import { locateSources, type Sources } from '../sample/sources.ts';
import { openUpscalers, type Upscalers } from '../sample/upscale_options.ts';
import { enlarged, keptText, mostPixels } from './enlarge.ts';
import {
  type Drawn,
  type FromDrawer,
  nothingFollowed,
  type Order,
  type Settings,
  type Standing,
  type ToDrawer,
} from './messages.ts';
import { fitted, readSent } from './sent_picture.ts';
import { edmSampler, mostSide } from './served.ts';

/** The models, open for good. */
interface Kept {
  options: Standing;
  sources: Sources;
  base: Pipeline;
  refiner?: Pipeline;
  upscalers: Upscalers;
  look?: Look;
}

/** Leaves an order that is no longer wanted. */
class NoLongerWanted extends Error {}

const say = (message: FromDrawer): void => void process.send?.(message);
const warn = (line: string): void => say({ kind: 'warning', line });
const terminal = { out: () => {}, err: (text: string) => void process.stderr.write(text), live: false };

async function open(options: Standing): Promise<Kept> {
  const sources = await locateSources(options, terminal);
  const { source, refinerSource, taeSource, device, dtype, vaeSource, under } = sources;
  const place = { options, device, dtype, vaeSource };
  const base = openPipeline(source, place, under);
  const refiner = refinerSource && openPipeline(refinerSource, place, {});
  const upscalers = openUpscalers(sources.upscalers, options, device);
  return { options, sources, base, refiner, upscalers, look: openLook(options, taeSource, place) };
}

/** Draws an order; says each step, and each picture as it is there. */
async function draw(kept: Kept, id: number, order: Order): Promise<void> {
  const { base, sources, options: asked } = following(kept, heeded(order, kept.sources));
  checkSample(asked);
  const prompts = promptsOf(asked);
  for (const line of [...checkTexts(asked, prompts), ...checkSizes(asked)]) warn(line);
  const given = picturesOf(order);
  const options = await sized(asked, sources, given);
  const read = async (name: string) => fitted(await given(name), order.fits?.[name], options);
  const call = planCall(options, sources, await readInputs(options, read), prompts);
  for (const { width, height } of [call.larger ?? call.canvas.written, call.written]) {
    const side = Math.max(width, height);
    if (side > mostSide) throw new UserError(`a side of ${side} pixels is more than the ${mostSide} served`);
  }
  const { requests } = call;
  const { refiner } = kept;
  // A second pass takes the network that the server has, where it takes one.
  const upscalers = {
    ...kept.upscalers,
    hires: namesNetwork(options.hiresUpscaler) ? kept.upscalers.finished : undefined,
  };
  const sent: Promise<void>[] = [];
  await drawCall(call, {
    ...{ upscalers, warn, base },
    refiner: refiner && (async () => refiner),
    stage: stages(kept, id, requests.length * (1 + Number(!!call.larger) + Number(!!refiner))),
    onTile: leaveIfUnwanted,
    timed: async (_, work) => work(),
    add: async (finished, _, text, { seed }) => {
      for (const each of finished) {
        const sending = sendPicture(id, each, text, seed);
        sending.catch(() => {}); // told of below, where all are waited for
        sent.push(sending);
      }
    },
  });
  await Promise.all(sent);
}

const readOf = ({ pictures, same = {}, made = {} }: Order, name: string): Promise<Picture> =>
  readSent(pictures[same[name] ?? name], name, made[name]);

/** What gives an order's pictures by their names, each read once. */
function picturesOf(order: Order): (name: string) => Promise<Picture> {
  const read = new Map<string, Promise<Picture>>();
  return (name) => {
    const picture = read.get(name) ?? readOf(order, name);
    read.set(name, picture);
    return picture;
  };
}

/**
 * Options that say how large it is drawn: where an order does not, as the picture that is drawn over, or the model's size. Pictures that
 * are followed are fitted to that, and have no say in it, as none has in A1111.
 */
async function sized(
  options: Standing,
  { source, vaeSource }: Sources,
  given: (name: string) => Promise<Picture>,
) {
  const isSaid = options.width !== undefined && options.height !== undefined;
  const image = options.image === undefined || isSaid ? undefined : await given(options.image);
  const { width, height } = canvasOf(options, sizesOf(source, vaeSource), { image });
  return { ...options, width, height };
}

/** Gives pictures back as they are made and enlarged, with the settings that they carry. */
async function remake({ upscalers }: Kept, id: number, order: Order): Promise<void> {
  const enlarging = order.remade?.enlarging;
  const names = Object.keys(order.pictures);
  // There is one.
  const network = (name: string) => (namesNetwork(name) ? upscalers.finished : undefined);
  let pixels = 0;
  for (const [i, name] of names.entries()) {
    leaveIfUnwanted();
    const sent = await readOf(order, name);
    const onTile = (step: number, steps: number) => {
      leaveIfUnwanted();
      say({ kind: 'step', id, share: (i + step / steps) / names.length, step, steps });
    };
    const { picture, told } = enlarging
      ? enlarged(sent, name, enlarging, network, onTile)
      : { picture: sent, told: '' };
    pixels += picture.width * picture.height;
    if (pixels > mostPixels)
      throw new UserError(
        `the pictures have more than ${mostPixels / 2 ** 20} megapixels together; send fewer of them`,
      );
    const kept = enlarging ? keptText(order.pictures[name], name) : {};
    const png = await encodeAside({
      pictures: [picture],
      text: told ? { ...kept, postprocessing: told } : kept,
    });
    say({ kind: 'picture', id, drawn: { png, seed: -1, parameters: told } });
  }
}

const isOfEDM = (source: ModelSource): boolean => isEDM(source.config('scheduler')._class_name);

/**
 * Settings without those that are of another kind of model, or as it has them anyway: A1111's clients send them to any, and call samplers
 * as of any.
 */
function heeded({ settings: asked, usualStrength: usual }: Order, { source }: Sources): Settings {
  const own = (name: string | undefined) => (name && isOfEDM(source) && edmSampler(name)) || name;
  const { scheduler, hiresScheduler } = asked;
  const settings = {
    ...asked,
    ...(scheduler && { scheduler: own(scheduler) }),
    ...(hiresScheduler && { hiresScheduler: own(hiresScheduler) }),
  };
  const { imageGuidanceScale, ...ofMost } = settings;
  if (!isInstructPix2Pix(source.config('unet')))
    return usual === undefined ? ofMost : { strength: usual, ...ofMost };
  const { strength, ...ofEdits } = settings;
  return strength === 1 ? ofEdits : settings;
}

/** Which of the files that the server was started with an order names. */
const chosen = (
  of: (typed: string) => { file: string },
  all: readonly string[] = [],
  wanted: readonly string[] = [],
): number[] => {
  const files = all.map((typed) => of(typed).file);
  return wanted.map((typed) => files.indexOf(of(typed).file));
};

/** The server's models and options with what an order follows beside the UNet, in its order, and nothing else. */
function following({ base, sources, options: standing }: Kept, settings: Settings) {
  const options: Standing = { ...standing, ...nothingFollowed, ...settings };
  const nets = chosen(controlnetOf, standing.controlnet, options.controlnet);
  const adapters = chosen(adapterOf, standing.adapter, options.adapter);
  const ipAdapters = chosen(ipAdapterOf, standing.ipAdapter, options.ipAdapter);
  const alone = <C, A, I>(of: {
    controlnet: readonly C[];
    adapter: readonly A[];
    ipAdapter: readonly I[];
  }) => ({
    controlnet: nets.map((i) => of.controlnet[i]),
    adapter: adapters.map((i) => of.adapter[i]),
    ipAdapter: ipAdapters.map((i) => of.ipAdapter[i]),
  });
  const under = { ...sources.under, ...alone(sources.under) };
  const controlMode = options.controlMode?.filter((_, i) => unionConfigOf(under.controlnet[i]));
  if (controlMode?.includes(-1))
    throw new UserError(
      `${under.controlnet.find(unionConfigOf)?.path} is a ControlNet union: say what its picture is by union_control_type`,
    );
  return {
    base: { ...base, ...alone(base) },
    sources: { ...sources, under },
    options: { ...options, controlMode: controlMode?.length ? controlMode : undefined },
  };
}

async function sendPicture(
  id: number,
  { finite, ...picture }: DecodedPicture,
  text: Record<string, string>,
  seed: number,
): Promise<void> {
  if (!finite)
    throw new UserError(
      'the picture shows nothing, as the model gave values that are not finite: lower the guidance scale, or serve with --dtype float32',
    );
  const drawn: Drawn = {
    png: await encodeAside({ pictures: [picture], text }),
    seed,
    parameters: text.parameters,
  };
  say({ kind: 'picture', id, drawn });
}

/** The order at work: whether it is to end, and whether someone wants to see its next step. */
let current: { id: number; unwanted: boolean; watched: boolean } | undefined;

function leaveIfUnwanted(): void {
  if (current?.unwanted) throw new NoLongerWanted();
}

/** Drives loops, `runs` in all, and tells of their steps. */
function stages({ look }: Kept, id: number, runs: number) {
  let before = 0;
  const heard = new Set<string>();
  const run = async (pipeline: Pipeline, request: Request): Promise<Latents> => {
    leaveIfUnwanted();
    // The models stay for the next order.
    const { latents } = await denoiseToEnd(pipeline, { ...request, last: false }, (progress) => {
      leaveIfUnwanted();
      const { step, steps, truncated } = progress;
      for (const cut of truncated.filter((each) => !heard.has(each))) {
        heard.add(cut);
        warn(`a prompt has more tokens than are read; this part was cut off: "${cut}"`);
      }
      say({ kind: 'step', id, share: (before + step / steps) / runs, step, steps });
      if (!look || !current?.watched) return;
      current.watched = false;
      const pictures = look.pictures(pipeline, progress.predOriginalSample(), request);
      void encodeAside({ pictures }).then((png) => say({ kind: 'preview', id, png }));
    });
    before++;
    return latents;
  };
  return () => run;
}

/** Says what went wrong; ends the process where it may be broken by it, or is of no use. */
function fail(error: unknown, id?: number): void {
  const { message, stack } = error as Error;
  const mistake = error instanceof UserError && (isOutOfMemory(error) || !(error instanceof CudaError));
  if (!mistake) process.stderr.write(`${stack}\n`);
  const told: FromDrawer = { kind: 'failed', id, message, mistake };
  if (mistake && id !== undefined) say(told);
  else process.send?.(told, () => process.exit(1));
}

let kept: Kept | undefined;

async function heed(message: ToDrawer): Promise<void> {
  if (message.kind === 'open') {
    try {
      kept = await open(message.options);
      const { device, dtype, source } = kept.sources;
      say({ kind: 'opened', told: { device: device.name, dtype, edm: isOfEDM(source) } });
    } catch (error) {
      fail(error);
    }
    return;
  }
  const { kind, id } = message;
  // What comes of an order that has ended meanwhile is no longer for anyone.
  if (kind === 'stop' && current?.id === id) current.unwanted = true;
  if (kind === 'look' && current?.id === id) current.watched = true;
  if (kind !== 'draw' || !kept) return;
  current = { id, unwanted: false, watched: false };
  try {
    await (message.order.remade ? remake : draw)(kept, id, message.order);
    say({ kind: 'done', id });
  } catch (error) {
    if (error instanceof NoLongerWanted) say({ kind: 'done', id });
    else fail(error, id);
  }
  current = undefined;
}

process.on('message', (message: ToDrawer) => void heed(message));
process.on('disconnect', () => process.exit());
// Ctrl-C reaches the whole group of processes; when this one ends is the server's to say.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => {});
