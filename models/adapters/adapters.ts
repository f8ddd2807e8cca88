// Adapters that train on a live model: LoRA (Hu et al. 2021), y = W x + alpha / rank * B (A x), and LoHa, LoKr and OFT (adapter_kinds.ts),
// y = W x + D x, whose difference D is formed at each call. It is not added to W: in bfloat16 most of it would be rounded away, so peft
// and LyCORIS take a product of its own, too. A DoRA (dora.ts) then scales the sum. A layer that is adapted is replaced in the module tree
// by one with more children, so its keys stay what they were and the adapter's are peft's (`...to_q.lora_A.weight`) or LyCORIS's
// (`...to_q.hada_w1_a`). lora/lora.ts merges adapters that are done.
import { checkpointed } from '../../engine/checkpointing.ts';
import { currentDrop, dropped } from '../../engine/dropout.ts';
import type { Conv2d, ConvOptions, Linear } from '../../engine/layers.ts';
import { type AnyModule, type Child, module, type Parameter } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import { conv2d } from '../../engine/ops/conv2d.ts';
import { type Activation, activate, linear } from '../../engine/ops/linear.ts';
import { upsampleNearest } from '../../engine/ops/move.ts';
import { scaled } from '../../engine/ops/unary.ts';
import { weightNorm } from '../../engine/ops/weight_norm.ts';
import { unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import { didYouMean, UserError } from '../../io/errors.ts';
import { type AdapterConfig, type Matrices, type Matrix, matricesFor, partsOf } from './adapter_kinds.ts';
import { adaptedLengths, beginMagnitude } from './dora.ts';

export interface AdaptersConfig extends AdapterConfig {
  /** Names of layers, or endings of their paths, as peft's target_modules: `to_q`, `to_out.0`, `conv1`. */
  targets: readonly string[];
}

/**
 * `count` numbers for a parameter, uniform in [0, 1) or standard normal: initialisation must be the same wherever a run begins.
 */
export type Numbers = (name: string, count: number, kind: 'uniform' | 'normal') => Float32Array;

/** What a layer was given. */
export interface Adapter extends Matrices {
  /** Of the layer. */
  path: string;
  /** Of its weight, as a checkpoint spells it. */
  weight: readonly number[];
}

/** Adapters' parameters by key. */
export const parametersOf = (adapters: readonly Adapter[]): Map<string, Parameter> =>
  new Map(
    adapters.flatMap((adapter) =>
      partsOf(adapter).map(({ key, parameter }) => [`${adapter.path}.${key}`, parameter] as const),
    ),
  );

interface Naming {
  /** What the targets are told by. */
  option?: string;
  /** What a layer's path has before it, where masks of dropout are asked for. */
  prefix?: string;
  /** Whether a layer that is named gets one, by its path. */
  isChosen?(path: string): boolean;
}

/**
 * Puts adapters on every layer of a loaded model that a target names. They change nothing at first, and are in the layer's type.
 * @throws UserError for a target that names no linear layer or convolution, with the `option` that it comes from
 */
export function addAdapters(
  root: AnyModule,
  config: AdaptersConfig,
  numbers: Numbers,
  { option = 'lora.targets', prefix = '', isChosen = () => true }: Naming = {},
): Adapter[] {
  const layers = layersOf(root);
  const matches = (path: string, target: string) => path === target || path.endsWith(`.${target}`);
  for (const target of config.targets) {
    if (layers.some(({ path }) => matches(path, target))) continue;
    const names = [...new Set(layers.map(({ path }) => path.split('.').pop() as string))];
    throw new UserError(
      `${option}: "${target}" names no linear layer or convolution of the model${didYouMean(target, names)}`,
    );
  }
  const chosen = layers.filter(
    ({ path }) => isChosen(path) && config.targets.some((target) => matches(path, target)),
  );
  return chosen.map(({ path, layer, replace }) => {
    const { shape: weight, place } = layer.children.weight;
    const adapter = { path, weight, ...matricesFor(weight, config) };
    for (const { key, parameter, start } of adapter.matrices)
      begin(parameter, start, place, (kind) => numbers(`${path}.${key}`, parameter.size, kind));
    beginMagnitude(adapter, layer.children.weight);
    replace(adapted(layer, adapter, prefix + path));
    return adapter;
  });
}

interface Place {
  path: string;
  layer: Linear | Conv2d;
  replace(by: AnyModule): void;
}

/** Every linear layer and convolution with its path and a way to put another in its place. */
export function layersOf(root: AnyModule): Place[] {
  const places: Place[] = [];
  const visit = (child: Child, path: string, replace: (by: AnyModule) => void): void => {
    if (typeof child === 'function') {
      if (isLayer(child)) places.push({ path, layer: child, replace });
      else eachIn(child.children as Record<string, Child>, path);
    } else if (Array.isArray(child)) eachIn(child as unknown as Record<string, Child>, path);
  };
  const eachIn = (children: Record<string, Child>, path: string) => {
    for (const [name, child] of Object.entries(children)) {
      visit(child, path ? `${path}.${name}` : name, (by) => {
        children[name] = by;
      });
    }
  };
  eachIn(root.children as Record<string, Child>, '');
  return places;
}

/** Linear layers and convolutions have a weight of two or four axes and a bias, or a place for one; tables have none. */
function isLayer(child: AnyModule): child is Linear | Conv2d {
  const { weight } = child.children as { weight?: Parameter };
  return 'bias' in child.children && weight !== undefined && weight.shape.length > 1;
}

const isConvolution = (layer: Linear | Conv2d): layer is Conv2d => layer.children.weight.layout === 'conv';

/** What an adapter adds to a layer's result: first what it makes of x alone, then the sum. */
type Plus = (x: Tensor, skip?: Tensor) => (y: Tensor) => Tensor;

/** What a layer takes besides x, and what it adds in the end. */
interface Options {
  skip?: Tensor;
  shift?: Tensor;
  residual?: Tensor;
}

/** What a layer makes of x with its adapter; `own` tells what it makes alone, with what it adds. */
type Run = (x: Tensor, own: () => Tensor, options: Options) => Tensor;

const adapted = (layer: Linear | Conv2d, adapter: Adapter, name: string): AnyModule =>
  isConvolution(layer)
    ? adaptConv(layer, adapter, runOf(layer, adapter, name, convolving(layer)))
    : adaptLinear(
        layer,
        adapter,
        runOf(layer, adapter, name, (x, w, { residual }) => linear(x, w, undefined, { residual })),
      );

function runOf({ children }: Linear | Conv2d, adapter: Adapter, name: string, through: Through): Run {
  const plus = plusOf(adapter, children.weight, name, through);
  const { magnitude } = adapter;
  if (!magnitude) return (x, own, { skip }) => plus(x, skip)(own());
  return (x, _, { skip, shift, residual }) => {
    const weight = children.weight.tensor;
    const sum = plus(x, skip)(through(x, weight, { skip }));
    const [length] = weight.shape;
    const y = weightNorm(
      sum,
      magnitude.parameter.tensor.reshape(length),
      adaptedLengths(weight, adapter),
      children.bias?.tensor,
    );
    const shifted = shift ? add(y, shift.reshape(shift.shape[0], 1, 1, length)) : y;
    return residual ? add(shifted, residual) : shifted;
  };
}

/** x through a weight of the layer's shape, or of its shape but for the outputs. */
type Through = (x: Tensor, weight: Tensor, options: { residual?: Tensor; skip?: Tensor }) => Tensor;

const convolving =
  ({ stride, padding }: Conv2d): Through =>
  (x, weight, options) =>
    conv2d(x, weight, undefined, { stride, padding, ...options });

function plusOf(adapter: Adapter, base: Parameter, name: string, through: Through): Plus {
  const { matrices, rank, alpha, weight } = adapter;
  const [down, up] = matrices;
  if (down.part !== 'lora_down') return plusDifference(adapter, base, name, through);
  return (x, skip) => {
    const inner = dropped(name, through(x, down.parameter.tensor, { skip }));
    const out = weight.length > 2 ? conv2d : linear;
    return (residual) => out(scaled(inner, alpha / rank), up.parameter.tensor, undefined, { residual });
  };
}

/** The tape keeps the difference, and makes again what it was made of. */
function plusDifference(
  { matrices, weight, difference }: Adapter,
  base: Parameter,
  name: string,
  through: Through,
): Plus {
  const [o, i, ...kernel] = weight;
  const parameters = Object.fromEntries(matrices.map(({ part, parameter }) => [part, parameter]));
  const made = checkpointed(
    module(parameters, (m) =>
      difference(
        Object.values(m).map(({ tensor }) => tensor),
        base,
      ).reshape(o, ...kernel, i),
    ),
  );
  return (x, skip) => {
    const delta = made();
    if (!currentDrop()) return (residual) => through(x, delta, { skip, residual });
    const kept = dropped(name, through(x, delta, { skip }));
    return (residual) => add(kept, residual);
  };
}

/** The children that a layer gets. peft nests a lone weight. */
const childrenOf = (adapter: Adapter): Record<string, Child> =>
  Object.fromEntries(
    partsOf(adapter).map(({ key, parameter }): [string, Child] => {
      const nested = /^(.*)\.weight$/.exec(key);
      return nested ? [nested[1], module({ weight: parameter }, () => undefined)] : [key, parameter];
    }),
  );

const adaptLinear = (base: Linear, adapter: Adapter, run: Run) =>
  module(
    { ...base.children, ...childrenOf(adapter) },
    (
      _,
      x: Tensor,
      { residual, activation = 'none' }: { residual?: Tensor; activation?: Activation } = {},
    ) => {
      if (activation === 'none') return run(x, () => base(x, { residual }), { residual });
      // An activation comes after the sum, so it cannot ride in the base layer's product.
      const y = activate(
        run(x, () => base(x), {}),
        activation,
      );
      return residual ? add(y, residual) : y;
    },
  );

const adaptConv = (base: Conv2d, adapter: Adapter, run: Run) =>
  module({ ...base.children, ...childrenOf(adapter) }, (_, x: Tensor, options: ConvOptions = {}) => {
    const [, h, w] = x.shape;
    const seen = options.doubled ? upsampleNearest(x, 2 * h, 2 * w) : x;
    return run(seen, () => base(x, options), options);
  });

/** Loads a new parameter. */
function begin(
  p: Parameter,
  start: Matrix['start'],
  options: Parameter['place'],
  numbers: (kind: 'uniform' | 'normal') => Float32Array,
): void {
  p.tensor = unscoped(() => {
    if (start === 'zeros') return zeros(p.memoryShape, options);
    if (start === 'ones')
      return tensor(new Float32Array(p.size).fill(1), p.memoryShape, { device: options.device });
    const fan = p.size / p.shape[0];
    const values =
      start === 'uniform'
        ? numbers('uniform').map((u) => (2 * u - 1) / Math.sqrt(fan))
        : numbers('normal').map((x) => start * x);
    return tensor(values, p.memoryShape, options);
  });
}
