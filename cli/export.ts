// `sdxl export`: a training checkpoint or a model in one format to a model in another, certified before it takes its name.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Command } from 'commander';
import { openDevice } from '../engine/device.ts';
import { UserError } from '../io/errors.ts';
import { inTurns } from '../io/turns.ts';
import { openModel } from '../models/checkpoint/checkpoint.ts';
import { openWeightsFile } from '../models/checkpoint/weights_file.ts';
import { componentConfigs } from '../models/formats/diffusers_config.ts';
import { type Certificate, exportFolder, exportSingleFile } from '../models/formats/export.ts';
import { exportGguf } from '../models/formats/export_gguf.ts';
import { presets } from '../models/formats/presets.ts';
import { locateModel } from '../models/locate/locate.ts';
import { locateUNet } from '../models/locate/locate_unet.ts';
import { exportLora, type LoraFormat } from '../models/lora/export_lora.ts';
import { type Extracted, extractLora } from '../models/lora/extract_lora.ts';
import { adapterAt, isAdapter, type LoraTargets, locateAdapter } from '../models/lora/lora_file.ts';
import { targetsIn, targetsOf } from '../models/lora/merged.ts';
import { addExportOptions } from './export/flags.ts';
import {
  type ExportOptions,
  formatFor,
  isOfLora,
  namesOf,
  refuseFurther,
  refuseIdle,
  refuseIdleConfigs,
  refuseOccupied,
  refuseUnsaved,
  usualRank,
} from './export/options.ts';
import { isCheckpoint, mergeRecipe, openSource, withMerges } from './export/sources.ts';
import { downloadsOn } from './model.ts';
import { progressBar } from './progress.ts';
import { heedingSignals, Stopped, type Terminal } from './terminal.ts';

/** A format that is not typed is told by the name of what is written. */
type Typed = Omit<ExportOptions, 'format'> & Partial<Pick<ExportOptions, 'format'>>;

export function addExport(command: Command, terminal: Terminal): void {
  addExportOptions(command).action((from: string, out: string, typed: Typed) => {
    const options = { ...typed, format: formatFor(out, typed.format) };
    refuseFurther(command.args.slice(2), options);
    refuseIdle(options, command.getOptionValueSource('maxShardSize') === 'cli');
    return run(from, out, options, terminal);
  });
}

async function run(from: string, out: string, options: ExportOptions, terminal: Terminal): Promise<void> {
  const { format, dtype, type } = options;
  refuseOccupied(out, format);
  if (options.ema && !isCheckpoint(from))
    throw new UserError(`${from} is no training checkpoint and has no moving averages; leave out --ema`);
  const adapter = adapterFile(from, options);
  refuseIdleConfigs(from, options, adapter !== undefined);
  if (adapter && options.base !== undefined)
    throw new UserError(`${from} is a LoRA, and --base is beside a whole tuned model; leave it out`);
  if (adapter && !isOfLora(format))
    throw new UserError(`${from} is a LoRA; export it as --format lora-peft or lora-kohya`);
  if (!adapter && isOfLora(format) && options.base === undefined) throw noAdapter(from, options);
  const report =
    adapter && isOfLora(format)
      ? { layers: exportLora(adapter, out, format, loraTargets(options.configs), dtype) }
      : isOfLora(format)
        ? await extract(from, out, format, options, terminal)
        : await exportWeights(from, out, options, terminal);
  if (options.json)
    terminal.out(
      `${JSON.stringify({ out, format, dtype, type, merge: mergeRecipe(from, options), ...report })}\n`,
    );
  else if (!options.quiet) terminal.err(`${out}: ${told(report)}\n`);
}

const told = (report: Certificate | Extracted | { layers: number }): string =>
  'layers' in report
    ? `${report.layers} layers${'retained' in report ? howNear(report) : ''}`
    : report.tensors === 0
      ? 'no weights, the rest as it was'
      : `${report.tensors} tensors read back equal; a forward pass of ${report.forward.join(', ')} ${nearness(report)} the source's`;

const nearness = ({ error }: Certificate): string =>
  error ? `is at most ${(100 * error).toPrecision(2)} % from` : 'equals';

const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;

const howNear = ({ retained, worst, others }: Extracted): string =>
  ` retain ${percent(retained)} of what differs in them (Frobenius norm), the worst, ${worst.layer}, ${percent(worst.retained)}${
    others ? `; ${others} norms, biases and embeddings differ too, which a LoRA does not hold` : ''
  }`;

