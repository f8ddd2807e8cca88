// One layer with an adapter, as test/golden/lycoris.py has it: what it computes and what its gradients are, beside what was recorded.
import type { Device } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { conv2d, linear } from '../../engine/layers.ts';
import { module, type Parameter, unload } from '../../engine/module.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import { type AdapterConfig, type Part, partsOf } from '../../models/adapters/adapter_kinds.ts';
import { type Adapter, addAdapters, parametersOf } from '../../models/adapters/adapters.ts';
import { toMemoryLayout, toStoredLayout } from '../../models/checkpoint/weights.ts';
import { createOptimizer } from '../../train/optimizers/create.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { type Assert, maxDifference } from './golden.ts';

type Shape = readonly number[];

export interface LayerCase extends AdapterConfig {
  by: string;
  weight: Shape;
  x: Shape;
  stride?: number;
  padding?: number;
  network_dropout?: number;
  rank_dropout?: number;
  shapes: [name: string, shape: number[]][];
  y: string;
  dx: string;
  gradients: string[];
}

export interface SteppedCase extends LayerCase {
  /** All that is trained, after five steps. */
  after: string[];
}

/** Number i of the k-th tensor. */
export const numbers = (shape: Shape, k: number): Float32Array =>
  Float32Array.from({ length: sizeOf(shape) }, (_, i) => (((37 * i + 11 * k) % 101) - 50) / 64);

/** float32 in base64. */
export const unpacked = (text: string): Float32Array =>
  new Float32Array(new Uint8Array(Buffer.from(text, 'base64')).buffer);

const turned = (turn: typeof toMemoryLayout, values: Float32Array, shape: Shape): Float32Array =>
  shape.length === 4 ? new Float32Array(turn(new Uint8Array(values.buffer), shape, 4).buffer) : values;

/** Numbers in torch's order as they lie here, and back. */
export const toMemory = (values: Float32Array, shape: Shape) => turned(toMemoryLayout, values, shape);
export const fromMemory = (values: Float32Array, shape: Shape) => turned(toStoredLayout, values, shape);

const memoryShape = (shape: Shape): number[] => {
  const [n, c, h, w] = shape;
  return shape.length === 4 ? [n, h, w, c] : [...shape];
};

export const fill = (p: Parameter, values: Float32Array): void => {
  p.tensor.set(p.layout === 'conv' ? toMemory(values, p.shape) : values);
};

/** Of an adapter's k-th tensor; lengths are positive. */
const numbersOf = ({ part, parameter: { shape } }: Part, k: number): Float32Array =>
  part === 'lora_magnitude_vector' ? numbers(shape, 4 + k).map((x) => 1 + x / 2) : numbers(shape, 4 + k);

/** The case's layer with its adapter, loaded with the formula's numbers and ready to train; and what a magnitude had begun as. */
export function adaptedLayer(golden: LayerCase, device: Device) {
  const { weight, stride, padding } = golden;
  const [o, i, kernel] = weight;
  const root = module(
    { layer: kernel ? conv2d(i, o, kernel, { stride, padding }) : linear(i, o) },
    (m, x: Tensor) => m.layer(x),
  );
  const { layer } = root.children;
  for (const p of [layer.children.weight, layer.children.bias as Parameter])
    p.tensor = unscoped(() => tensor(new Float32Array(p.size), p.memoryShape, { device }));
  fill(layer.children.weight, numbers(weight, 0));
  fill(layer.children.bias as Parameter, numbers([o], 1));
  const [adapter] = addAdapters(root, { ...golden, targets: ['layer'] }, (_, n) => new Float32Array(n));
  const begun = adapter.magnitude?.parameter.tensor.floats();
  for (const [k, part] of partsOf(adapter).entries()) {
    fill(part.parameter, numbersOf(part, k));
    requireGrad(part.parameter.tensor);
  }
  return { root, adapter, begun };
}

/** Runs the layer there and back and holds it against the case; y's shape is told by the case's numbers. */
export function checkLayer(t: Assert, golden: LayerCase, device: Device, run = runOf): void {
  const what = `${golden.by}, ${golden.algo} [${golden.weight}] on ${device.name}`;
  const { root, adapter } = adaptedLayer(golden, device);
  const close = (label: string, got: Float32Array, text: string) => {
    const want = unpacked(text);
    const most = Math.max(...want.map(Math.abs));
    t.ok(got.length === want.length && maxDifference(got, want) < 2e-6 * most, `${what}: ${label}`);
  };
  scope(() => {
    const x = requireGrad(
      tensor(toMemory(numbers(golden.x, 2), golden.x), memoryShape(golden.x), { device }),
    );
    const y = run(golden, root, x);
    const [n, h, w, c] = y.shape;
    const shape = golden.x.length === 4 ? [n, c, h, w] : y.shape;
    close('y', fromMemory(y.floats(), shape), golden.y);
    backward(y, tensor(toMemory(numbers(shape, 3), shape), y.shape, { device }));
    close('dx', fromMemory((gradOf(x) as Tensor).floats(), golden.x), golden.dx);
    for (const [k, { part, parameter }] of partsOf(adapter).entries()) {
      const gradient = (gradOf(parameter.tensor) as Tensor).floats();
      const own = parameter.layout === 'conv' ? fromMemory(gradient, parameter.shape) : gradient;
      close(`the gradient of ${part}`, own, golden.gradients[k]);
    }
    clearGrad(x);
  });
  release(root, adapter);
}

/** Five steps of AdamW from there on, with decay, held against the case's. */
export function checkSteps(t: Assert, golden: SteppedCase, device: Device): void {
  const { root, adapter } = adaptedLayer(golden, device);
  const settings = resolveRun({ optimizer: { weight_decay: 0.1 } }, 'test', 'test');
  const optimizer = createOptimizer(parametersOf([adapter]), settings.optimizer, 1);
  for (let step = 0; step < 5; step++) {
    scope(() => {
      const x = tensor(toMemory(numbers(golden.x, 2), golden.x), memoryShape(golden.x), { device });
      const y = root(x);
      const [n, h, w, c] = y.shape;
      const shape = golden.x.length === 4 ? [n, c, h, w] : y.shape;
      backward(y, tensor(toMemory(numbers(shape, 3), shape), y.shape, { device }));
    });
    optimizer.step(0.01);
    for (const { parameter } of partsOf(adapter)) parameter.tensor.node?.grad?.clear();
  }
  for (const [k, { part, parameter }] of partsOf(adapter).entries()) {
    const own = parameter.tensor.floats();
    const got = parameter.layout === 'conv' ? fromMemory(own, parameter.shape) : own;
    const most = maxDifference(got, unpacked(golden.after[k]));
    t.ok(most < 2e-6, `${golden.algo} [${golden.weight}] on ${device.name}: ${part}, ${most}`);
  }
  optimizer.release();
  release(root, adapter);
}

const runOf = (_: LayerCase, root: ReturnType<typeof adaptedLayer>['root'], x: Tensor): Tensor => root(x);

export function release(root: ReturnType<typeof adaptedLayer>['root'], adapter: Adapter): void {
  for (const { parameter } of partsOf(adapter)) clearGrad(parameter.tensor);
  unload(root);
}
