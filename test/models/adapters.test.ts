// LoRA as trainable adapters against peft and diffusers (golden area lora): gradients, and three AdamW steps. Then that
// every linear layer and convolution of the UNet can be adapted, and that fresh adapters change nothing.
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, noGrad, requireGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, type Parameter, unload } from '../../engine/module.ts';
import { mse } from '../../engine/ops/loss.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { type AdaptersConfig, addAdapters, parametersOf } from '../../models/adapters/adapters.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { parseTextConfig, placeTokens, textEncoder } from '../../models/text/clip.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import { toDevice } from '../../models/vae/latents.ts';
import { draws } from '../../train/data/draws.ts';
import { adamw } from '../../train/optimizers/adamw.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { optimize } from '../../train/optimizers/rule.ts';
import {
  allClose,
  type GoldenCase,
  goldenArea,
  goldenFolder,
  goldenLora,
  maxDifference,
} from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const device = openDevice('auto');
const area = goldenArea('lora');
const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const attention = ['to_q', 'to_k', 'to_v', 'to_out.0'];
const uniforms = (name: string, count: number) => {
  const source = draws(3, 0, name.length, 'weights');
  return Float32Array.from({ length: count }, () => source.uniform());
};

function openUNet(): UNet {
  const model = unet(parseUNetConfig(source.config('unet')));
  source.load('unet', model, device, 'float32');
  return model;
}

const latents = (name: string): Tensor =>
  toDevice({ shape: area.shape(name), data: area.floats(name) }, device, 'float32');
const plain = (name: string): Tensor => tensor(area.floats(name), area.shape(name), { device });

function predict(model: UNet): Tensor {
  const n = area.shape('data.sample')[0];
  const times = area.floats('data.timestep');
  const timesteps = Float32Array.from({ length: n }, (_, i) => times[times.length === 1 ? 0 : i]);
  return model(latents('data.sample'), tensor(timesteps, [n], { device }), {
    context: plain('data.encoder_hidden_states'),
    textEmbeds: plain('data.text_embeds'),
    timeIds: plain('data.time_ids'),
  });
}

/** diffusers' older spelling of a peft key, as the golden files have it. */
const stored = (name: string) => `unet.${name.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}`;

/** The tiny UNet with the adapter of a golden file, ready to train; parameters by the file's names. */
function adapted(file: string, config: AdaptersConfig): { model: UNet; parameters: Map<string, Parameter> } {
  const model = openUNet();
  const weights = openSafetensors(goldenLora(file));
  const parameters = new Map<string, Parameter>();
  for (const [name, p] of parametersOf(addAdapters(model, config, uniforms))) {
    const bytes = weights.read(stored(name));
    p.tensor.upload(bytes);
    requireGrad(p.tensor);
    parameters.set(stored(name), p);
  }
  checkNames(parameters, [...weights.tensors.keys()]);
  weights.close();
  return { model, parameters };
}

function checkNames(parameters: Map<string, Parameter>, names: string[]): void {
  if ([...parameters.keys()].sort().join() !== names.sort().join())
    throw new Error('other adapters than the file has');
}

const norm = (values: Float32Array): number => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
const theCase = (id: string) => area.cases.find((c) => c.id === id) as GoldenCase;
const scaled: AdaptersConfig = { rank: 4, alpha: 2, targets: attention };

