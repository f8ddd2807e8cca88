// Finding an adapter by what the user names: its file, a folder that has one, or a hub id and perhaps a file in it. A repository has
// its adapter at its top, under diffusers' name or peft's, or it is the only file of weights there.
import { join, posix } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { hubPath, NothingWantedError } from '../../io/hub.ts';
import { locateAdapter } from '../lora/lora_file.ts';
import { download, type LocateOptions } from './locate.ts';

const mend =
  'a .safetensors or .gguf file, its folder, or a hub id, perhaps with a file such as ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors';

/** The adapter's file, downloaded if it has to be. @throws UserError where there is none, or several */
export async function locateLora(path: string, options: LocateOptions = {}): Promise<string> {
  const hub = hubPath(path);
  if (!hub) return locateAdapter(path);
  const { id, inner } = hub;
  let name: string | undefined;
  const adapterAndConfig = (all: readonly string[]): string[] => {
    name = inner ?? adapterAmong(all, id);
    if (!name || !all.includes(name)) return [];
    // peft tells alpha in it.
    const config = posix.join(posix.dirname(name), 'adapter_config.json');
    return all.includes(config) ? [name, config] : [name];
  };
  const folder = await download(id, adapterAndConfig, options).catch((error) => {
    if (!(error instanceof NothingWantedError)) throw error;
    throw new UserError(`${id} on the hub has no ${inner ?? 'LoRA'}; give ${mend}`);
  });
  return locateAdapter(join(folder, name ?? ''));
}

/** @throws UserError for several */
function adapterAmong(all: readonly string[], id: string): string | undefined {
  const usual = ['pytorch_lora_weights.safetensors', 'adapter_model.safetensors'].find((name) =>
    all.includes(name),
  );
  const files = all.filter((name) => /^[^/]+\.safetensors$/.test(name));
  if (!usual && files.length > 1)
    throw new UserError(
      `${id} has several files of weights: give one of them, ${files.map((name) => `${id}/${name}`).join(' or ')}`,
    );
  return usual ?? files[0];
}
