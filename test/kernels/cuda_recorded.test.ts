// Denoising whose steps differ, on the virtual GPU: each kind of step is recorded as a graph of its own and replayed, to the bits of
// eager steps and, within float32's sums, the CPU's numbers.
import { type Test, test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { preprocess, preprocessControl, preprocessMask } from '../../io/image.ts';
import { denoise } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { disc, picture } from '../support/controlnet_golden.ts';
import { maxDifference } from '../support/golden.ts';
import { type Kind, pipelineOf } from '../support/golden_calls.ts';
import { relativeError } from '../support/op_cases.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

interface Recorded {
  /** Graphs that were recorded, and how often one was replayed. */
  recorded: number;
  replays: number;
}

function latentsOf(device: Device, kind: Kind, asked: Asked): Float32Array {
  const pipeline = pipelineOf(kind, device);
  let latents = new Float32Array();
  const small = { prompt: 'a red fox in the snow', negative_prompt: 'rain', width: 16, height: 16 };
  for (const progress of denoise(pipeline, { ...small, ...asked, generators: [new TorchGenerator(3)] }))
    latents = Float32Array.from(progress.latents.data);
  pipeline.release();
  return latents;
}

function onGpu(records: boolean, kind: Kind, asked: Asked) {
  const failing = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 26, races: false }));
  if (!records) failing.fail('cuStreamBeginCapture', 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
  const device = cudaDevice(failing.api);
  const latents = latentsOf(device, kind, asked);
  const recorded = failing.made('cuStreamBeginCapture');
  return { latents, recorded, replays: failing.made('cuGraphLaunch'), left: device.memory.storages };
}

function records(t: Test, kind: Kind, asked: Asked, want: Recorded): void {
  const { latents, ...made } = onGpu(true, kind, asked);
  t.same(made, { ...want, left: 0 });
  const eager = onGpu(false, kind, asked);
  t.same([eager.replays, eager.left], [0, 0]);
  t.equal(maxDifference(latents, eager.latents), 0, 'the bits of eager steps');
  const error = relativeError(latents, latentsOf(openDevice('cpu'), kind, asked));
  t.ok(error < 1e-5, `from the CPU's: ${error}`);
  t.end();
}

test("DeepCache's whole and shallow steps, a ControlNet in the first of seven", (t) =>
  records(
    t,
    'controlled',
    {
      ...{ num_inference_steps: 7, cache_interval: 2, cache_branch_id: 4 },
      ...{ control_image: [preprocessControl(picture(1, 16, 16))], control_guidance_end: 0.15 },
    },
    { recorded: 2, replays: 2 },
  ));

test('perturbed-attention guidance at a scale that changes from step to step', (t) =>
  records(
    t,
    'text2img',
    {
      ...{ num_inference_steps: 4, guidance_scale: 5, pag_scale: 3, pag_adaptive_scale: 0.004 },
      pag_applied_layers: ['mid', 'down_blocks.2'],
    },
    { recorded: 1, replays: 2 },
  ));

test('an inpainting model, which sees five channels beside the latents', (t) =>
  records(
    t,
    'inpainting',
    {
      ...{ num_inference_steps: 4, guidance_scale: 5, strength: 1 },
      ...{ image: preprocess(picture(4, 16, 16)), mask: preprocessMask(disc(), 16, 16) },
    },
    { recorded: 1, replays: 2 },
  ));

test('a prompt that changes', (t) =>
  records(
    t,
    'text2img',
    { num_inference_steps: 5, prompt: '[a red fox:a hare:1]', emphasis: 'original', guidance_scale: 1 },
    { recorded: 2, replays: 1 },
  ));

test('guidance that is projected and ends, and with it the rows that it takes', (t) =>
  records(
    t,
    'text2img',
    {
      ...{ num_inference_steps: 6, guidance_scale: 5, guidance_stop: 0.5 },
      adaptive_projected_guidance: { momentum: -0.5, rescale: 0.3, eta: 0.5 },
    },
    { recorded: 2, replays: 2 },
  ));

test('a pattern without seams, under FreeU', (t) =>
  records(
    t,
    'text2img',
    {
      ...{ num_inference_steps: 3, guidance_scale: 5, seamless: 'xy' },
      freeu: { s1: 0.9, s2: 0.2, b1: 1.3, b2: 1.4 },
    },
    { recorded: 1, replays: 1 },
  ));

test('a second pass by a sampler of its own, in the same pipeline', (t) => {
  const passes = (device: Device): Float32Array => {
    const pipeline = pipelineOf('text2img', device);
    const small = { prompt: 'a red fox', width: 16, height: 16, guidance_scale: 5 };
    const drawn = (asked: Partial<Asked>) => {
      let latents = { shape: [1, 4, 2, 2], data: new Float32Array() };
      for (const progress of denoise(pipeline, { ...small, ...asked, generators: [new TorchGenerator(3)] }))
        latents = { shape: [...progress.latents.shape], data: Float32Array.from(progress.latents.data) };
      return latents;
    };
    const scheduler = { name: 'euler_karras' };
    const image = drawn({ num_inference_steps: 3, scheduler });
    const second = { image, num_inference_steps: 3, strength: 0.9, base_steps: 3, base_scheduler: scheduler };
    const { data } = drawn({ ...second, scheduler: { name: 'heun' } });
    pipeline.release();
    return data;
  };
  const failing = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 26, races: false }));
  const recorded = passes(cudaDevice(failing.api));
  t.equal(failing.made('cuStreamBeginCapture'), 2, 'a graph for each');
  const error = relativeError(recorded, passes(openDevice('cpu')));
  t.ok(error < 1e-5, `from the CPU's: ${error}`);
  t.end();
});
