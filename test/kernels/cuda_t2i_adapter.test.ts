// Steps under a T2I-Adapter on the virtual GPU: a recording has the bits of the eager step before it, and goes when the adapter's part
// ends.
import { join } from 'node:path';
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { type ModelSource, openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { followedOf } from '../../models/control/t2i_adapter.ts';
import { openDenoiser } from '../../models/denoiser.ts';
import { loadPipeline } from '../../models/pipeline.ts';
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

/** What is predicted of one picture at one time in four calls, the last of which the adapter has no part in. */
function predicted(device: Device): Float32Array[] {
  const adapter = openComponent(writeT2IAdapter(at('sketch'), 'sketch'));
  const pipeline = loadPipeline(source, { device, dtype: 'float32', adapter: [adapter], only: ['unet'] });
  const embeds = (...shape: number[]) => ({ shape, data: numbers('embeds', shape) });
  const shape = [1, 4, 2, 2];
  const request = {
    ...{ prompt_embeds: embeds(1, 77, 80), pooled_prompt_embeds: embeds(1, 40), guidance_scale: 1 },
  };
  const denoiser = openDenoiser(pipeline, request, {
    ...{ timesteps: new Float32Array(4).fill(500), shape, ids: [[16, 16, 0, 0, 16, 16]], guided: false },
    told: { prompts: [request], at: [0, 0, 0, 0] },
    followed: followedOf(pipeline.adapter, { adapter_image: [picture(1, 16, 16)] }, [16, 16]),
    ...{ followedCalls: 3, controls: [], imagePrompts: [], calls: 4, caching: { interval: 1, branch: 0 } },
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
