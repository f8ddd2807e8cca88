// UNets that are told the guidance they stand for (latent consistency models): whole calls against diffusers' pipelines (golden/lcm.py),
// and files that tell by their tensors that a UNet is one.
import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { openUNetFile } from '../../models/formats/unet_file.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { parseUNetConfig } from '../../models/unet/unet.ts';
import { sdxl } from '../support/command_line.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { writeTold } from '../support/told_golden.ts';

interface Called {
  call: { seed: number; scheduler: string; num_inference_steps: number; guidance_scale: number };
  atol: number;
  /** Every fifth number of the latents, float32 in base64. */
  values: string;
}
const calls = goldenLines<Called | object>('lcm').filter((each): each is Called => 'call' in each);

const device = openDevice('auto');
const model = join(goldenFolder, 'tiny-sdxl');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-told-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const told = writeTold(join(folder, 'told'));

test('a UNet that is told the guidance draws as in diffusers, without a second pass', async (t) => {
  const before = device.memory.storages;
  const pipeline = loadPipeline(openModel(told), { device, dtype: 'float32' });
  t.equal(calls.length, 2);
  for (const { call, atol, values } of calls) {
    const { seed, scheduler, ...settings } = call;
    const { latents } = await denoiseToEnd(pipeline, {
      ...{ prompt: 'a red fox in the snow', negative_prompt: 'rain', width: 64, height: 64, ...settings },
      scheduler: { name: scheduler },
      generators: [new TorchGenerator(seed)],
    });
    const some = latents.data.filter((_, i) => i % 5 === 0);
    const want = decodeFloats(Buffer.from(values, 'base64'), 'float32');
    allClose(t, JSON.stringify(call), some, want, { atol, rtol: 0 });
  }
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
  const config = openModel(told).config('unet');
  const alone = join(told, 'unet', 'alone.safetensors');
  for (const [path, from, flags] of [
    [alone, join(told, 'unet', 'diffusion_pytorch_model.safetensors'), undefined],
    [join(folder, 'one.safetensors'), told, ['--format', 'single-file']],
  ] as const) {
    if (flags) t.match(await sdxl('export', from, path, ...flags), { status: 0 });
    else copyFileSync(from, path);
    const file = flags
      ? openSingleFile(path, { configs: openModel(model) })
      : openUNetFile(path, openModel(model));
    t.equal(file.config('unet').time_cond_proj_dim, 8, `${path} tells by its tensors`);
  }
  for (const time_cond_proj_dim of ['256', 7, 2])
    t.throws(
      () => parseUNetConfig({ ...config, time_cond_proj_dim }),
      /"time_cond_proj_dim" is .*, not an even number above 2/,
    );
});
