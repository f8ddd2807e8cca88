// `sdxl sample`: prompt to PNG. Everything that can be wrong with the request is checked before weights are read, and a
// picture appears under its name only once it is whole.
import type { Command } from 'commander';
import { UserError } from '../io/errors.ts';
import type { ModelSource } from '../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, type Pipeline } from '../models/pipeline.ts';
import type { Request } from '../models/request.ts';
import type { Latents } from '../models/vae/latents.ts';
import { shippedModel } from './model.ts';
import { type Bar, progressBar, stopwatch } from './progress.ts';
import { openAlbum } from './sample/album.ts';
import { planCall, type SampleCall } from './sample/call.ts';
import { drawCall, type Origin } from './sample/draw.ts';
import { addSampleOptions } from './sample/flags.ts';
import { checkIdle, type IsTyped, refuseEta, unreadWeights } from './sample/idle_flags.ts';
import { onceOf, openFor } from './sample/models.ts';
import {
  checkSample,
  checkSizes,
  checkTexts,
  promptsOf,
  type SampleOptions,
  textsOf,
} from './sample/options.ts';
import { applySettings } from './sample/picture_settings.ts';
import { checkPreview, openPreviews, type Previews } from './sample/preview.ts';
import { readInputs } from './sample/request.ts';
import { locateSources } from './sample/sources.ts';
import { withStyles } from './sample/styles.ts';
import { openUpscalers, type Upscalers } from './sample/upscale_options.ts';
import type { Terminal } from './terminal.ts';

export function addSample(command: Command, terminal: Terminal): void {
  addSampleOptions(command).action(async (options: SampleOptions) => {
    const [stray] = command.args;
    if (stray !== undefined)
      throw new UserError(`"${stray}" belongs to no flag; put the whole prompt in quotes after --prompt`);
    const notes = options.from ? applySettings(command, options.from) : [];
    for (const note of notes) terminal.err(`warning: ${note}\n`);
    await draw(await prepare(command, terminal), terminal);
  });
}

/** All of a request but the weights, checked. */
async function prepare(command: Command, terminal: Terminal) {
  const given = command.opts<SampleOptions>();
  const isTyped: IsTyped = (name) => command.getOptionValueSource(name) === 'cli';
  checkSample(given);
  const idle = checkIdle(given, isTyped);
  const { quiet = false, model = shippedModel } = given;
  const options = withStyles({ ...given, model });
  if (!given.model && !quiet)
    terminal.err('using the emoji model that comes with sdxl (64x64 pixels); name another with --model\n');
  const prompts = promptsOf(options);
  const unread = command.getOptionValueSource('emphasis') === 'default' && textsOf(options, prompts);
  for (const line of [
    ...idle,
    ...checkTexts(options, prompts),
    ...checkSizes(options),
    ...unreadWeights(unread || []),
  ])
    terminal.err(`warning: ${line}\n`);
  const album = openAlbum(
    options.output,
    options.saveLatents,
    prompts.length * options.batchCount * options.numImages,
  );
  checkPreview(options, album.paths);
  const inputs = await readInputs(options);
  const sources = await locateSources(options, terminal);
  const call = planCall(options, sources, inputs, prompts);
  refuseEta(call.sampler, isTyped);
  return { options, album, sources, call };
}

/** A picture that is written, and what it was drawn from. */
type Drawn = { file: string } & Origin;

type Prepared = Awaited<ReturnType<typeof prepare>>;

/** Loads the models, one after the other, and draws. */
async function draw(prepared: Prepared, terminal: Terminal): Promise<void> {
  const { options, album, sources, call } = prepared;
  const { device, dtype, source, refinerSource, vaeSource, taeSource } = sources;
  const { quiet = false } = options;
  const { seconds, timed } = stopwatch();
  const warn = (line: string) => terminal.err(`warning: ${line}\n`);
  const tell = onceOf(warn);
  const place = { options, device, dtype, vaeSource, tell, timed };
  const base = await openFor(source, [call], place, sources.under);
  let pipeline = base;
  /** After the base is gone: together they would take twice the memory. */
  const openRefiner = async (from: ModelSource, refined: readonly Request[]) => {
    pipeline.release();
    pipeline = await openFor(from, [{ options, requests: refined }], place);
    return pipeline;
  };
  const pictures: Drawn[] = [];
  let previews: Previews | undefined;
  let upscalers: Upscalers | undefined;
  try {
    upscalers = await timed('load', () => openUpscalers(sources.upscalers, options, device));
    previews = await timed('load', () => openPreviews(options, taeSource, { device, dtype }, warn));
    if (!quiet) terminal.err(`${headOf(call)}, ${dtype} on ${device.name}\n`);
    await drawCall(call, {
      ...{ base, upscalers, warn, timed },
      refiner: refinerSource && ((refined) => openRefiner(refinerSource, refined)),
      stage: stages(call.requests.length, options, previews, terminal, tell),
      onTile: onTileOf(terminal, quiet),
      async add(drawn, latents, text, origin) {
        const before = album.files.length;
        await album.add(drawn, latents, text);
        pictures.push(...album.files.slice(before).map((file) => ({ file, ...origin })));
      },
    });
    await timed('decode', () => album.close());
    report(prepared, terminal, { pictures, seconds });
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

/** From which seed, and how large. */
function headOf({ requests: [first], larger, options: { subseed }, seed }: SampleCall): string {
  const sizes = [first, ...(larger ? [larger] : [])].map(({ width, height }) => `${width}x${height}`);
  return `seed ${seed}${subseed === undefined ? '' : `, subseed ${subseed}`}, ${sizes.join(', then ')}`;
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
  { options, album: { files }, sources: { device, dtype }, call }: Prepared,
  terminal: Terminal,
  { pictures, seconds }: { pictures: readonly Drawn[]; seconds: Record<string, number> },
): void {
  const { seed, written, requests } = call;
  const { subseed } = call.options;
  const result = {
    files,
    pictures,
    latents: options.saveLatents,
    ...{ seed, subseed, ...written, steps: requests[0].num_inference_steps },
    ...{ model: options.model, dtype, device: device.name, seconds },
    peak_bytes: device.memory.peak,
    peak_process_bytes: process.resourceUsage().maxRSS * 1024,
  };
  const total = Object.values(seconds).reduce((sum, part) => sum + part, 0);
  if (options.json) terminal.out(`${JSON.stringify(result)}\n`);
  else if (!options.quiet) terminal.err(`${files.join(', ')} in ${total.toFixed(1)} s\n`);
}
