// `sdxl sample`: prompt to PNG. Everything that can be wrong with the request is checked before weights are read, and a
// picture appears under its name only once it is whole.
import type { Command } from 'commander';
import { type Device, openDevice } from '../engine/device.ts';
import { MemoryError } from '../engine/memory.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { autoencoder, checkDecode } from '../models/autoencoder.ts';
import type { ModelSource } from '../models/checkpoint.ts';
import { cachingOf } from '../models/deepcache.ts';
import { feedForwardToFp8 } from '../models/fp8.ts';
import { checkInpainting } from '../models/inpainting.ts';
import { checkInstructPix2Pix } from '../models/instruct_pix2pix.ts';
import type { IPAdapterSource } from '../models/ip_adapter.ts';
import type { DecodedPicture, Latents } from '../models/latents.ts';
import { locateControlNet, locateModel, locateT2IAdapter, locateTae, locateVae } from '../models/locate.ts';
import { locateIPAdapter } from '../models/locate_ip_adapter.ts';
import { locateLora } from '../models/locate_lora.ts';
import { locateWithUNet } from '../models/locate_unet.ts';
import type { AdapterFile } from '../models/lora.ts';
import { checkControlModes } from '../models/multicontrolnet.ts';
import { pagOf } from '../models/pag.ts';
import { decode, denoiseToEnd, type Pipeline, planOf, sizesOf } from '../models/pipeline.ts';
import type { Request } from '../models/request.ts';
import { parseSchedulerConfig } from '../models/samplers/config.ts';
import { checkSquares, t2iAdapterConfig } from '../models/t2i_adapter.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { adapterOf } from './adapter_options.ts';
import { openAlbum } from './album.ts';
import { controlnetOf, oneOrAll } from './control_options.ts';
import { enlarged, hiresSize, planSecondPass } from './hires_options.ts';
import { ipAdapterOf } from './ip_adapter_options.ts';
import { downloadsOn, shippedModel } from './model.ts';
import { applySettings, pictureText } from './picture_settings.ts';
import { checkPreview, fitPreview, openPreviews, type Previews } from './preview.ts';
import { type Bar, progressBar } from './progress.ts';
import { addSampleOptions } from './sample_flags.ts';
import { openFor, type Under } from './sample_models.ts';
import {
  checkSample,
  checkScores,
  checkSizes,
  checkTexts,
  loraOf,
  promptsOf,
  type SampleOptions,
} from './sample_options.ts';
import {
  baseRequests,
  canvasOf,
  hiresRequest,
  readInputs,
  refinerRequest,
  seedOf,
  wholeSide,
} from './sample_request.ts';
import type { Terminal } from './terminal.ts';
import { locateUpscalers, openUpscalers, type Upscalers, writtenSize } from './upscale_options.ts';

export function addSample(command: Command, terminal: Terminal): void {
  addSampleOptions(command).action(async (options: SampleOptions) => {
    const [stray] = command.args;
    if (stray !== undefined)
      throw new UserError(`"${stray}" belongs to no flag; put the whole prompt in quotes after --prompt`);
    const notes = options.from ? applySettings(command, options.from) : [];
    for (const note of notes) terminal.err(`warning: ${note}\n`);
    await draw(await prepare(command.opts<SampleOptions>(), terminal), terminal);
  });
}