test('gradients of the adapter alone', (t) => {
  const before = device.memory.storages;
  const c = theCase('gradients');
  const { model, parameters } = adapted('lora/scaled_diffusers.safetensors', scaled);
  const loss = scope(() => {
    const value = mse(predict(model), latents('data.target'));
    backward(value);
    return value.floats();
  });
  const gradient = (name: string) =>
    scope(() => gradOf((parameters.get(name) as Parameter).tensor)?.floats()) as Float32Array;
  const norms = (c.parameter_names as string[]).map((name) => norm(gradient(name)));
  for (const [label, expected] of Object.entries(c.expect)) {
    const got =
      label === 'loss' ? loss : label === 'grad_norms' ? norms : gradient(label.slice('grad.'.length));
    allClose(t, label, got, area.doubles(expected.tensor), expected);
  }
  for (const p of parameters.values()) clearGrad(p.tensor);
  unload(model);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('three steps of AdamW on the adapter', (t) => {
  const c = theCase('training');
  const settings = c.settings as unknown as {
    lr: number;
    betas: [number, number];
    eps: number;
    weight_decay: number;
    max_grad_norm: number;
  };
  const { model, parameters } = adapted('lora/scaled_diffusers.safetensors', scaled);
  const optimizer = optimize(parameters, adamw(settings), {
    ...settings,
    stochastic_rounding: false,
    seed: 0,
  });
  const rows: Record<string, number[]> = { losses: [], grad_norms: [], param_norms: [] };
  const weight = (name: string) => (parameters.get(name) as Parameter).tensor.floats();
  for (let step = 0; step < 3; step++) {
    scope(() => {
      const value = mse(predict(model), latents('data.target'));
      backward(value);
      rows.losses.push(value.floats()[0]);
    });
    const clipped = clipGradients(parameters, settings.max_grad_norm);
    rows.grad_norms.push(clipped.norm);
    optimizer.step(settings.lr, clipped.scale);
    for (const p of parameters.values()) clearGrad(p.tensor);
    rows.param_norms.push(...(c.parameter_names as string[]).map((name) => norm(weight(name))));
  }
  for (const [label, expected] of Object.entries(c.expect)) {
    const want = area.doubles(expected.tensor);
    const all = rows[label] ?? weight(label.slice('param.'.length));
    allClose(t, label, [...all].slice(-want.length), want, expected);
  }
  optimizer.release();
  unload(model);
  t.end();
});

test('fresh adapters on every layer: nothing changes, everything is reached', (t) => {
  const before = device.memory.storages;
  const model = openUNet();
  const draw = () => noGrad(() => scope(() => predict(model).floats()));
  const want = draw();
  const keys = [...namedParameters(model).keys()];
  const layers = keys.filter((key) => key.endsWith('.weight')).map((key) => key.slice(0, -'.weight'.length));
  const norms = /(^|\.)(norm\d?|conv_norm_out)$/;
  const targets = layers.filter((path) => !norms.test(path));
  const added = parametersOf(addAdapters(model, { rank: 2, alpha: 2, targets }, uniforms));
  t.equal(added.size, 2 * targets.length, `${targets.length} layers`);
  t.ok(
    keys.every((key) => namedParameters(model).has(key)),
    'the model keeps its keys',
  );
  t.ok(maxDifference(draw(), want) < 1e-5, 'B is zero');
  for (const p of added.values()) requireGrad(p.tensor);
  scope(() => backward(mse(predict(model), latents('data.target'))));
  const still = [...added].filter(([name, p]) => {
    const gradient = scope(() => gradOf(p.tensor)?.floats());
    return name.includes('lora_B') ? !gradient?.some((x) => x !== 0) : !gradient;
  });
  t.same(
    still.map(([name]) => name),
    [],
    'every adapter has a gradient',
  );
  for (const p of added.values()) clearGrad(p.tensor);
  unload(model);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('an adapter on convolutions and feed-forwards computes what merging it computes', (t) => {
  const targets = [
    'conv1',
    'conv_shortcut',
    'downsamplers.0.conv',
    'ff.net.0.proj',
    'ff.net.2',
    'linear_1',
    'proj_in',
  ];
  const [live, merged] = [openUNet(), openUNet()];
  const added = parametersOf(addAdapters(live, { rank: 3, alpha: 6, targets }, uniforms));
  for (const [name, p] of added) {
    const values = uniforms(`${name} again`, p.size).map((u) => 0.3 * (u - 0.5));
    p.tensor.upload(new Uint8Array(values.buffer));
  }
  merge(merged, added, 2);
  const [got, want, base] = [live, merged, openUNet()].map((model) => {
    const out = noGrad(() => scope(() => predict(model).floats()));
    unload(model);
    return out;
  });
  t.ok(maxDifference(want, base) > 0.01, 'the adapter matters');
  t.ok(maxDifference(got, want) < 5e-5, `differs by ${maxDifference(got, want)}`);
  t.end();
});

test('adapters on a text encoder: the merged weights and their gradients', (t) => {
  const before = device.memory.storages;
  const config: AdaptersConfig = {
    rank: 2,
    alpha: 5,
    targets: ['q_proj', 'v_proj', 'out_proj', 'fc1', 'fc2'],
  };
  const factor = 5 / 2;
  const ids = Int32Array.from({ length: 77 }, (_, i) => (i < 9 ? 3 + 5 * i : 999));
  const opened = () => {
    const model = textEncoder(parseTextConfig(source.config('text_encoder_2')));
    source.load('text_encoder_2', model, device, 'float32');
    return model;
  };
  const [live, merged] = [opened(), opened()];
  const added = parametersOf(addAdapters(live, config, uniforms));
  for (const [name, p] of added) {
    const values = uniforms(`${name} again`, p.size).map((u) => 0.3 * (u - 0.5));
    p.tensor.upload(new Uint8Array(values.buffer));
    requireGrad(p.tensor);
  }
  merge(merged, added, factor);
  const weights = namedParameters(merged);
  for (const p of weights.values()) requireGrad(p.tensor);
  const [got, want] = [live, merged].map((model) =>
    scope(() => {
      const { hidden } = model(placeTokens(model, ids, 77, device), { layer: -2, pooled: false });
      backward(mse(hidden, zeros(hidden.shape, hidden)));
      const { pooled } = model(placeTokens(model, ids, 77, device), { layer: 0, pooled: true });
      const found = pooled as Tensor;
      backward(mse(found, zeros(found.shape, found)));
      return [...hidden.floats(), ...found.floats()];
    }),
  );
  t.ok(maxDifference(got, want) < 5e-5, `differs by ${maxDifference(got, want)}`);
  const gradient = (p: Parameter) => scope(() => gradOf(p.tensor)?.floats()) as Float32Array;
  for (const [name, a] of nonEmpty([...added].filter(([each]) => each.includes('lora_A')))) {
    const b = added.get(name.replace('lora_A', 'lora_B')) as Parameter;
    const dw = gradient(weights.get(name.replace('.lora_A', '')) as Parameter);
    const [[rank, inputs], [outputs]] = [a.shape, b.shape];
    const [down, up] = [a, b].map(({ tensor }) => tensor.floats());
    const sum = (n: number, term: (i: number) => number) =>
      factor * Array.from({ length: n }, (_, i) => term(i)).reduce((x, y) => x + y, 0);
    const da = Array.from({ length: rank * inputs }, (_, i) =>
      sum(outputs, (o) => up[o * rank + Math.floor(i / inputs)] * dw[o * inputs + (i % inputs)]),
    );
    const db = Array.from({ length: outputs * rank }, (_, i) =>
      sum(inputs, (k) => dw[Math.floor(i / rank) * inputs + k] * down[(i % rank) * inputs + k]),
    );
    for (const [p, exact] of [[a, da] as const, [b, db] as const]) {
      const most = Math.max(...exact.map(Math.abs));
      t.ok(
        most > 0 && maxDifference([...gradient(p)], exact) < 2e-5 * most,
        `${name}, ${p === a ? 'A' : 'B'}`,
      );
    }
  }
  for (const p of [...added.values(), ...weights.values()]) clearGrad(p.tensor);
  for (const model of [live, merged]) unload(model);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

/** W += factor B A, in float64. */
function merge(model: AnyModule, added: Map<string, Parameter>, factor: number): void {
  const parameters = namedParameters(model);
  for (const [name, p] of added) {
    if (!name.includes('lora_A')) continue;
    const weight = (parameters.get(name.replace('.lora_A', '')) as Parameter).tensor;
    const up = (added.get(name.replace('lora_A', 'lora_B')) as Parameter).tensor.floats();
    const [down, rank] = [p.tensor.floats(), p.shape[0]];
    const inner = p.size / rank;
    const values = weight.floats().map((w, i) => {
      const [o, k] = [Math.floor(i / inner), i % inner];
      let sum = 0;
      for (let r = 0; r < rank; r++) sum += up[o * rank + r] * down[r * inner + k];
      return w + factor * sum;
    });
    weight.upload(new Uint8Array(values.buffer));
  }
}

test('a target that names nothing is refused', (t) => {
  const model = openUNet();
  t.throws(
    () => parametersOf(addAdapters(model, { ...scaled, targets: ['to_qq'] }, uniforms)),
    /"to_qq" names no.*did you mean "to_q"/,
  );
  unload(model);
  t.end();
});
