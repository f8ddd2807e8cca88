// What of models is recorded and replayed, on the virtual GPU. Of denoising whose steps differ each kind has a graph of its own, to the bits
// of eager steps and, within float32's sums, the CPU's numbers; a text encoder has one for all prompts.
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unscoped } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { preprocess, preprocessControl, preprocessMask } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoise, loadPipeline, type Progress } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { parseTextConfig, placeTokens, textEncoder } from '../../models/text/clip.ts';
import { tokensOf } from '../../models/text/conditioning.ts';
import { loadTokenizer } from '../../models/text/tokenizer.ts';
import { disc, picture } from '../support/controlnet_golden.ts';
import { goldenFolder, maxDifference } from '../support/golden.ts';
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

/**
 * What a denoising loop on a GPU without numbers does, in order; `leaveAt` is the step after which the caller leaves, `look` at what it
 * is told of.
 */
function denoising(scheduler: string, leaveAt = Number.POSITIVE_INFINITY, look = (_: Progress) => {}) {
  const done: string[] = [];
  const api = standInApi(anyHopper);
  const queued = () => {
    if (done.at(-1) !== 'queued') done.push('queued');
  };
  const device = cudaDevice({
    ...api,
    cuLaunchKernel(...args) {
      queued();
      api.cuLaunchKernel(...args);
    },
    cuGraphLaunch(...args) {
      queued();
      api.cuGraphLaunch(...args);
    },
    cuEventSynchronize(event) {
      done.push('waited');
      api.cuEventSynchronize(event);
    },
  });
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'bfloat16' });
  const loaded = device.memory.storages;
  done.length = 0;
  for (const progress of denoise(pipeline, {
    ...{ prompt: ['a red fox'], width: 32, height: 32, num_inference_steps: 4, guidance_scale: 5 },
    ...{ generators: [new TorchGenerator(1)], scheduler: { name: scheduler } },
  })) {
    done.push(`told of ${progress.step}`);
    look(progress);
    if (progress.step === leaveAt) break;
  }
  return { done: done.join(', '), held: device.memory.storages - loaded };
}

test('a GPU is at the next step of a picture while the caller is told of one', (t) => {
  t.same(denoising('euler'), {
    done: 'queued, waited, told of 1, queued, waited, told of 2, queued, waited, told of 3, waited, told of 4',
    held: 0,
  });
  t.same(denoising('unipc', 2), { done: 'queued, waited, told of 1, queued, waited, told of 2', held: 0 });
  const all: Progress[] = [];
  const look = (progress: Progress) => {
    all.push(progress);
    t.same(progress.latents.shape, progress.predOriginalSample().shape, 'both are there still');
  };
  for (const scheduler of ['heun', 'dpm++2s', 'plms', 'lms', 'dpm2_a'])
    for (const leaveAt of [3, 4, 5])
      t.equal(denoising(scheduler, leaveAt, look).held, 0, `${scheduler}, left at ${leaveAt}`);
  const says = {
    name: 'UserError',
    message: /^step 1 is past: read what it tells of before the loop goes on/,
  };
  t.throws(() => all[0].latents, says);
  t.throws(() => all[0].predOriginalSample(), says);
  t.end();
});

test('a text encoder is recorded, as where prompts end comes with their tokens', (t) => {
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const prompts = ['a red fox', '', 'a castle on a hill in the snow', 'fog'];
  /** The pooled vector of each prompt, by one step. */
  const pooled = (device: Device) => {
    const encoder = textEncoder(parseTextConfig(source.config('text_encoder_2')));
    source.load('text_encoder_2', encoder, device, 'float32');
    const tokenizer = loadTokenizer(source.folder('tokenizer_2'));
    const rows = prompts.map((prompt) => tokensOf({ tokenizer, encoder }, [prompt]));
    const [{ ids }] = rows;
    const tokens = unscoped(() => placeTokens(encoder, ids.values, ids.shape[1], device));
    const step = device.step(() =>
      noGrad(() => encoder(tokens, { layer: -2, pooled: true }).pooled as Tensor),
    );
    const found = rows.map((row) => {
      tokens.ids.set(row.ids.values);
      tokens.ends.set(row.ends.values);
      return step.run((y) => y.floats());
    });
    step.release();
    return found;
  };
  const failing = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 25 }));
  const device = cudaDevice(failing.api);
  const [got, want] = [pooled(device), pooled(openDevice('reference'))];
  t.equal(failing.made('cuGraphLaunch'), 2, 'the last two are replays');
  for (const [i, prompt] of prompts.entries()) {
    const apart = Math.max(...want[i].map((x, j) => Math.abs(x - got[i][j])));
    t.ok(apart < 1e-5, `"${prompt}": ${apart}`);
  }
  t.ok(Math.max(...want[0].map((x, j) => Math.abs(x - want[3][j]))) > 1e-2, 'prompts differ');
  t.end();
});