/** All of a request but the weights, checked. */
async function prepare(given: SampleOptions, terminal: Terminal) {
  checkSample(given);
  const { quiet = false, model = shippedModel } = given;
  const options = { ...given, model };
  if (!given.model && !quiet)
    terminal.err('using the emoji model that comes with sdxl (64x64 pixels); name another with --model\n');
  const prompts = promptsOf(options);
  for (const line of [...checkTexts(options, prompts), ...checkSizes(options)])
    terminal.err(`warning: ${line}\n`);
  const album = openAlbum(
    options.output,
    options.saveLatents,
    prompts.length * options.batchCount * options.numImages,
  );
  checkPreview(options, album.paths);
  const inputs = await readInputs(options);
  const device = openDevice(options.device, (line) => terminal.err(`warning: ${line}\n`));
  const { configs, variant, unet } = options;
  const locate = { configs, variant, onProgress: downloadsOn(terminal, quiet) };
  const source = await locateWithUNet(model, unet, locate);
  checkScores(options, source.modelIndex.requires_aesthetics_score === true);
  const refinerSource = options.refiner ? await locateModel(options.refiner, locate) : undefined;
  const vaeSource = options.vae ? await locateVae(options.vae, locate) : undefined;
  const taeSource = options.tae ? await locateTae(options.tae, locate) : undefined;
  for (const line of fitPreview(options, vaeSource ?? source, taeSource)) terminal.err(`warning: ${line}\n`);
  const controlnet: ModelSource[] = [];
  for (const { file } of (options.controlnet ?? []).map(controlnetOf))
    controlnet.push(await locateControlNet(file, locate));
  checkControlModes(controlnet, oneOrAll(options.controlMode));
  const adapter: ModelSource[] = [];
  for (const { file } of (options.adapter ?? []).map(adapterOf))
    adapter.push(await locateT2IAdapter(file, locate));
  const ipAdapter: IPAdapterSource[] = [];
  for (const { file } of (options.ipAdapter ?? []).map(ipAdapterOf))
    ipAdapter.push(await locateIPAdapter(file, locate));
  const upscalers = await locateUpscalers(options, locate);
  const lora: AdapterFile[] = [];
  for (const { file, scale } of (options.lora ?? []).map(loraOf))
    lora.push({ path: await locateLora(file, locate), scale });
  const dtype = chooseDtype(options.dtype, source, device);
  const { seed: asked = -1 } = options;
  const seed = asked < 0 ? Math.floor(Math.random() * 2 ** 32) : asked;
  const sizes = sizesOf(source, vaeSource);
  const canvas = canvasOf(options, sizes, inputs);
  const larger = hiresSize(options, canvas, wholeSide(options, sizes));
  for (const { width, height } of larger ? [canvas, larger] : [canvas])
    for (const each of adapter) checkSquares(t2iAdapterConfig(each), [height, width]);
  const written = writtenSize(larger ?? canvas.written, options, upscalers);
  const decoder = autoencoder((vaeSource ?? refinerSource ?? source).config('vae'));
  checkDecode(decoder, larger ?? canvas, options.vaeTiling);
  const requests = baseRequests(options, canvas, prompts, seed);
  const [first] = requests;
  const none: Latents = { shape: [], data: new Float32Array() };
  const { sampler } = planned(source, first);
  if (refinerSource) planned(refinerSource, refinerRequest(options, first, none));
  if (larger)
    planSecondPass(options, first.num_inference_steps, () => {
      planned(
        source,
        hiresRequest(options, larger, {}, first, [seed, 0, 0], () => none),
      );
    });
  const under = { controlnet, adapter, ipAdapter, lora };
  const sources = { source, refinerSource, vaeSource, taeSource, upscalers, under };
  return { options, requests, canvas, larger, written, album, device, dtype, seed, sampler, ...sources };
}

/** The steps of a request. @throws UserError where the model cannot do them, or has no such layers, or is for another request */
function planned(from: ModelSource, asked: Request) {
  const config = parseUNetConfig(from.config('unet'));
  checkInpainting(config, asked);
  checkInstructPix2Pix(config, asked);
  cachingOf(asked, config);
  if (asked.pag_scale) pagOf(asked, unet(config)); // thousands of modules, for their names alone
  const scheduler = parseSchedulerConfig(from.config('scheduler'));
  return planOf({ scheduler, unetConfig: config }, asked);
}

