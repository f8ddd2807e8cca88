// A GPU that runs out of memory anywhere in a request, under models that are kept as a server keeps them: it is told in one sentence,
// nothing of the request is held, and the next one is drawn. On a GPU that counts memory alone; single steps: cuda_faults.test.ts.
import { join } from 'node:path';
import { test } from 'tap';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice } from '../../engine/device.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { decode, denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { goldenFolder } from '../support/golden.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';

/** Allocations from one that is refused to the next; the phases of a request take 20 or more each. */
const STRIDE = 19;

test('at each allocation in turn', async (t) => {
  const gpu = failingGpu(standInApi(anyHopper));
  const device = cudaDevice(gpu.api);
  const { memory } = device;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'bfloat16' });
  const draw = async () => {
    memory.trim();
    const asked = { prompt: 'a red fox', width: 64, height: 64, num_inference_steps: 4, guidance_scale: 5 };
    const request = { ...asked, generators: [new TorchGenerator(3)], last: false };
    decode(pipeline, (await denoiseToEnd(pipeline, request)).latents);
  };
  await draw();
  const kept = memory.storages;
  const before = gpu.made('cuMemAllocAsync');
  await draw();
  const most = gpu.made('cuMemAllocAsync') - before;
  t.ok(most > 8 * STRIDE, `${most} allocations`);
  for (let at = 1; at <= most; at += STRIDE) {
    gpu.fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { at, always: true });
    const sentence =
      /^out of memory: \S+ MiB wanted while these hold it: unet .*; .* are free; use a smaller/;
    await t.rejects(draw(), { name: 'MemoryError', message: sentence }, `allocation ${at}`);
    t.ok(gpu.failed);
    gpu.heal();
    t.equal(memory.storages, kept, `allocation ${at}: what is held`);
    await t.resolves(draw(), `after allocation ${at}`);
  }
  t.equal(gpu.made('cuGraphExecDestroy'), gpu.made('cuGraphInstantiate'), 'recorded steps');
  pipeline.release();
  memory.trim();
  t.same([memory.storages, memory.live, memory.held], [0, 0, 0]);
});
