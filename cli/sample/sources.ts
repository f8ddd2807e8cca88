// Where a call of `sdxl sample` draws and what it reads its models from: all are found, and told apart by their configs, before any
// weight is read.
import { type Device, openDevice } from '../../engine/device.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import type { IPAdapterSource } from '../../models/ip_adapter/ip_adapter.ts';
import {
  locateControlNet,
  locateModel,
  locateT2IAdapter,
  locateTae,
  locateVae,
} from '../../models/locate/locate.ts';
import { locateIPAdapter } from '../../models/locate/locate_ip_adapter.ts';
import { locateLora } from '../../models/locate/locate_lora.ts';
import { locateWithUNet } from '../../models/locate/locate_unet.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { parseUNetConfig } from '../../models/unet/unet.ts';
import { vaeFor } from '../../models/vae/autoencoder.ts';
import { downloadsOn } from '../model.ts';
import type { Terminal } from '../terminal.ts';
import { adapterOf } from './adapter_options.ts';
import { controlnetOf } from './control_options.ts';
import { ipAdapterOf } from './ip_adapter_options.ts';
import { checkScores, loraOf, type SampleOptions } from './options.ts';
import { fitPreview } from './preview.ts';
import { locateUpscalers, type UpscalerSources } from './upscale_options.ts';

export interface Sources {
  device: Device;
  dtype: FloatDType;
  source: ModelSource;
  refinerSource?: ModelSource;
  vaeSource?: ModelSource;
  taeSource?: ModelSource;
  upscalers: UpscalerSources;
  /** What the base is loaded with beside its model. */
  under: {
    controlnet: readonly ModelSource[];
    adapter: readonly ModelSource[];
    ipAdapter: readonly IPAdapterSource[];
    lora: readonly AdapterFile[];
  };
}

/** The options by which they are found; two calls that agree in them have the same. */
export const namingOptions = [
  ...(['model', 'variant', 'configs', 'unet', 'vae', 'refiner', 'device', 'dtype', 'quiet'] as const),
  ...(['lora', 'controlnet', 'adapter', 'ipAdapter', 'upscaleModel', 'hiresUpscaler'] as const),
  ...(['preview', 'tae', 'aestheticScore', 'negativeAestheticScore'] as const),
];
type Naming = Pick<SampleOptions, (typeof namingOptions)[number]> & { model: string };

/** Finds them, downloading what is on the hub. @throws UserError for one that is not there, or does not fit */
export async function locateSources(options: Naming, terminal: Terminal): Promise<Sources> {
  const { configs, variant, unet, quiet = false } = options;
  const warn = (line: string) => terminal.err(`warning: ${line}\n`);
  const device = openDevice(options.device, warn);
  const locate = { configs, variant, onProgress: downloadsOn(terminal, quiet) };
  const source = await locateWithUNet(options.model, unet, locate);
  checkScores(options, source.modelIndex.requires_aesthetics_score === true);
  const refinerSource = options.refiner ? await locateModel(options.refiner, locate) : undefined;
  const vaeSource = options.vae ? await locateVae(options.vae, locate) : undefined;
  const taeSource = options.tae ? await locateTae(options.tae, locate) : undefined;
  const coder = vaeFor(source, vaeSource);
  if (refinerSource && coder.latents_mean)
    throw new UserError(
      `${options.refiner} goes on from SDXL's latents, and those of ${options.model} have a mean and a spread of their own (latents_mean): leave --refiner out`,
    );
  for (const line of fitPreview(options, coder, taeSource)) warn(line);
  const controlnet: ModelSource[] = [];
  for (const { file } of (options.controlnet ?? []).map(controlnetOf))
    controlnet.push(await locateControlNet(file, locate));
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
  const under = { controlnet, adapter, ipAdapter, lora };
  return { device, dtype, source, refinerSource, vaeSource, taeSource, upscalers, under };
}

/** The full-size model does not fit a small machine in float32, and the tests' models are too small to gain. */
function chooseDtype(asked: FloatDType | 'auto', source: ModelSource, device: Device): FloatDType {
  if (asked !== 'auto') return asked;
  const [channels] = parseUNetConfig(source.config('unet')).block_out_channels;
  return device.name !== 'reference' && channels >= 256 ? 'bfloat16' : 'float32';
}
