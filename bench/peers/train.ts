// Updates of the emoji model's UNet and VAE beside PyTorch's, taking turns in one run: forward, backward, clipping at norm 1
// and AdamW. Prints the medians and their ratio as JSON; one clear line where torch is absent.
// With --processor-time it counts each process's own time on the cores: on one core that is what a busy machine disturbs least.
//   [taskset -c 0] node dist/bench/peers/train.js [PYTHON [unet | vae]] [--processor-time]
import { spawn } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { type Device, openDevice } from '../../engine/device.ts';
import { backward, clearGrad, requireGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, parameterCount, unload } from '../../engine/module.ts';
import { add, mul } from '../../engine/ops/binary.ts';
import { exp, scale } from '../../engine/ops/unary.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { packageRoot } from '../../io/package_root.ts';
import { emojiModel } from '../../models/formats/presets.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { unet } from '../../models/unet/unet.ts';
import { vae } from '../../models/vae/vae.ts';
import { diffusionLoss, noisedInputs, objectiveOf } from '../../train/objective/objective.ts';
import { vaeLoss } from '../../train/objective/vae_objective.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { createOptimizer } from '../../train/optimizers/create.ts';
import { place } from '../../train/passes/pass.ts';
import { fill } from '../../train/run/fields.ts';
import { fields } from '../../train/run/run_fields.ts';
import { fillRandom, uniforms } from '../pool_weights.ts';
import { median } from '../timing.ts';

const [warm, timed] = [4, 14];
const { unet: unetConfig, vae: vaeConfig, scheduler } = emojiModel;

/** What is timed: batches as configs/emoji.ts has them, and the network in the words of torch_train.py. */
const networks = {
  unet: {
    batch: 32,
    peer: {
      channels: unetConfig.block_out_channels,
      layers: unetConfig.layers_per_block,
      depth: unetConfig.transformer_layers_per_block,
      heads: unetConfig.attention_head_dim,
      ctx: unetConfig.cross_attention_dim,
      groups: unetConfig.norm_num_groups,
      add_dim: unetConfig.addition_time_embed_dim,
      add_in: unetConfig.projection_class_embeddings_input_dim,
    },
    open: openUnet,
  },
  vae: {
    batch: 16,
    peer: {
      channels: vaeConfig.block_out_channels,
      layers: vaeConfig.layers_per_block,
      groups: vaeConfig.norm_num_groups,
      latent: vaeConfig.latent_channels,
    },
    open: openVae,
  },
};
type Name = keyof typeof networks;

/** A network, its loss on the tape over fixed inputs, and those inputs. */
interface Opened {
  net: AnyModule;
  loss(): Tensor;
  inputs: readonly Tensor[];
}

const random = (...shape: number[]): Float32Array => uniforms(sizeOf(shape), 1);
const run = fill(fields, {}, 'the defaults');

function openUnet(device: Device, dtype: FloatDType, batch: number): Opened {
  const net = unet(unetConfig);
  const objective = objectiveOf(run.objective, parseSchedulerConfig(scheduler));
  const shape = [batch, 16, 16, 4];
  const conditioning = unscoped(() => ({
    context: tensor(random(batch, 77, 128), [batch, 77, 128], { device, dtype }),
    textEmbeds: tensor(random(batch, 64), [batch, 64], { device, dtype }),
    timeIds: tensor(new Float32Array(batch * 6).fill(64), [batch, 6], { device }),
  }));
  const noised = {
    shape,
    sample: random(...shape),
    timesteps: new Float32Array(batch).fill(500),
    target: random(...shape),
  };
  return {
    net,
    loss: () => diffusionLoss(net, objective, place(noisedInputs(noised, dtype), device), conditioning),
    inputs: Object.values(conditioning),
  };
}

function openVae(device: Device, dtype: FloatDType, batch: number): Opened {
  const coder = vae(vaeConfig);
  const [shape, latent] = [
    [batch, 64, 64, 3],
    [batch, 16, 16, 4],
  ];
  const [x, draw] = unscoped(() => [shape, latent].map((of) => tensor(random(...of), of, { device, dtype })));
  return {
    net: coder.module,
    loss() {
      const moments = coder.encode(x);
      const z = add(moments.mean, mul(exp(scale(moments.logvar, 0.5)), draw));
      return vaeLoss(run.vae_objective, coder.decode(z), x, moments);
    },
    inputs: [x, draw],
  };
}

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { 'processor-time': { type: 'boolean', default: false } },
});
const [python = 'python3', only] = positionals;
const threads = availableParallelism();
const clock = values['processor-time'] ? 'process_time' : 'perf_counter';
/** In milliseconds. */
const now = (): number => {
  if (clock === 'perf_counter') return performance.now();
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};

/** Our side: `update` takes one and returns its milliseconds. */
function ours(name: Name, dtype: FloatDType) {
  const device = openDevice('cpu');
  device.memory.peak = device.memory.live;
  const { batch, open } = networks[name];
  const { net, loss, inputs } = open(device, dtype, batch);
  fillRandom(net, device, dtype);
  const parameters = namedParameters(net);
  for (const p of parameters.values()) requireGrad(p.tensor);
  const optimizer = createOptimizer(parameters, run.optimizer, 0);
  return {
    parameters: parameterCount(net),
    peakMiB: () => Math.round(device.memory.peak / 2 ** 20),
    release() {
      unload(net);
      optimizer.release();
      for (const t of inputs) t.release();
    },
    update() {
      const began = now();
      scope(() => {
        const y = loss();
        y.floats();
        backward(y);
      });
      optimizer.step(1e-4, clipGradients(parameters, 1).scale);
      for (const p of parameters.values()) clearGrad(p.tensor);
      return now() - began;
    },
  };
}

async function compare(python: string, name: Name, dtype: FloatDType): Promise<void> {
  const { batch, peer: network } = networks[name];
  const script = join(packageRoot, 'bench', 'peers', 'torch_train.py');
  const child = spawn(
    python,
    [script, name, JSON.stringify(network), String(batch), dtype, String(threads), clock],
    {
      stdio: ['pipe', 'pipe', 'ignore'],
    },
  );
  child.on('error', () => undefined); // told below: it prints no line
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const hello = await lines.next();
  if (hello.done) {
    console.log(`skipped: ${python} has no torch; name another python as the argument`);
    return;
  }
  const peer = JSON.parse(hello.value) as { torch: string; parameters: number };
  const mine = ours(name, dtype);
  const times: [number[], number[]] = [[], []];
  for (let i = 0; i < warm + timed; i++) {
    const a = mine.update();
    child.stdin.write('\n');
    const b = Number((await lines.next()).value);
    if (i >= warm) times.forEach((list, k) => void list.push([a, b][k]));
  }
  child.stdin.end();
  mine.release();
  const [a, b] = times.map(median);
  const rate = (ms: number) => Number(((1000 * batch) / ms).toFixed(1));
  const same = peer.parameters === mine.parameters;
  console.log(
    JSON.stringify({
      network: name,
      dtype,
      threads,
      clock,
      batch,
      parameters: mine.parameters,
      same_network: same,
      images_per_second: rate(a),
      [`torch_${peer.torch}_images_per_second`]: rate(b),
      ratio: Number((b / a).toFixed(2)),
      peak_MiB: mine.peakMiB(),
    }),
  );
}

for (const name of Object.keys(networks) as Name[])
  for (const dtype of ['float32', 'bfloat16'] as const)
    if (!only || only === name) await compare(python, name, dtype);
