// Whole models at work on any device, for comparing one with another: the tiny golden pipeline (text encoders, UNet under guidance,
// VAE, four steps), one step of training, and a UNet wide enough for Hopper's kernels. Float32 agrees within its sums' order. In the
// half types devices round every activation in their own places, so what is asked is that one is as near to the float32 result as the
// other.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, noGrad, requireGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter, unload } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { mse } from '../../engine/ops/loss.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { empty, sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { preprocessControl } from '../../io/image.ts';
import { openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoise, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { parseUNetConfig, type UNetConfig, unet } from '../../models/unet/unet.ts';
import { type Autoencoder, autoencoder } from '../../models/vae/autoencoder.ts';
import { decodeLatents } from '../../models/vae/latents.ts';
import { controlled } from '../../train/controls/controlnet.ts';
import { addNoise, diffusionLoss, noisedInputs, objectiveOf } from '../../train/objective/objective.ts';
import { adamw } from '../../train/optimizers/adamw.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { ema } from '../../train/optimizers/ema.ts';
import { optimize } from '../../train/optimizers/rule.ts';
import { openPasses, place } from '../../train/passes/pass.ts';
import { fill } from '../../train/run/fields.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { fields } from '../../train/run/run_fields.ts';
import { picture, writeControlNet, writeControlNetUnion } from '../support/controlnet_golden.ts';
import { goldenFolder } from '../support/golden.ts';
import { relativeError } from '../support/op_cases.ts';
import { tinyConfig, writeTiny } from '../support/tiny_autoencoder.ts';

const source = openModel(join(goldenFolder, 'tiny-sdxl'));

/** Root mean square errors relative to the whole: float32's own, and how much farther than the CPU a half type may be. */
const FLOAT32 = 1e-5;
const FARTHER = 2; // one bit less
/** The error of a single number, a loss or a norm, is chance: small by luck on one device. A unit of bfloat16. */
const ONE_NUMBER = 2 ** -8;

export type Results = Record<string, Float32Array>;
export type Work = (device: Device, dtype: FloatDType) => Results;

/** What a device's error is, and what it may be. */
export interface ModelError {
  name: string;
  error: number;
  bound: number;
}

/** The errors of what `work` gives on `device` against the `cpu`. Live tensors must return to their count. */
export function modelErrors(device: Device, cpu: Device, work: Work, dtype: FloatDType): ModelError[] {
  const run = (on: Device, type: FloatDType): Results => {
    const before = on.memory.storages;
    const results = work(on, type);
    if (on.memory.storages !== before)
      throw new Error(`live tensors on ${on.name} in ${type}: ${before} → ${on.memory.storages}`);
    return results;
  };
  const want = run(cpu, 'float32');
  const got = run(device, dtype);
  const own = dtype === 'float32' ? undefined : run(cpu, dtype);
  return Object.keys(got).map((name) => ({
    name,
    error: relativeError(got[name], want[name]),
    bound: own
      ? Math.max(FARTHER * relativeError(own[name], want[name]), want[name].length === 1 ? ONE_NUMBER : 0)
      : FLOAT32,
  }));
}

/** Latents after four guided steps, of which a GPU replays the last two, and the decoded picture; a preview after each step. */
export function pipelineSteps(device: Device, dtype: FloatDType): Results {
  const pipeline = loadPipeline(source, { device, dtype });
  const tae = tinyAutoencoder(device, dtype);
  const loop = denoise(pipeline, {
    prompt: ['a red fox in the snow'],
    negative_prompt: ['blurry'],
    ...{ height: 32, width: 32, num_inference_steps: 4, guidance_scale: 5 },
    generators: [new TorchGenerator(3)],
  });
  const results: Results = {};
  let turn = loop.next();
  for (; !turn.done; turn = loop.next()) {
    const { step, predOriginalSample } = turn.value;
    results[`preview ${step}`] = decodeLatents(tae, predOriginalSample()).data;
  }
  const { latents } = turn.value;
  const picture = decodeLatents(pipeline.vae, latents).data;
  unload(tae.module);
  pipeline.release();
  return { ...results, latents: latents.data, picture };
}

function tinyAutoencoder(device: Device, dtype: FloatDType): Autoencoder {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-tiny-'));
  const tae = autoencoder(tinyConfig);
  openComponent(writeTiny(folder)).load('vae', tae.module, device, dtype);
  rmSync(folder, { recursive: true });
  return tae;
}

/** Latents of five guided steps, of which a ControlNet has a part in the middle three: a GPU replays the last of them. */
export function controlledSteps(device: Device, dtype: FloatDType): Results {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-controlled-'));
  const controlnet = [openComponent(writeControlNet(folder, 'small'))];
  const pipeline = loadPipeline(source, { device, dtype, controlnet });
  rmSync(folder, { recursive: true });
  const loop = denoise(pipeline, {
    prompt: ['a red fox in the snow'],
    ...{ height: 32, width: 32, num_inference_steps: 5, guidance_scale: 5 },
    control_image: [preprocessControl(picture(1, 32, 32))],
    ...{ controlnet_conditioning_scale: 0.8, control_guidance_start: 0.2, control_guidance_end: 0.8 },
    generators: [new TorchGenerator(3)],
  });
  const results: Results = {};
  for (const { step, latents } of loop) results[`step ${step}`] = latents.data;
  pipeline.release();
  return results;
}

/** Latents of two guided steps under a union ControlNet that sees two pictures. */
export function unitedSteps(device: Device, dtype: FloatDType): Results {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-united-'));
  const net = openComponent(writeControlNetUnion(folder, 'union'));
  const pipeline = loadPipeline(source, { device, dtype, controlnet: [net, net] });
  rmSync(folder, { recursive: true });
  const loop = denoise(pipeline, {
    prompt: ['a red fox in the snow'],
    ...{ height: 32, width: 32, num_inference_steps: 2, guidance_scale: 5 },
    control_image: [1, 2].map((seed) => preprocessControl(picture(seed, 32, 32))),
    ...{ control_mode: [3, 0], controlnet_conditioning_scale: [0.8, 0.5] },
    generators: [new TorchGenerator(3)],
  });
  const results: Results = {};
  for (const { step, latents } of loop) results[`step ${step}`] = latents.data;
  pipeline.release();
  return results;
}

/** The gradients of a small ControlNet beside the tiny UNet, which has none, for two rows with a picture each. */
export function controlledGradients(device: Device, dtype: FloatDType): Results {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-controlled-'));
  const controlnet = [openComponent(writeControlNet(folder, 'bare'))];
  const pipeline = loadPipeline(source, { device, dtype, controlnet });
  rmSync(folder, { recursive: true });
  const [net] = pipeline.controlnet;
  const parameters = [...namedParameters(net).values()];
  for (const p of parameters) requireGrad(p.tensor);
  const random = new TorchGenerator(5);
  const normals = (...shape: number[]) => random.randn(sizeOf(shape)) as Float32Array;
  const run = resolveRun({ train: { target: 'controlnet' } }, 'test', 'test');
  const objective = objectiveOf(run.objective, source.config('scheduler'));
  const shape = [2, 4, 4, 4];
  const noised = addNoise(objective, {
    shape,
    latents: normals(...shape),
    timesteps: new Float32Array([500, 20]),
    noise: normals(...shape),
  });
  const images = [1, 2].flatMap((seed) => [...picture(seed, 32, 32).data]);
  const loss = scope(() => {
    const inputs = {
      ...place(noisedInputs(noised, dtype), device),
      conditioning_pixel_values: tensor(
        images.map((x) => x / 255),
        [2, 32, 32, 3],
        { device, dtype },
      ),
    };
    const value = diffusionLoss(controlled(run).network(pipeline, inputs), objective, inputs, {
      context: tensor(normals(2, 77, 80), [2, 77, 80], { device, dtype }),
      textEmbeds: tensor(normals(2, 40), [2, 40], { device, dtype }),
      timeIds: tensor(Array(2).fill([32, 32, 0, 0, 32, 32]).flat(), [2, 6], { device }),
    });
    backward(value);
    return value.floats();
  });
  const gradients = scope(() =>
    Float32Array.from(parameters.flatMap((p) => [...(gradOf(p.tensor) as Tensor).floats()])),
  );
  for (const p of parameters) clearGrad(p.tensor);
  pipeline.release();
  return { loss, gradients };
}

/** One update of the tiny UNet on fixed noise, with float32 masters where the weights are halves. */
export function trainingStep(device: Device, dtype: FloatDType): Results {
  const model = unet(parseUNetConfig(source.config('unet')));
  source.load('unet', model, device, dtype);
  const parameters = namedParameters(model);
  for (const p of parameters.values()) requireGrad(p.tensor);
  const settings = { betas: [0.9, 0.999] as const, eps: 1e-8, weight_decay: 1e-2 };
  const optimizer = optimize(parameters, adamw(settings), {
    ...settings,
    stochastic_rounding: false,
    seed: 0,
  });
  const averages = ema(parameters.keys(), optimizer.weightOf, 0.99);
  const random = new TorchGenerator(5);
  const normals = (...shape: number[]) => random.randn(sizeOf(shape)) as Float32Array;
  const objective = objectiveOf(fill(fields, {}, 'defaults').objective, source.config('scheduler'));
  const noised = addNoise(objective, {
    shape: [1, 4, 4, 4],
    latents: normals(1, 4, 4, 4),
    timesteps: new Float32Array([500]),
    noise: normals(1, 4, 4, 4),
  });
  const loss = scope(() => {
    const value = diffusionLoss(model, objective, place(noisedInputs(noised, dtype), device), {
      context: tensor(normals(1, 77, 80), [1, 77, 80], { device, dtype }),
      textEmbeds: tensor(normals(1, 40), [1, 40], { device, dtype }),
      timeIds: tensor([32, 32, 0, 0, 32, 32], [1, 6], { device }),
    });
    backward(value);
    return value.floats();
  });
  const joined = (of: (name: string, p: Parameter) => Tensor) =>
    scope(() => Float32Array.from([...parameters].flatMap(([name, p]) => [...of(name, p).floats()])));
  const gradients = joined((_, p) => gradOf(p.tensor) as Tensor);
  const { norm, scale } = clipGradients(parameters, 1);
  averages.step(optimizer.step(1e-3, scale).made);
  for (const p of parameters.values()) clearGrad(p.tensor);
  const results = {
    ...{ loss, gradients, norm: Float32Array.of(norm) },
    moments: joined((name) => optimizer.state.get(`exp_avg.${name}`) as Tensor),
    weights: joined((name) => optimizer.weightOf(name)),
    averages: joined((name) => averages.weights.get(name) as Tensor),
  };
  averages.release();
  optimizer.release();
  unload(model);
  return results;
}

/** Two levels wide enough for Hopper's tiles, with heads of 64. */
const wide: Partial<UNetConfig> = {
  block_out_channels: [32, 64],
  down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D'],
  up_block_types: ['CrossAttnUpBlock2D', 'UpBlock2D'],
  layers_per_block: 1,
  attention_head_dim: 1,
  transformer_layers_per_block: 1,
};

/** A UNet of random weights: three runs of one step, of which a GPU replays the last, and the gradients of three passes, likewise. */
export function replaysAndGradients(device: Device, dtype: FloatDType): Results {
  const random = new TorchGenerator(9);
  const made = (shape: readonly number[], scale = 1) =>
    tensor(
      (random.randn(sizeOf(shape)) as Float32Array).map((x) => x * scale),
      shape,
      { device, dtype },
    );
  const model = unet({ ...parseUNetConfig(source.config('unet')), ...wide });
  const named = namedParameters(model);
  const parameters = [...named.values()];
  for (const p of parameters)
    p.tensor = unscoped(() => made(p.memoryShape, p.shape.length > 1 ? Math.sqrt(p.shape[0] / p.size) : 1));
  const results: Results = {};
  scope(() => {
    const x = empty([1, 16, 16, 4], { device, dtype });
    const times = tensor([500], [1], { device });
    const conditioning = {
      ...{ context: made([1, 77, 80]), textEmbeds: made([1, 40]) },
      timeIds: tensor([32, 32, 0, 0, 32, 32], [1, 6], { device }),
    };
    const step = device.step(() => noGrad(() => model(x, times, conditioning)));
    for (let run = 0; run < 3; run++) {
      x.set(random.randn(x.size) as Float32Array);
      results[`run ${run}`] = step.run((y) => y.floats());
    }
    step.release();
    for (const p of parameters) requireGrad(p.tensor);
    const target = made(x.shape);
    const loss = ({ sample }: Tensors) => mse(model(sample, times, conditioning), target);
    const passes = openPasses({ loss }, named, device);
    for (let pass = 0; pass < 3; pass++) {
      const values = random.randn(x.size) as Float32Array;
      passes.queue({ sample: { shape: x.shape, values, dtype } }, 1 / 3).release();
    }
    results.gradients = Float32Array.from(
      parameters.flatMap((p) => [...(gradOf(p.tensor) as Tensor).floats()]),
    );
    passes.release();
  });
  unload(model);
  return results;
}
