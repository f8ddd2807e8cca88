// A UNet alone in one file, as ComfyUI's "diffusion models" are, in GGUF above all: under the original's keys or diffusers'. What it is, if
// no config.json lies beside it, is told by the model whose other parts go with it, else by SDXL as it was published.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { readJsonObject } from '../../io/json.ts';
import type { TensorInfo } from '../../io/tensor_file.ts';
import { type Json, loneSource, type ModelSource } from '../checkpoint/checkpoint.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import { parseUNetConfig } from '../unet/unet.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';
import { classOf } from './components.ts';
import { componentConfigs } from './diffusers_config.ts';
import { presets } from './presets.ts';
import { loneUNet } from './sgm_keys.ts';
import { translated } from './singlefile.ts';
import { toldIn } from './unet_told.ts';

/** Opens a UNet's file, or the UNet in a whole model's; `model` lends its config. @throws UserError for another file */
export function openUNetFile(path: string, model?: ModelSource): ModelSource {
  const file = openWeightsFile(path);
  file.close();
  const found = loneUNet(file.tensors);
  if (!found) {
    const told = file.metadata['general.architecture'];
    const kind = told && told !== 'sdxl' ? `, but a model of the kind "${told}"` : '';
    throw new UserError(
      `${path} is not SDXL's UNet in one file${kind}; give such a file, or a UNet's folder`,
    );
  }
  const { prefix, original } = found;
  const convIn = file.tensors.get(
    `${prefix}${original ? 'input_blocks.0.0' : 'conv_in'}.weight`,
  ) as TensorInfo;
  const [width, channels] = convIn.shape;
  const lent = configOf(path, width, model);
  const config = { ...lent, in_channels: channels, ...toldIn(file.tensors, found, lent) };
  const layout = parseUNetConfig(config);
  const origin = (key: string) => ({ name: prefix + (original ? unetKeyInSgm(key, layout) : key) });
  const weights = () => translated(openWeightsFile(path), origin);
  return loneSource(path, { has: (component) => component === 'unet', config: () => config, weights });
}

function configOf(path: string, width: number, model: ModelSource | undefined): Json {
  const beside = join(dirname(path), 'config.json');
  const own = existsSync(beside) ? readJsonObject(beside) : {};
  if (classOf(own) === 'UNet2DConditionModel') return own;
  if (model) return model.config('unet');
  const named = Object.values(presets).find(({ unet }) => unet.block_out_channels[0] === width);
  return componentConfigs(named ?? presets['sdxl-base']).unet;
}
