// A file of weights in either format, safetensors or GGUF. ComfyUI's scaled 8-bit floats (`scaled_fp8`) are made whole here: a weight comes
// times the number beside it, and what else stands there is of how a layer rounds its input, which ours does not do.
import { decodeFloats, isFloat } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { isGguf, openGguf } from '../../io/gguf.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';

/** Whether a path is named as such a file. */
export const isWeightsFile = (path: string): boolean => /\.(safetensors|gguf)$/i.test(path);

/** @throws UserError for a file that is named as PyTorch's are, with a `mend` */
export function refusePickle(
  path: string,
  mend = `give ${path.replace(/\.\w+$/, '.safetensors')}, which is often published beside it`,
): void {
  if (/\.(bin|ckpt|pt|pth)$/i.test(path))
    throw new UserError(`${path} is a pickle, which can run code when read and is refused; ${mend}`);
}

/** @throws UserError saying what is wrong with the file */
export function openWeightsFile(path: string): TensorFile {
  const gguf = /\.gguf$/i.test(path) || isGguf(path);
  if (!gguf) refusePickle(path);
  const file = gguf ? openGguf(path) : openSafetensors(path);
  try {
    return scaled(file);
  } catch (error) {
    file.close();
    throw error;
  }
}

/** Several, none of which stays open where one cannot be opened. @throws UserError */
export function openWeightsFiles(paths: readonly string[]): TensorFile[] {
  const open: TensorFile[] = [];
  try {
    for (const path of paths) open.push(openWeightsFile(path));
    return open;
  } catch (error) {
    for (const file of open) file.close();
    throw error;
  }
}

/** As it was named until 2025, and since. */
const scaleName = /^(.+)\.(scale_weight|weight_scale)$/;
const beside = /(^|\.)(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|scaled_fp8)$/;

/** The file with each weight times its scale, where it has such. @throws UserError for scales of another kind */
function scaled(file: TensorFile): TensorFile {
  const scales = new Map<string, string>();
  for (const name of file.tensors.keys()) {
    const [, layer] = scaleName.exec(name) ?? [];
    if (!layer) continue;
    checkScale(file, `${layer}.weight`, name);
    scales.set(`${layer}.weight`, name);
  }
  if (scales.size === 0) return file;
  const times = (name: string, scale: string): Float32Array => {
    const floats = (each: string) =>
      decodeFloats(file.read(each), (file.tensors.get(each) as TensorInfo).dtype);
    const [factor] = floats(scale);
    return floats(name).map((value) => value * factor);
  };
  const readInto = (name: string, target: Uint8Array): void => {
    const scale = scales.get(name);
    if (scale) target.set(new Uint8Array(times(name, scale).buffer));
    else file.readInto(name, target);
  };
  const tensors = new Map<string, TensorInfo>();
  for (const [name, info] of file.tensors)
    if (!beside.test(name)) tensors.set(name, scales.has(name) ? { ...info, dtype: 'float32' } : info);
  return {
    ...file,
    tensors,
    readInto,
    inFile: (name) => (scales.has(name) ? undefined : file.inFile?.(name)),
    read(name, room) {
      const scale = scales.get(name);
      if (!scale) return file.read(name, room);
      const whole = new Uint8Array(times(name, scale).buffer);
      const target = room?.(whole.byteLength);
      target?.set(whole);
      return target ?? whole;
    },
  };
}

function checkScale({ path, tensors }: TensorFile, weight: string, scale: string): void {
  const [of, by] = [tensors.get(weight), tensors.get(scale) as TensorInfo];
  if (!of)
    throw new UserError(
      `tensor "${scale}" of ${path} scales no weight, as there is no "${weight}": take the model in another type`,
    );
  const one = by.shape.every((size) => size === 1) && isFloat(by.dtype);
  if (one && of.storedAs.startsWith('F8_')) return;
  throw new UserError(
    `tensor "${weight}" of ${path} is ${of.storedAs} scaled by "${scale}", ${by.storedAs} [${by.shape}], and only 8-bit floats with one scale each are read: take the model in another type`,
  );
}
