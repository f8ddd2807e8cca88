// A model with another UNet than its own: one that is published alone, as a file (ComfyUI's, in GGUF above all), as diffusers' folder of one
// component, or on the hub, perhaps as one file of a repository.
import { existsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { hubPath } from '../../io/hub.ts';
import { type ModelSource, openComponent } from '../checkpoint/checkpoint.ts';
import { openUNetFile } from '../formats/unet_file.ts';
import { download, hubFile, type LocateOptions, locateModel, ofClass, partFiles } from './locate.ts';

const mend =
  "a UNet's .gguf or .safetensors file, its folder, or a hub id, perhaps with a file such as ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors";

/** The model at `path`, of which its own UNet is not downloaded where that at `unet` stands in its place. @throws UserError for either */
export async function locateWithUNet(
  path: string,
  unet: string | undefined,
  options: LocateOptions = {},
): Promise<ModelSource> {
  const own = await locateModel(path, { ...options, without: unet && 'unet' });
  return unet ? withUNet(own, unet, options) : own;
}

/** `model` with the UNet at `path`, a file, folder or hub id, in its own one's place. @throws UserError where there is none */
export async function withUNet(
  model: ModelSource,
  path: string,
  options: LocateOptions = {},
): Promise<ModelSource> {
  const unet = await locateUNet(path, model, options);
  const [own, other] = [model, unet].map(
    (each) => each.has('unet') && each.config('unet').cross_attention_dim,
  );
  if (own !== false && own !== other)
    throw new UserError(
      `the UNet of ${path} takes ${other} features of text and that of ${model.path} ${own}: take one that was made for this model`,
    );
  const owner = (component: string): ModelSource => (component === 'unet' ? unet : model);
  return {
    ...model,
    has: (component) => owner(component).has(component),
    config: (component) => owner(component).config(component),
    weights: (component) => owner(component).weights(component),
    load: (component, module, device, dtype) => owner(component).load(component, module, device, dtype),
  };
}

/** The UNet alone at `path`, a model's too; `model` lends a file without a config its own. @throws UserError where there is none */
export async function locateUNet(
  path: string,
  model: ModelSource | undefined,
  options: LocateOptions,
): Promise<ModelSource> {
  const { variant } = options;
  const hub = hubPath(path);
  const inner = await hubFile(path, options);
  if (inner !== undefined) return openUNetFile(inner, model);
  if (!existsSync(path) && (!hub || hub.inner)) throw new UserError(`no UNet at ${path}; give ${mend}`);
  if (!hub && !statSync(path).isDirectory()) return openUNetFile(path, model);
  const folder = hub ? await download(hub.id, partFiles('UNet', 'unet', variant), options) : path;
  const own = [folder, join(folder, 'unet')].find((each) => existsSync(join(each, 'config.json')));
  if (!own) throw new UserError(`${path} has no config.json of a UNet; give ${mend}`);
  return ofClass(openComponent(own, { variant }), ['UNet2DConditionModel'], "SDXL's UNet", mend);
}
