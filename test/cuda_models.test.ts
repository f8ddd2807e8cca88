// Whole models through the cuda device on the virtual GPU, beside the cpu device: the tiny golden pipeline (text encoders,
// UNet under guidance, VAE, four steps) and one step of training. Float32 agrees within its sums' order. In bfloat16 both
// devices round every activation in their own places, so what is asked is that the GPU is as near to the float32 result as
// the CPU is. Races are looked for op by op in cuda.test.ts, and not again here.
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { backward, clearGrad, gradOf, requireGrad } from '../engine/grad.ts';
import { namedParameters, type Parameter, unload } from '../engine/module.ts';
import { scope } from '../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { openModel } from '../models/checkpoint.ts';
import { decode, denoise, loadPipeline } from '../models/pipeline.ts';
import { TorchGenerator } from '../models/torch_random.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { clipGradients } from '../train/clip.ts';
import { ema } from '../train/ema.ts';
import { fill } from '../train/fields.ts';
import { addNoise, diffusionLoss, objectiveOf } from '../train/objective.ts';
import { adamw } from '../train/optimizers/adamw.ts';
import { optimize } from '../train/optimizers/rule.ts';
import { fields } from '../train/run.ts';
import { goldenFolder } from './golden.ts';
import { relativeError } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const cpu = openDevice('cpu');
const gpu = openVirtualGpu({ races: false });
const cuda = cudaDevice(gpu);

/** Root mean square errors relative to the whole: float32's own, and how much farther than the CPU bfloat16 may be. */
const FLOAT32 = 1e-5;
const FARTHER = 2; // one bit less

type Results = Record<string, Float32Array>;

/** Runs `work` on both devices in both types, and compares. Live tensors must return to their count. */
function compareDevices(t: Test, work: (device: Device, dtype: FloatDType) => Results): void {
  const run = (device: Device, dtype: FloatDType): Results => {
    const before = device.memory.storages;
    const results = work(device, dtype);
    t.equal(device.memory.storages, before, `live tensors on ${device.name} in ${dtype}`);
    return results;
  };
  const [want, float] = [run(cpu, 'float32'), run(cuda, 'float32')];
  const [own, half] = [run(cpu, 'bfloat16'), run(cuda, 'bfloat16')];
  for (const name of Object.keys(want)) {
    const error = relativeError(float[name], want[name]);
    t.ok(error <= FLOAT32, `${name} in float32: ${error.toExponential(1)}`);
    if (!half[name]) continue;
    const [here, there] = [own, half].map((each) => relativeError(each[name], want[name]));
    const shown = `cpu ${here.toExponential(2)}, cuda ${there.toExponential(2)} from float32`;
    t.ok(here > 0 && there <= FARTHER * here, `${name} in bfloat16: ${shown}`);
  }
}

test('the tiny pipeline, four steps', (t) => {
  compareDevices(t, (device, dtype) => {
    const pipeline = loadPipeline(source, { device, dtype });
    const loop = denoise(pipeline, {
      prompt: ['a red fox in the snow'],
      negative_prompt: ['blurry'],
      ...{ height: 32, width: 32, num_inference_steps: 4, guidance_scale: 5 },
      generators: [new TorchGenerator(3)],
    });
    let turn = loop.next();
    while (!turn.done) turn = loop.next();
    const { latents } = turn.value;
    // The VAE is float32 whatever the rest is.
    const results: Results = { latents: latents.data };
    if (dtype === 'float32') results.picture = decode(pipeline, latents).data;
    pipeline.release();
    return results;
  });
  t.end();
});

test('one step of training: loss, gradients, clipping, AdamW, the moving average', (t) => {
  compareDevices(t, trainingStep);
  t.end();
});

/** One update of the tiny UNet on fixed noise, with float32 masters where the weights are halves. */
function trainingStep(device: Device, dtype: FloatDType): Results {
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
  const noised = addNoise(
    objective,
    normals(1, 4, 4, 4),
    [1, 4, 4, 4],
    new Float32Array([500]),
    normals(1, 4, 4, 4),
  );
  const loss = scope(() => {
    const value = diffusionLoss(model, objective, noised, {
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
  optimizer.step(1e-3, scale);
  averages.step();
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