/** The LoRA file that `path` is or, as a checkpoint or a finished run's folder, holds. */
function adapterFile(path: string, { ema }: ExportOptions): string | undefined {
  const found = adapterAt(path, { ema });
  if (!found) return undefined;
  const file = openWeightsFile(found);
  const adapter = isAdapter(file);
  file.close();
  return adapter ? found : undefined;
}

/** Why there is no adapter to export. */
function noAdapter(path: string, { ema }: ExportOptions): UserError {
  if (ema && adapterAt(path))
    return new UserError(`${path} has no moving averages, as its run kept none; leave out --ema`);
  const isModel = existsSync(join(path, 'model_index.json')) || isCheckpoint(path);
  if (!isModel) locateAdapter(path); // tells of nothing there, and of a folder that has none
  return new UserError(
    `${path} is not a LoRA; export a whole model as --format diffusers, single-file or gguf, or name the model that it was tuned from with --base`,
  );
}

/** The model that an adapter is for, on shapes alone: SDXL's base where none lends its configs. */
function loraTargets(configs: string | undefined): LoraTargets {
  if (configs !== undefined) return targetsIn(openModel(configs));
  const published = componentConfigs(presets['sdxl-base']);
  return targetsOf('sdxl-base', (name) => published[name]);
}

async function extract(
  from: string,
  out: string,
  format: LoraFormat,
  options: ExportOptions,
  terminal: Terminal,
): Promise<Extracted> {
  const quiet = options.quiet ?? false;
  const { configs, rank = usualRank, convRank: conv_rank, dtype } = options;
  const where = { configs, onProgress: downloadsOn(terminal, quiet) };
  const save_keys = options.saveKeys === undefined ? [] : namesOf(options.saveKeys);
  // Where nothing else is compared, either may be a UNet alone.
  const isLone = save_keys.join() === 'unet';
  const lender = isLone && configs !== undefined ? openModel(configs) : undefined;
  const located = (path: string) => (isLone ? locateUNet(path, lender, where) : locateModel(path, where));
  const isWhole = isCheckpoint(from) || options.unet !== undefined;
  const tuned = await (isWhole ? openSource(from, options, where) : located(from));
  const base = await located(options.base as string);
  const device = openDevice(options.device);
  // In float32, as what is merged is to be seen as it is.
  const merged = await withMerges(tuned, options, where, { device, dtype: 'float32' });
  const bar = progressBar(terminal, 'weights', quiet);
  const onProgress = ({ done, total }: { done: number; total: number }) => bar.update(done, total);
  const request = { save_keys, rank, conv_rank, dtype, device, onProgress };
  return heeded(extractLora(base, merged, out, format, request)).finally(() => {
    bar.end();
    merged.close();
  });
}

/** Does the work to its end, or to a signal, at which it leaves nothing. */
function heeded<R>(work: Generator<void, R>): Promise<R> {
  const stop: { by?: NodeJS.Signals } = {};
  const heed = (): void => {
    if (stop.by) throw new Stopped(stop.by);
  };
  const ask = (signal: NodeJS.Signals) => void (stop.by = signal);
  return heedingSignals(ask, () => inTurns(work, heed));
}

async function exportWeights(
  from: string,
  out: string,
  options: ExportOptions,
  terminal: Terminal,
): Promise<Certificate> {
  const quiet = options.quiet ?? false;
  const where = { configs: options.configs, onProgress: downloadsOn(terminal, quiet) };
  const source = await openSource(from, options, where);
  const device = openDevice(options.device);
  const merged = await withMerges(source, options, where, { device, dtype: options.dtype });
  const recipe = mergeRecipe(from, options);
  const keys = options.saveKeys === undefined ? [] : namesOf(options.saveKeys);
  const isUNet = (name: string): boolean => name === 'unet';
  try {
    refuseUnsaved(keys, {
      '--unet': options.unet === undefined ? undefined : isUNet,
      ...merged.changes,
    });
  } catch (error) {
    merged.close();
    throw error;
  }
  const bar = progressBar(terminal, 'tensors', quiet);
  const request = {
    save_keys: keys,
    dtype: options.dtype,
    type: options.type,
    metadata: recipe && { sd_merge_recipe: JSON.stringify(recipe) },
    max_shard_size: options.maxShardSize,
    device,
    onProgress: ({ done, total }: { done: number; total: number }) => bar.update(done, total),
  };
  const written = { 'single-file': exportSingleFile, gguf: exportGguf, diffusers: exportFolder };
  const work = written[options.format as keyof typeof written](merged, out, request);
  return heeded(work).finally(() => {
    bar.end();
    merged.close();
  });
}
