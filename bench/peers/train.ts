// Updates of the emoji model's UNet beside PyTorch's, taking turns in one run: forward, backward, clipping at norm 1 and
// AdamW, batch 32. Prints the medians and their ratio as JSON; one clear line where torch is absent.
//   node dist/bench/peers/train.js [PYTHON]
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { packageRoot } from '../../engine/cpu/build.ts';
import { openDevice } from '../../engine/device.ts';
import { backward, clearGrad, requireGrad } from '../../engine/grad.ts';
import { namedParameters, parameterCount, unload } from '../../engine/module.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { sizeOf, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { emojiModel } from '../../models/presets.ts';
import { parseSchedulerConfig } from '../../models/samplers/config.ts';
import { unet } from '../../models/unet.ts';
import { clipGradients } from '../../train/clip.ts';
import { fill } from '../../train/fields.ts';
import { diffusionLoss, objectiveOf } from '../../train/objective.ts';
import { createOptimizer } from '../../train/optimizers/create.ts';
import { fields } from '../../train/run.ts';
import { fillRandom, uniforms } from '../pool_weights.ts';

const batch = 32;
const [warm, timed] = [4, 14];
const { unet: config, scheduler } = emojiModel;
/** The same in torch_unet.py's words. */
const network = {
  channels: config.block_out_channels,
  layers: config.layers_per_block,
  depth: config.transformer_layers_per_block,
  heads: config.attention_head_dim,
  ctx: config.cross_attention_dim,
  groups: config.norm_num_groups,
  add_dim: config.addition_time_embed_dim,
  add_in: config.projection_class_embeddings_input_dim,
};

/** Our side: `update` takes one and returns its milliseconds. */
function ours(dtype: FloatDType) {
  const device = openDevice('cpu');
  device.memory.peak = device.memory.live;
  const net = unet(config);
  fillRandom(net, device, dtype);
  const parameters = namedParameters(net);
  for (const p of parameters.values()) requireGrad(p.tensor);
  const run = fill(fields, {}, 'the defaults');
  const optimizer = createOptimizer(parameters, run.optimizer, 0);
  const objective = objectiveOf(run.objective, parseSchedulerConfig(scheduler));
  const shape = [batch, 16, 16, 4];
  const random = (...of: number[]) => uniforms(sizeOf(of), 1);
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
    parameters: parameterCount(net),
    peakMiB: () => Math.round(device.memory.peak / 2 ** 20),
    release() {
      unload(net);
      optimizer.release();
      for (const t of Object.values(conditioning)) t.release();
    },
    update() {
      const began = performance.now();
      scope(() => {
        const loss = diffusionLoss(net, objective, noised, conditioning);
        loss.floats();
        backward(loss);
      });
      optimizer.step(1e-4, clipGradients(parameters, 1).scale);
      for (const p of parameters.values()) clearGrad(p.tensor);
      return performance.now() - began;
    },
  };
}

async function compare(python: string, dtype: FloatDType): Promise<void> {
  const script = join(packageRoot, 'bench', 'peers', 'torch_train.py');
  const child = spawn(python, [script, JSON.stringify(network), String(batch), dtype, '2'], {
    stdio: ['pipe', 'pipe', 'ignore'],
  });
  child.on('error', () => undefined); // told below: it prints no line
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const hello = await lines.next();
  if (hello.done) {
    console.log(`skipped: ${python} has no torch; name another python as the argument`);
    return;
  }
  const peer = JSON.parse(hello.value) as { torch: string; parameters: number };
  const mine = ours(dtype);
  const times: [number[], number[]] = [[], []];
  for (let i = 0; i < warm + timed; i++) {
    const a = mine.update();
    child.stdin.write('\n');
    const b = Number((await lines.next()).value);
    if (i >= warm) times.forEach((list, k) => void list.push([a, b][k]));
  }
  child.stdin.end();
  mine.release();
  const [a, b] = times.map((list) => list.sort((x, y) => x - y)[list.length >> 1]);
  const rate = (ms: number) => Number(((1000 * batch) / ms).toFixed(1));
  const same = peer.parameters === mine.parameters;
  console.log(
    JSON.stringify({
      dtype,
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

for (const dtype of ['float32', 'bfloat16'] as const) await compare(process.argv[2] ?? 'python3', dtype);
