// ESRGAN's networks in one file, under any of three spellings: BasicSR's, in which Real-ESRGAN is published; ESRGAN's own of 2018; and
// the numbered layers of the trainer before that, in which most models of the community are. What the network is like is told by names
// and shapes, as no config comes with it.
import { existsSync, statSync } from 'node:fs';
import { UserError } from '../../io/errors.ts';
import { renamed, type TensorFile } from '../../io/tensor_file.ts';
import { matchParameters, sourceOf, type WeightSource } from '../checkpoint/weights.ts';
import { isWeightsFile, openWeightsFile, refusePickle } from '../checkpoint/weights_file.ts';
import { hubFile, type LocateOptions } from '../locate/locate.ts';
import { type RRDBNetConfig, rrdbnet } from './rrdbnet.ts';

/** A network that enlarges pictures: its file, looked at. */
export interface UpscalerSource {
  path: string;
  config: RRDBNetConfig;
  weights(): WeightSource;
}

const mend =
  'the .safetensors file of an ESRGAN or Real-ESRGAN, or a file on the hub such as Comfy-Org/Real-ESRGAN_repackaged/RealESRGAN_x4plus.safetensors';

/** The network at `path`, or in a file of a repository, downloaded if it has to be. @throws UserError where there is none */
export async function locateUpscaler(path: string, options: LocateOptions = {}): Promise<UpscalerSource> {
  const file = (await hubFile(path, options)) ?? path;
  refusePickle(file, `give ${mend}`);
  if (!existsSync(file) || statSync(file).isDirectory() || !isWeightsFile(file))
    throw new UserError(`no upscaler at ${path}; give ${mend}`);
  return openUpscalerFile(file);
}

/** @throws UserError for a file that holds another network */
export function openUpscalerFile(path: string): UpscalerSource {
  const open = (): TensorFile => {
    const file = openWeightsFile(path);
    const names = [...file.tensors.keys()];
    const layers = numberedLayers(names);
    return renamed(file, new Map(names.map((name) => [inBasicSR(name, layers), name])));
  };
  const file = open();
  file.close();
  const config = configOf(file);
  // Looked at now, and not when a model has been loaded before.
  const { problems } = matchParameters(rrdbnet(config), sourceOf(path, [file]));
  if (problems.length > 0)
    throw new UserError(
      `${path} is not an ESRGAN of the plain kind (RRDBNet): ${problems.join('; ')}; give ${mend}`,
    );
  return { path, config, weights: () => sourceOf(path, [open()]) };
}

/** The numbers of those layers that are convolutions behind the trunk: each doubling's, conv_hr's and conv_last's. */
const numberedLayers = (names: readonly string[]): number[] =>
  names
    .map((name) => Number(/^model\.(\d+)\.weight$/.exec(name)?.[1] ?? 0))
    .filter((layer) => layer > 1)
    .sort((a, b) => a - b);

/** A tensor's name in BasicSR's words. */
function inBasicSR(name: string, layers: readonly number[]): string {
  const [, layer, rest] = /^model\.(\d+)\.(weight|bias)$/.exec(name) ?? [];
  if (layer === '0') return `conv_first.${rest}`;
  const behind = layers.indexOf(Number(layer));
  if (behind >= 0) {
    const fromEnd = layers.length - 1 - behind;
    return `${['conv_last', 'conv_hr'][fromEnd] ?? `conv_up${behind + 1}`}.${rest}`;
  }
  return name
    .replace(/^params(_ema)?\./, '')
    .replace(/^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\./, 'body.$1.rdb$2.conv$3.')
    .replace(/^model\.1\.sub\.\d+\.(weight|bias)$/, 'conv_body.$1')
    .replace(/^RRDB_trunk\.(\d+)\.RDB(\d)\./, 'body.$1.rdb$2.')
    .replace(/^trunk_conv\./, 'conv_body.')
    .replace(/^upconv(\d)\./, 'conv_up$1.')
    .replace(/^HRconv\./, 'conv_hr.');
}

function configOf({ path, tensors }: TensorFile): RRDBNetConfig {
  const count = (name: (i: number) => string): number => {
    let i = 0;
    while (tensors.has(name(i))) i++;
    return i;
  };
  const block = tensors.get('body.0.rdb1.conv1.weight')?.shape ?? [];
  const channels = tensors.get('conv_first.weight')?.shape[1] ?? 0;
  const unshuffle = [1, 2, 4].find((side) => channels === 3 * side ** 2);
  if (block.length !== 4 || !unshuffle || tensors.get('conv_last.weight')?.shape[0] !== 3)
    throw new UserError(`${path} is not an ESRGAN for pictures in colour (RRDBNet); give ${mend}`);
  const [num_grow_ch, num_feat] = block;
  return {
    num_feat,
    num_block: count((i) => `body.${i}.rdb1.conv1.weight`),
    num_grow_ch,
    doublings: count((i) => `conv_up${i + 1}.weight`),
    unshuffle,
  };
}
