// The model of golden/lcm.jsonl's last cases: tiny-sdxl with a layer that its UNet is told the guidance by, whose weights are a formula.
import { mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeNumbers } from '../../io/dtype.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { numbers } from './controlnet_golden.ts';
import { goldenFolder } from './golden.ts';

const model = join(goldenFolder, 'tiny-sdxl');

/** Writes the model's folder. */
export function writeTold(path: string): string {
  mkdirSync(join(path, 'unet'), { recursive: true });
  for (const name of readdirSync(model))
    if (name !== 'unet') symlinkSync(join(model, name), join(path, name));
  const config = JSON.parse(readFileSync(join(model, 'unet', 'config.json'), 'utf8'));
  const [shape, key] = [[16, 8], 'time_embedding.cond_proj.weight'];
  writeFileSync(
    join(path, 'unet', 'config.json'),
    JSON.stringify({ ...config, time_cond_proj_dim: shape[1] }),
  );
  const file = join('unet', 'diffusion_pytorch_model.safetensors');
  const own = openSafetensors(join(model, file));
  const entries = [...own.tensors.values()].map(({ name, dtype, shape }): TensorEntry => {
    return { name, dtype, shape, bytes: own.read(name) };
  });
  const layer = encodeNumbers(
    numbers(key, shape).map((x) => x / 4),
    'float16',
  );
  writeSafetensors(join(path, file), [...entries, { name: key, dtype: 'float16', shape, bytes: layer }]);
  own.close();
  return path;
}
