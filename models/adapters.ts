// Low-rank adapters (Hu et al. 2021) that train on a live model: y = W x + alpha / rank * B (A x). A layer that is adapted
// is replaced in the module tree by one with two more children, so its keys stay what they were and the adapter's are peft's
// (`...to_q.lora_A.weight`). lora.ts merges adapters that are done.
import type { Conv2d, ConvOptions, Linear } from '../engine/layers.ts';
import { type AnyModule, type Child, module, type Parameter, parameter } from '../engine/module.ts';
import { add } from '../engine/ops/binary.ts';
import { conv2d } from '../engine/ops/conv2d.ts';
import { type Activation, activate, linear } from '../engine/ops/linear.ts';
import { upsampleNearest } from '../engine/ops/move.ts';
import { scale } from '../engine/ops/unary.ts';
import { unscoped } from '../engine/scope.ts';
import { type Tensor, tensor, zeros } from '../engine/tensor.ts';
import { didYouMean, UserError } from '../io/errors.ts';

export interface LoraConfig extends LoraSizes {
  /** Names of layers, or endings of their paths, as peft's target_modules: `to_q`, `to_out.0`, `conv1`. */
  targets: readonly string[];
}

/** Ranks and alphas as kohya and LyCORIS divide them. */
export interface LoraSizes {
  /** Of linear layers and 1x1 convolutions. */
  rank: number;
  alpha: number;
  /** Of convolutions with a larger kernel; 0 for those above. */
  conv_rank?: number;
  conv_alpha?: number;
}

/** Whether a weight of that shape is a convolution's that `conv_rank` is of. */
export const isLarge = ([, , kh = 1, kw = 1]: readonly number[]): boolean => kh * kw > 1;

/** The rank and alpha of a layer whose weight has that shape. */
export function sizesFor(shape: readonly number[], sizes: LoraSizes): { rank: number; alpha: number } {
  const { rank, alpha, conv_rank, conv_alpha } = sizes;
  return isLarge(shape) ? { rank: conv_rank || rank, alpha: conv_alpha || alpha } : { rank, alpha };
}

/** Uniform numbers in [0, 1) for a parameter: initialisation must be the same wherever a run begins. */
export type Uniforms = (name: string, count: number) => Float32Array;

/**
 * Puts adapters on every layer of a loaded model that a target names, and returns their parameters by key. A starts as
 * peft's (Kaiming uniform: within 1 / sqrt(inputs)), B at zero, both in the layer's type.
 * @throws UserError for a target that names no linear layer or convolution, with the `option` that it comes from
 */
export function addLora(
  root: AnyModule,
  config: LoraConfig,
  uniforms: Uniforms,
  option = 'lora.targets',
): Map<string, Parameter> {
  const layers = layersOf(root);
  const added = new Map<string, Parameter>();
  const matches = (path: string, target: string) => path === target || path.endsWith(`.${target}`);
  for (const target of config.targets) {
    if (layers.some(({ path }) => matches(path, target))) continue;
    const names = [...new Set(layers.map(({ path }) => path.split('.').pop() as string))];
    throw new UserError(
      `${option}: "${target}" names no linear layer or convolution of the model${didYouMean(target, names)}`,
    );
  }
  for (const { path, layer, replace } of layers) {
    if (!config.targets.some((target) => matches(path, target))) continue;
    const sizes = sizesFor(layer.children.weight.shape, config);
    const adapted = isConvolution(layer) ? adaptConv(layer, sizes) : adaptLinear(layer, sizes);
    const { lora_A: down, lora_B: up } = adapted.children;
    start(down.children.weight, layer.children.weight.place, (count, fan) =>
      uniforms(`${path}.lora_A.weight`, count).map((u) => (2 * u - 1) / Math.sqrt(fan)),
    );
    start(up.children.weight, layer.children.weight.place);
    replace(adapted);
    added.set(`${path}.lora_A.weight`, down.children.weight);
    added.set(`${path}.lora_B.weight`, up.children.weight);
  }
  return added;
}

interface Place {
  path: string;
  layer: Linear | Conv2d;
  replace(by: AnyModule): void;
}

/** Every linear layer and convolution with its path and a way to put another in its place. */
function layersOf(root: AnyModule): Place[] {
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

/** Spares the two launches of a factor of 1, which every adapter has where alpha is the rank. */
const scaled = (x: Tensor, factor: number): Tensor => (factor === 1 ? x : scale(x, factor));

/** A lone weight, as peft nests it. */
const weightOnly = (shape: readonly number[], layout: 'plain' | 'conv' = 'plain') =>
  module({ weight: parameter(shape, layout) }, () => undefined);

function adaptLinear(base: Linear, { rank, alpha }: LoraSizes) {
  const [outputs, inputs] = base.children.weight.shape;
  return module(
    {
      ...base.children,
      lora_A: weightOnly([rank, inputs]),
      lora_B: weightOnly([outputs, rank]),
    },
    (
      m,
      x: Tensor,
      { residual, activation = 'none' }: { residual?: Tensor; activation?: Activation } = {},
    ) => {
      const down = scaled(linear(x, m.lora_A.children.weight.tensor), alpha / rank);
      const up = (y: Tensor) => linear(down, m.lora_B.children.weight.tensor, undefined, { residual: y });
      if (activation === 'none') return up(base(x, { residual }));
      // An activation comes after the sum, so it cannot ride in the base layer's product.
      const y = activate(up(base(x)), activation);
      return residual ? add(y, residual) : y;
    },
  );
}

/** A's convolution has the base's kernel, stride and padding; B's is 1x1. */
function adaptConv(base: Conv2d, { rank, alpha }: LoraSizes) {
  const [outputs, inputs, kh, kw] = base.children.weight.shape;
  return module(
    {
      ...base.children,
      lora_A: weightOnly([rank, inputs, kh, kw], 'conv'),
      lora_B: weightOnly([outputs, rank, 1, 1], 'conv'),
    },
    (m, x: Tensor, options: ConvOptions = {}) => {
      const { stride, padding } = base;
      const [, h, w] = x.shape;
      const seen = options.doubled ? upsampleNearest(x, 2 * h, 2 * w) : x;
      const { skip } = options;
      const down = conv2d(seen, m.lora_A.children.weight.tensor, undefined, { stride, padding, skip });
      const residual = base(x, options);
      return conv2d(scaled(down, alpha / rank), m.lora_B.children.weight.tensor, undefined, { residual });
    },
  );
}

/** Loads a new parameter with what `values` makes of its size and its number of inputs, or with zeros. */
function start(
  p: Parameter,
  options: Parameter['place'],
  values?: (count: number, fan: number) => Float32Array,
): void {
  p.tensor = unscoped(() =>
    values
      ? tensor(values(p.size, p.size / p.shape[0]), p.memoryShape, options)
      : zeros(p.memoryShape, options),
  );
}
