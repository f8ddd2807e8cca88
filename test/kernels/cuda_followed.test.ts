// Steps under a T2I-Adapter and a ControlNet-LLLite on the virtual GPU: a recording has the bits of the eager step before it, and goes when
// their part ends.
import { join } from 'node:path';
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { preprocessControl } from '../../io/image.ts';
import { type ModelSource, openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { controlsOf } from '../../models/control/control_request.ts';
import { LLLITE, newLLLiteConfig } from '../../models/control/lllite.ts';
import { followedOf } from '../../models/control/t2i_adapter.ts';
import { openDenoiser } from '../../models/denoiser.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { numbers, picture, weight } from '../support/controlnet_golden.ts';
import { goldenFolder, maxDifference } from '../support/golden.ts';
import { at } from '../support/golden_calls.ts';
import { relativeError } from '../support/op_cases.ts';
import { writeT2IAdapter } from '../support/t2i_adapter_golden.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const tiny = openModel(join(goldenFolder, 'tiny-sdxl'));
/** With a UNet of half the layers, which the virtual GPU is done with in half the time. */
const source: ModelSource = {
  ...tiny,
  config: (name) => ({
    ...tiny.config(name),
    ...(name === 'unet' && { layers_per_block: 1, transformer_layers_per_block: 1 }),
  }),
  load(name, module, device, dtype) {
    for (const [key, p] of namedParameters(module))
      p.tensor = unscoped(() => tensor(weight(name, key, p.memoryShape), p.memoryShape, { device, dtype }));
  },
};

/** A ControlNet-LLLite for that UNet, as kohya's script would make it. */
function lite(): ModelSource {
  const unetConfig = parseUNetConfig(source.config('unet'));
  const made = { unet: unet(unetConfig), unetConfig, ratio: 8 };
  const layers = newLLLiteConfig(made, { network_dim: 8, cond_emb_dim: 4 });
  return { ...source, path: 'lite', config: () => ({ _class_name: LLLITE, layers }) };
}

/** What is predicted of one picture at one time in four calls, in the last of which they have no part. */
function predicted(device: Device): Float32Array[] {
  const adapter = openComponent(writeT2IAdapter(at('sketch'), 'sketch'));
  const beside = { adapter: [adapter], controlnet: [lite()] };
  const pipeline = loadPipeline(source, { device, dtype: 'float32', ...beside, only: ['unet'] });
  const embeds = (...shape: number[]) => ({ shape, data: numbers('embeds', shape) });
  const [shape, size] = [[1, 4, 4, 4], [32, 32] as const];
  const request = {
    ...{ prompt_embeds: embeds(1, 77, 80), pooled_prompt_embeds: embeds(1, 40), guidance_scale: 1 },
  };
  const asked = { control_image: [preprocessControl(picture(2, 32, 32))], control_guidance_end: 0.75 };
  const denoiser = openDenoiser(pipeline, request, {
    ...{ timesteps: new Float32Array(4).fill(500), shape, ids: [[32, 32, 0, 0, 32, 32]] },
    ...{ guided: false, texts: 1 },
    told: { prompts: [request], at: [0, 0, 0, 0] },
    followed: followedOf(pipeline.adapter, { adapter_image: [picture(1, 32, 32)] }, size),
    controls: controlsOf(pipeline.controlnet, asked, size),
    ...{ followedCalls: 3, imagePrompts: [], calls: 4, caching: { interval: 1, branch: 0 } },
  });
  const all = scope(() => {
    const x = tensor(numbers('latents', shape), shape, { device });
    return [0, 1, 2, 3].map((i) => denoiser.predict(x, i).floats());
  });
  denoiser.release();
  pipeline.release();
  return all;
}

test('recorded steps', { timeout: 600_000 }, (t) => {
  const gpu = failingGpu(openVirtualGpu({ races: false, arenaBytes: 2 ** 26 }));
  const device = cudaDevice(gpu.api);
  const [eager, recorded, replayed, without] = predicted(device);
  t.same([gpu.made('cuStreamBeginCapture'), gpu.made('cuGraphLaunch')], [1, 1], 'the third is replayed');
  t.equal(maxDifference(recorded, eager), 0);
  t.equal(maxDifference(replayed, eager), 0);
  t.ok(maxDifference(without, eager) > 0.01, 'the fourth goes without');
  t.equal(device.memory.storages, 0);
  const cpu = predicted(openDevice('cpu'));
  for (const [got, want] of [
    [eager, cpu[0]],
    [without, cpu[3]],
  ])
    t.ok(relativeError(got, want) < 1e-5, "the CPU's");
  t.end();
});
