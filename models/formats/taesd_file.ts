// The tiny autoencoder in single files: whole under diffusers' keys, or under TAESD's own as its author publishes it, an encoder and a
// decoder in two files, which are read as a pair. TAESD numbers a half's layers alone, the decoder's with the clamp before them as
// the first, which diffusers leaves out of the list.
import { existsSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { readJsonObject } from '../../io/json.ts';
import { renamed, type TensorFile } from '../../io/tensor_file.ts';
import { loneSource, type ModelSource } from '../checkpoint/checkpoint.ts';
import { sourceOf, type WeightSource } from '../checkpoint/weights.ts';
import { openWeightsFile, openWeightsFiles } from '../checkpoint/weights_file.ts';
import { taesdxlJson } from '../vae/autoencoder_tiny.ts';

type Half = 'encoder' | 'decoder';

/** What a file has of a tiny autoencoder, told by its keys; undefined for another file. */
export function tinyPart({ tensors }: TensorFile): 'whole' | Half | undefined {
  if (tensors.has('decoder.layers.0.weight')) return 'whole';
  if (tensors.has('0.weight') && tensors.has('1.conv.0.weight')) return 'encoder';
  return tensors.has('1.weight') && tensors.has('3.conv.0.weight') ? 'decoder' : undefined;
}

/** Opens a file that tinyPart() knows. @throws UserError where it is a half, and the other is not beside it */
export function openTinyFile(path: string, part: 'whole' | Half): ModelSource {
  const beside = join(dirname(path), 'config.json');
  const own = existsSync(beside) ? readJsonObject(beside) : {};
  const config = own._class_name === 'AutoencoderTiny' ? own : taesdxlJson();
  if (part !== 'whole') otherHalf(path, part); // told now, and not when weights are read
  const weights = (): WeightSource =>
    part === 'whole' ? sourceOf(path, [openWeightsFile(path)]) : paired(path, part);
  return loneSource(path, { has: (component) => component === 'vae', config: () => config, weights });
}

/** Where taesdxl_encoder.safetensors lies for taesdxl_decoder.safetensors, and the other way round. */
function otherHalf(path: string, part: Half): string {
  const missing = part === 'encoder' ? 'decoder' : 'encoder';
  const name = basename(path).replace(part, missing);
  const other = join(dirname(path), name);
  if (name === basename(path) || !existsSync(other))
    throw new UserError(
      `${path} holds only the ${part} of a tiny autoencoder: put its ${missing} beside it, named as taesdxl_encoder.safetensors and taesdxl_decoder.safetensors are, or give both in one, as madebyollin/taesdxl has them`,
    );
  return other;
}

/** Both halves under diffusers' keys. */
function paired(path: string, part: Half): WeightSource {
  const other = otherHalf(path, part);
  const [encoder, decoder] = openWeightsFiles(part === 'encoder' ? [path, other] : [other, path]);
  const inDiffusers = (half: Half, file: TensorFile, clamps: number): TensorFile =>
    renamed(
      file,
      new Map(
        [...file.tensors.keys()].map((name) => [
          `${half}.layers.${name.replace(/^\d+/, (layer) => String(Number(layer) - clamps))}`,
          name,
        ]),
      ),
    );
  return sourceOf(path, [inDiffusers('encoder', encoder, 0), inDiffusers('decoder', decoder, 1)]);
}