/** Loads the models, one after the other, and draws. */
async function draw(prepared: Awaited<ReturnType<typeof prepare>>, terminal: Terminal): Promise<void> {
  const { options, requests, canvas, larger, written, album, device, dtype, seed } = prepared;
  const { source, refinerSource, vaeSource, taeSource } = prepared;
  const { quiet = false, model } = options;
  const [{ width, height, num_inference_steps: steps }] = requests;
  const { seconds, timed } = stopwatch();
  const warn = (line: string) => terminal.err(`warning: ${line}\n`);
  const tell = onceOf(warn);
  const open = async (from: ModelSource, asked: readonly Request[], under?: Under) => {
    const opened = await openFor(from, asked, { options, device, dtype, vaeSource, tell, timed }, under);
    if (options.fp8) feedForwardToFp8(opened.pipeline.unet);
    return opened;
  };
  let { pipeline, requests: asked } = await open(source, requests, prepared.under);
  let previews: Previews | undefined;
  let upscalers: Upscalers | undefined;
  try {
    upscalers = await timed('load', () => openUpscalers(prepared.upscalers, options, device));
    previews = await timed('load', () => openPreviews(options, taeSource, { device, dtype }, warn));
    const stage = stages(requests.length, options, previews, terminal, tell);
    const sizes = [{ width, height }, ...(larger ? [larger] : [])].map(
      (each) => `${each.width}x${each.height}`,
    );
    if (!quiet) terminal.err(`seed ${seed}, ${sizes.join(', then ')}, ${dtype} on ${device.name}\n`);
    const { finish: enlarge, hires: network } = upscalers;
    const onTile = onTileOf(terminal, quiet);
    const finish = finishing(prepared, warn, (latents) =>
      decode(pipeline, latents, options.vaeTiling).map(({ finite, ...drawn }) => ({
        ...enlarge(canvas.finish(drawn), onTile),
        finite,
      })),
    );
    const halfway: Latents[] = [];
    const [sampling, again] = [stage('sampling'), stage('second pass')];
    for (const [i, request] of asked.entries()) {
      let latents = await timed('sample', () => sampling(pipeline, request));
      if (larger) {
        const place = [seed, i, requests.length] as const;
        const second = () =>
          hiresRequest(options, larger, canvas.inputs, request, place, (draw) =>
            enlarged(pipeline, latents, larger, { ...options, network, onTile }, draw),
          );
        latents = await timed('sample', () => again(pipeline, second()));
      }
      if (refinerSource) halfway.push(latents);
      else await timed('decode', () => finish(i, latents));
    }
    if (refinerSource) {
      // One model after the other: together they would take twice the memory.
      pipeline.release();
      const refined = requests.map((request, i) => refinerRequest(options, request, halfway[i]));
      ({ pipeline, requests: asked } = await open(refinerSource, refined));
      const refining = stage('refining');
      for (const [i, request] of asked.entries()) {
        const latents = await timed('sample', () => refining(pipeline, request));
        await timed('decode', () => finish(i, latents));
      }
    }
    await timed('decode', () => album.close());
    report(options, terminal, {
      files: album.files,
      ...{ seed, ...written, steps },
      ...{ model, dtype, device: device.name, seconds },
      peak_bytes: device.memory.peak,
      peak_process_bytes: process.resourceUsage().maxRSS * 1024,
    });
    if (album.spoilt.length > 0)
      throw new UserError(
        `${album.spoilt.join(', ')} shows nothing, as the model gave values that are not finite: lower --guidance-scale, or use --dtype float32`,
      );
  } finally {
    pipeline.release();
    upscalers?.release();
    await album.settle();
    await previews?.close();
  }
}

/**
 * Decodes the latents of a request and writes the pictures; or has them wait for the last request, which frees the UNet, where there is
 * no memory to decode beside it.
 */
