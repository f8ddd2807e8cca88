// Golden area `ops`: single operations and small blocks of the models against torch, outputs and gradients. The goldens are
// [n, c, h, w] and [n, heads, tokens, d] where ours are [n, h, w, c] and [n, tokens, heads * d]: converted here, both ways.
import { test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, unload } from '../../engine/module.ts';
import { attention } from '../../engine/ops/attention.ts';
import { add, mul } from '../../engine/ops/binary.ts';
import { conv2d, type Padding } from '../../engine/ops/conv2d.ts';
import { geglu, linear } from '../../engine/ops/linear.ts';
import { mse } from '../../engine/ops/loss.ts';
import { embedding, upsampleNearest } from '../../engine/ops/move.ts';
import { groupNorm, layerNorm, softmax } from '../../engine/ops/norm.ts';
import { timestepEmbedding } from '../../engine/ops/timestep_embedding.ts';
import { gelu, quickGelu, scale, silu, square, tanh } from '../../engine/ops/unary.ts';
import { keep, scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { downsample, resnet, upsample } from '../../models/unet/blocks.ts';
import { guide, rescaled } from '../../models/unet/guidance.ts';
import { type Conditioning, transformer, transformerBlock } from '../../models/unet/transformer.ts';
import { embeddingMlp } from '../../models/unet/unet_encoder.ts';
import { pixelAttention } from '../../models/vae/vae.ts';
import { type Assert, allClose, folded, type GoldenCase, goldenArea, permuted } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';

const area = goldenArea('ops');

type Inputs = Record<string, Tensor>;
interface Params {
  stride: number;
  padding: number;
  pad_left_right_top_bottom?: readonly number[];
  groups: number;
  eps: number;
  causal: boolean;
  size: readonly [number, number];
  dim: number;
  flip_sin_to_cos: boolean;
  downscale_freq_shift: number;
  approximate: string;
  heads: number;
  layers: number;
  guidance_scale: number;
  guidance_rescale?: number;
}

function sides({ padding: p, pad_left_right_top_bottom: more = [0, 0, 0, 0] }: Params): Padding {
  const [left, right, top, bottom] = more;
  return [p + top, p + left, p + bottom, p + right];
}

/** SDXL has no tanh form of gelu, and so there is no op for it: its formula, from other ops. */
const tanhGelu = (x: Tensor): Tensor => {
  const inner = scale(add(x, scale(mul(x, square(x)), 0.044715)), Math.sqrt(2 / Math.PI));
  return mul(scale(x, 0.5), scale(tanh(inner), 1, 1));
};

/** By the case's `call`: y from the inputs, in each way that the engine has. `heads` is the golden layout's. */
type Operation = (t: Inputs, p: Params, heads: number) => Tensor;
const operations: Record<string, readonly Operation[]> = {
  conv2d: [(t, p) => conv2d(t.x, t.weight, t.bias, { stride: p.stride, padding: sides(p) })],
  linear: [(t) => linear(t.x, t.weight, t.bias)],
  group_norm: [(t, p) => groupNorm(t.x, t.weight, t.bias, p)],
  group_norm_silu: [
    (t, p) => groupNorm(t.x, t.weight, t.bias, { ...p, silu: true }),
    (t, p) => silu(groupNorm(t.x, t.weight, t.bias, p)),
  ],
  layer_norm: [(t, p) => layerNorm(t.x, t.weight, t.bias, p)],
  scaled_dot_product_attention: [(t, { causal }, heads) => attention(t.q, t.k, t.v, { heads, causal })],
  gelu: [(t, { approximate }) => (approximate === 'tanh' ? tanhGelu(t.x) : gelu(t.x))],
  quick_gelu: [(t) => quickGelu(t.x)],
  silu: [(t) => silu(t.x)],
  'softmax over the last axis': [(t) => softmax(t.x)],
  geglu: [
    (t) => linear(t.x, t.weight, t.bias, { activation: 'geglu' }),
    (t) => geglu(linear(t.x, t.weight, t.bias)),
  ],
  'interpolate nearest, scale 2': [({ x }) => upsampleNearest(x, 2 * x.shape[1], 2 * x.shape[2])],
  'interpolate nearest to a size': [(t, { size }) => upsampleNearest(t.x, ...size)],
  'embedding rows': [(t) => embedding(t.ids, t.weight)],
  timestep_embedding: [
    (t, p) =>
      timestepEmbedding(t.t, p.dim, { flipSinToCos: p.flip_sin_to_cos, shift: p.downscale_freq_shift }),
  ],
};

/** By `call`: a block of the models, as [its parameters, its forward]. `size` reads the golden shape of an input. */
type Block = (
  size: (input: string, axis: number) => number,
  p: Params,
) => readonly [AnyModule, (t: Inputs) => Tensor];
const blocks: Record<string, Block> = {
  'resnet block (UNet)': (size, p) => {
    const block = resnet(size('p.conv1.weight', 1), size('p.conv1.weight', 0), p, size('temb', 1));
    return [block, (t) => block(t.x, { time: { temb: silu(t.temb) } })];
  },
  'resnet block (VAE: no time embedding, eps 1e-6)': (size, p) => {
    const block = resnet(size('p.conv1.weight', 1), size('p.conv1.weight', 0), p);
    return [block, (t) => block(t.x)];
  },
  'VAE mid-block attention on an NCHW map': (size, p) => {
    const block = pixelAttention(size('x', 1), p);
    return [block, (t) => block(t.x)];
  },
  'transformer block': (size, p) => {
    const block = transformerBlock(size('x', 2), size('context', 2), p.heads);
    return [block, (t) => block(t.x, { context: t.context } as Conditioning)];
  },
  'Transformer2DModel with linear projections': (size, { heads, layers, groups }) => {
    const block = transformer({ width: size('x', 1), heads, depth: layers }, size('context', 2), groups);
    return [block, (t) => block(t.x, { context: t.context } as Conditioning)];
  },
  'UNet downsampler': (size) => {
    const block = downsample(size('x', 1), [1, 1, 1, 1]);
    return [block, (t) => block(t.x)];
  },
  'VAE downsampler': (size) => {
    const block = downsample(size('x', 1), [0, 0, 1, 1]);
    return [block, (t) => block(t.x)];
  },
  'upsampler with convolution': (size) => {
    const block = upsample(size('x', 1));
    return [block, ({ x }) => block(x, 2 * x.shape[1], 2 * x.shape[2])];
  },
  'time embedding MLP': (size) => {
    const block = embeddingMlp(size('x', 1), size('p.linear_1.weight', 0));
    return [block, (t) => block(t.x)];
  },
};

/** The order that brings a golden tensor's axes into ours, or undefined where they are the same. */
function axesOf(call: string, rank: number): readonly number[] | undefined {
  if (call === 'scaled_dot_product_attention') return [0, 2, 1, 3];
  if (rank === 4) return [0, 2, 3, 1];
  return call === 'group_norm' && rank === 3 ? [0, 2, 1] : undefined;
}

function toOurs(call: string, name: string, device: Device): Tensor {
  const golden = area.shape(name);
  const dtype = area.dtype(name);
  const order = axesOf(call, golden.length);
  if (!order) return tensor(area.floats(name), golden, { device, dtype });
  const [n, ...rest] = order.map((axis) => golden[axis]);
  const shape = call === 'scaled_dot_product_attention' ? [n, rest[0], rest[1] * rest[2]] : [n, ...rest];
  return tensor(permuted(area.floats(name), golden, order), shape, { device, dtype });
}

function toGolden(call: string, ours: Float32Array, name: string): Float32Array {
  const golden = area.shape(name);
  const order = axesOf(call, golden.length);
  if (!order) return ours;
  const back = golden.map((_, axis) => order.indexOf(axis));
  return permuted(
    ours,
    order.map((axis) => golden[axis]),
    back,
  );
}

/** Runs y = forward(leaves) and its gradient, and compares all that the case expects. */
function check(t: Assert, c: GoldenCase, label: string, leaves: Inputs, forward: () => Tensor): void {
  const call = c.call as string;
  const device = Object.values(leaves)[0].device;
  const compare = (what: string, values: Float32Array) => {
    const want = c.expect[what];
    allClose(t, `${label} ${what}`, toGolden(call, values, want.tensor), area.floats(want.tensor), want);
  };
  const wanted = Object.keys(leaves).filter((name) => c.expect[`d_${name}`]);
  for (const name of wanted) requireGrad(leaves[name]);
  scope(() => {
    const y = forward();
    compare('y', y.floats());
    if (c.cotangent) backward(y, toOurs(call, c.cotangent as string, device));
  });
  for (const name of wanted) {
    scope(() => compare(`d_${name}`, (gradOf(leaves[name]) as Tensor).floats()));
    clearGrad(leaves[name]);
  }
}

function runOperation(t: Assert, c: GoldenCase, device: Device, run: Operation, label: string): void {
  const inputs = Object.entries(c.inputs as Record<string, string>);
  const heads = c.inputs?.q ? area.shape(c.inputs.q)[1] : 0;
  scope(() => {
    const leaves = Object.fromEntries(
      inputs.map(([name, stored]) => [name, toOurs(c.call as string, stored, device)]),
    );
    check(t, c, label, leaves, () => run(leaves, c.params as unknown as Params, heads));
  });
}

function runBlock(t: Assert, c: GoldenCase, device: Device, build: Block, label: string): void {
  const inputs = c.inputs as Record<string, string>;
  const [block, forward] = build(
    (name, axis) => area.shape(inputs[name])[axis],
    c.params as unknown as Params,
  );
  scope(() => {
    const parameters = namedParameters(block);
    const leaves: Inputs = {};
    for (const [name, stored] of Object.entries(inputs)) {
      const values = toOurs(c.call as string, stored, device);
      const parameter = parameters.get(name.replace(/^p\./, ''));
      if (parameter) parameter.tensor = keep(values);
      leaves[name] = values;
    }
    t.ok(
      [...parameters.values()].every((p) => p.loaded),
      `${label}: every parameter has its values`,
    );
    check(t, c, label, leaves, () => forward(leaves));
  });
  unload(block);
}

for (const device of devices) {
  test(`golden ops on ${device.name}`, (t) => {
    for (const c of area.cases) {
      const before = device.memory.storages;
      const call = c.call as string;
      if (operations[call]) for (const run of operations[call]) runOperation(t, c, device, run, c.id);
      else if (blocks[call]) runBlock(t, c, device, blocks[call], c.id);
      else if (call === 'mse mean') runMse(t, c, device);
      else if (call.startsWith('guidance')) runGuidance(t, c, device);
      else t.fail(`${c.id}: no test knows the call "${call}"`);
      t.equal(device.memory.storages, before, `${c.id}: live tensors`);
    }
    t.end();
  });
}

test('sums of elements show what is off as the elements would', (t) => {
  const of = [2, 3, 341];
  const exact = Float32Array.from({ length: 2 * 3 * 341 }, (_, i) => Math.sin(i));
  const want = folded(exact);
  t.equal(want.length, 512);
  const passes = (got: Float32Array) => {
    let passed = false;
    allClose({ ok: (value) => void (passed = Boolean(value)) }, '', got, want, { atol: 1e-3, rtol: 1, of });
    return passed;
  };
  const off = (by: (i: number) => number) => exact.map((x, i) => x + by(i));
  t.ok(passes(off((i) => 1e-4 * Math.sin(3 * i))), 'noise of a tenth of atol is none');
  const unseen = [...exact.keys()].filter((at) => passes(off((i) => (i === at ? 1.01e-3 : 0))));
  t.same(unseen, [], 'one element, wherever');
  t.notOk(passes(off(() => 1.01e-3)), 'all by the same');
  t.notOk(passes(off((i) => (i === 7 ? Number.NaN : 0))));
  t.notOk(passes(exact.subarray(1)), 'and their number counts');
  t.end();
});

/** The loss has a gradient for its prediction only; it is symmetric, so the target's is had by trading places. */
function runMse(t: Assert, c: GoldenCase, device: Device): void {
  const { d_x, d_target, ...y } = c.expect;
  runOperation(t, { ...c, expect: { ...y, d_x } }, device, (leaves) => mse(leaves.x, leaves.target), c.id);
  const traded: Operation = (leaves) => mse(leaves.target, leaves.x);
  runOperation(t, { ...c, expect: { ...y, d_target } }, device, traded, `${c.id} traded`);
}

function runGuidance(t: Assert, c: GoldenCase, device: Device): void {
  const { guidance_scale, guidance_rescale = 0 } = c.params as unknown as Params;
  const [uncond, text] = ['uncond', 'text'].map((name) => area.floats(c.inputs?.[name] as string));
  const [images, ...rest] = area.shape(c.expect.y.tensor);
  const got = scope(() => {
    const both = tensor(Float32Array.of(...uncond, ...text), [2 * images, ...rest], { device });
    const how = { guidanceScale: guidance_scale, withText: guidance_rescale > 0 };
    const data = guide(both, images, how).floats();
    return guidance_rescale > 0 ? rescaled(data, images, guidance_rescale) : data;
  });
  allClose(t, c.id, got, area.floats(c.expect.y.tensor), c.expect.y);
}
