// Training beside a UNet that is kept in 8-bit integers (train.q8): gradients are those over the decoded weights, a ControlNet
// begins with these, and runs resume bit for bit (train_devices.test.ts divides one among devices).
import { dirname } from 'node:path';
import { test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter, unload } from '../../engine/module.ts';
import { mse } from '../../engine/ops/loss.ts';
import { scope } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import { addAdapters, parametersOf } from '../../models/adapters/adapters.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../../models/control/controlnet.ts';
import { controlNetJson, startFromUNet } from '../../models/control/controlnet_start.ts';
import { keepInQ8 } from '../../models/unet/q8.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import { draws } from '../../train/data/draws.ts';
import type { RunInput } from '../../train/run/run.ts';
import { type GoldenCase, goldenArea } from '../support/golden.ts';
import { unetInputs } from '../support/models_golden.ts';
import { device, losses, model, resumes } from '../support/small_runs.ts';

const source = openModel(model);
const area = goldenArea('lora');
const inputs = area.cases.find((c) => c.call === 'unet forward after load_lora_weights') as GoldenCase;

function openUNet(q8: boolean): UNet {
  const own = unet(parseUNetConfig(source.config('unet')), { gradientCheckpointing: true });
  if (q8) keepInQ8(own);
  source.load('unet', own, device, 'float32');
  return own;
}

/** The gradients of adapters on a UNet, by key; B begins with numbers too, so that A has a gradient. */
function gradients(own: UNet): Map<string, Float32Array> {
  const drawn = (name: string, count: number) => {
    const numbers = draws(1, 0, name.length, 'weights');
    return Float32Array.from({ length: count }, () => numbers.uniform());
  };
  const added = parametersOf(
    addAdapters(own, { rank: 2, alpha: 2, targets: ['to_q', 'to_v', 'proj', 'conv1'] }, drawn),
  );
  for (const [name, { tensor }] of added) {
    if (name.includes('lora_B')) tensor.set(drawn(name, tensor.size).map((u) => u / 10));
    requireGrad(tensor);
  }
  scope(() => {
    const { sample, timesteps, conditioning } = unetInputs(area, inputs, device);
    const y = own(sample, timesteps, conditioning);
    backward(mse(y, zeros(y.shape, { device })));
  });
  const found = scope(
    () =>
      new Map([...added].map(([name, { tensor }]) => [name, gradOf(tensor)?.floats() ?? new Float32Array()])),
  );
  for (const { tensor } of added.values()) clearGrad(tensor);
  unload(own);
  return found;
}

test('gradients are those over the decoded weights, to the bit', (t) => {
  const [rounded, decoded] = [openUNet(true), openUNet(false)];
  const bytes = namedParameters(rounded);
  let kept = 0;
  for (const [key, parameter] of namedParameters(decoded)) {
    const own = bytes.get(key) as Parameter;
    parameter.tensor.set(scope(() => own.tensor.floats()));
    if (own.q8) kept++;
  }
  t.ok(kept > 50, `${kept} weights in 8 bits`);
  const [a, b] = [gradients(rounded), gradients(decoded)];
  t.ok(
    a.size > 20 && [...a.values()].every((gradient) => gradient.some((x) => x !== 0)),
    `${a.size} gradients`,
  );
  t.same(a, b);
  t.equal(device.memory.storages, 0, 'live tensors');
  t.end();
});

test('a ControlNet begins with what the UNet says', (t) => {
  const own = openUNet(true);
  const net = controlnet(
    parseControlNetConfig(
      controlNetJson(source.config('unet'), { ratio: 8, transformer_layers_per_block: [] }),
      'a new one',
    ),
  );
  startFromUNet(net, own, (_, count) => new Float32Array(count));
  const key = 'down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight';
  const [copy, from] = [net, own].map((root) => namedParameters(root).get(key) as Parameter);
  t.ok(from.q8 && !copy.q8, 'it is trained, and so not kept in bytes');
  t.same(
    copy.tensor.floats(),
    scope(() => from.tensor.floats()),
  );
  for (const root of [net, own]) unload(root);
  t.equal(device.memory.storages, 0, 'live tensors');
  t.end();
});

test('a run resumes, its previews are drawn, and what it learns is another thing by little', async (t) => {
  const lora = (q8: boolean): RunInput => ({
    train: { target: 'lora', gradient_checkpointing: true, q8 },
    lora: { rank: 2, alpha: 4, targets: ['to_q', 'conv1'] },
    previews: { prompts: ['a fox'], every_steps: 1, num_inference_steps: 1 },
  });
  const [rounded, plain] = [await resumes(t, 'q8', lora(true)), await resumes(t, 'whole', lora(false))];
  const [a, b] = [rounded, plain].map((checkpoint) =>
    losses(dirname(checkpoint)).map(([, loss]) => loss as number),
  );
  t.ok(
    a.length === 3 && a.every((loss, i) => loss !== b[i] && Math.abs(loss / b[i] - 1) < 0.01),
    `${a}, ${b}`,
  );
  t.equal(device.memory.storages, 0, 'live tensors');
});