function finishing(
  { options, requests, album, seed, sampler }: Awaited<ReturnType<typeof prepare>>,
  warn: (line: string) => void,
  finished: (latents: Latents) => DecodedPicture[],
) {
  const finish = (i: number, latents: Latents) => {
    const text = pictureText(options, requests[i], seedOf(options, seed, i), sampler);
    return album.add(finished(latents), latents, text);
  };
  const waiting: [number, Latents][] = [];
  return async (i: number, latents: Latents): Promise<void> => {
    const isLast = i === requests.length - 1;
    try {
      if (waiting.length === 0) return await finish(i, latents);
    } catch (error) {
      if (!(error instanceof MemoryError) || isLast) throw error;
      warn('there is no memory to decode beside the UNet, so pictures come when all are sampled');
    }
    waiting.push([i, latents]);
    if (isLast) for (const each of waiting) await finish(...each);
  };
}

/** A bar for each picture that a network enlarges. */
function onTileOf(terminal: Terminal, quiet: boolean) {
  let bar: Bar | undefined;
  return (done: number, all: number): void => {
    bar ??= progressBar(terminal, 'enlarging', quiet);
    bar.update(done, all);
    if (done < all) return;
    bar.end();
    bar = undefined;
  };
}

/** Tells of text that is cut off, of each once for all models. */
function onceOf(warn: (line: string) => void) {
  const told = new Set<string>();
  return (cut: readonly string[], before?: () => void): void => {
    for (const text of cut.filter((each) => !told.has(each))) {
      told.add(text);
      before?.();
      warn(
        `the prompt has more tokens than are read; this part was cut off (--max-token-length reads more): "${text}"`,
      );
    }
  };
}

/** Adds up what the parts of a call take. */
function stopwatch() {
  const seconds = { load: 0, sample: 0, decode: 0 };
  const timed = async <R>(part: keyof typeof seconds, fn: () => R | Promise<R>): Promise<R> => {
    const began = performance.now();
    const result = await fn();
    seconds[part] += (performance.now() - began) / 1000;
    return result;
  };
  return { seconds, timed };
}

/** The full-size model does not fit a small machine in float32, and the tests' models are too small to gain. */
function chooseDtype(asked: FloatDType | 'auto', source: ModelSource, device: Device): FloatDType {
  if (asked !== 'auto') return asked;
  const [channels] = parseUNetConfig(source.config('unet')).block_out_channels;
  return device.name !== 'reference' && channels >= 256 ? 'bfloat16' : 'float32';
}

/** Drives the loop, with one bar for all requests of a stage. */
function stages(
  requests: number,
  { quiet = false, batchCount }: SampleOptions,
  previews: Previews,
  terminal: Terminal,
  tell: ReturnType<typeof onceOf>,
) {
  return (label: string) => {
    const bar = progressBar(terminal, label, quiet);
    let before = 0;
    return async (pipeline: Pipeline, request: Request): Promise<Latents> => {
      const what = batchCount > 1 ? 'batch' : 'prompt';
      const note = requests > 1 ? `${what} ${before + 1} of ${requests}` : '';
      const { latents } = await denoiseToEnd(pipeline, request, (progress) => {
        const { step, steps, truncated } = progress;
        previews.show(pipeline, progress);
        tell(truncated, () => bar.end()); // the line is the warning's
        bar.update(before * steps + step, requests * steps, note);
      });
      before++;
      bar.end();
      return latents;
    };
  };
}

/** The result as JSON, or for a person where it lies and how long it took. */
function report(
  { json, quiet }: SampleOptions,
  terminal: Terminal,
  result: Readonly<Record<string, unknown>> & { files: readonly string[]; seconds: Record<string, number> },
): void {
  const { files, seconds } = result;
  const total = Object.values(seconds).reduce((sum, part) => sum + part, 0);
  if (json) terminal.out(`${JSON.stringify(result)}\n`);
  else if (!quiet) terminal.err(`${files.join(', ')} in ${total.toFixed(1)} s\n`);
}
