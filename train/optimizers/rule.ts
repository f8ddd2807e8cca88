// What the optimizers share: state tensors per parameter, float32 masters or stochastic rounding for bfloat16 weights and state, and
// the loop over parameters. An optimizer itself is a rule: which tensors it keeps for a parameter, and one step on it, or on all.
import { holding } from '../../engine/memory.ts';
import type { Parameter } from '../../engine/module.ts';
import { type Update, update } from '../../engine/op.ts';
import { duplicate } from '../../engine/ops/move.ts';
import type { StepAttrs, StepInputs } from '../../engine/ops/optimizer.ts';
import { built, scope, unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import type { DType } from '../../io/dtype.ts';
import { streamOf } from '../data/draws.ts';
import { type Gradients, gradientsOf } from './clip.ts';

export type Slots = Record<string, Tensor>;

/** A tensor kept for a parameter, zero at the start; float32 unless it says otherwise. */
export interface Slot {
  shape: readonly number[];
  dtype?: DType;
}

export type StepContext = StepAttrs & { step: number };

interface Kept {
  /** What is kept for a parameter, by the names that torch or transformers give; 'weight' is a copy of what it was at the start. */
  slots(parameter: Parameter): Record<string, Slot | 'weight' | 'float32 weight'>;
  /**
   * The slot that has the model, where gradients are taken at other weights than it has. These are then made of the slots at each step,
   * so that they need no master.
   */
  readonly averages?: string;
}

export interface Rule extends Kept {
  /** Runs for each of thousands of parameters: where objects are joined, V8 takes 50 ns if the spread is last, 1.5 us if first. */
  step(tensors: StepInputs, slots: Slots, context: StepContext): Update;
}

/** A parameter that has a gradient, at a step. */
export interface Move {
  readonly tensors: StepInputs;
  readonly slots: Slots;
  readonly context: StepContext;
}

/** A rule by which a parameter's step hangs on all gradients together. */
export interface JointRule extends Kept {
  /** Numbers kept beside the slots, by name, as they are at the start. */
  readonly shared: Record<string, readonly number[]>;
  /** Moves the parameters, `lr` being the configured rate; returns the one that it finds, if it finds one. */
  stepAll(moves: readonly Move[], shared: Slots, lr: number): number | undefined;
}

export interface Stepped {
  /** Updates made so far. */
  made: number;
  /** The learning rate that the rule has found, where it finds one. */
  dlr?: number;
}

export interface Optimizer {
  /**
   * Every tensor that must be saved and loaded (uploaded into) to go on bit for bit: `step`, what a rule keeps for all parameters,
   * `<slot>.<parameter>` and, where there are masters, `master.<parameter>`. Where there are averages, these are saved as the weights,
   * and the weights here as `weight.<parameter>`.
   */
  readonly state: ReadonlyMap<string, Tensor>;
  /** By parameter, what is drawn with and saved, where that is not the weights themselves. */
  readonly averages?: ReadonlyMap<string, Tensor>;
  /** Updates every parameter that has a gradient. `gradientScale` multiplies all gradients first. */
  step(lr: number, gradientScale?: number): Stepped;
  /** Begins an update in which parameters move as their gradients are given. Not by a joint rule. */
  begin(lr: number, gradientScale?: number): { made: number; move(gradients: Gradients): void };
  /** The parameter's value at full precision: its float32 master where there is one. */
  weightOf(name: string): Tensor;
  release(): void;
}

export interface OptimizerOptions {
  weight_decay: number;
  /** For bfloat16 weights: round at random instead of keeping float32 masters. */
  stochastic_rounding: boolean;
  /** Keys the random bits of stochastic rounding. */
  seed: number;
  /** What a parameter's learning rate is multiplied by; 1 unless told. */
  lrFactor?: (name: string) => number;
}

/**
 * An optimizer over loaded parameters, by `rule`; each is moved on its own device. Their order is part of the rounding's key.
 */
export function optimize(
  parameters: ReadonlyMap<string, Parameter>,
  rule: Rule | JointRule,
  options: OptimizerOptions,
): Optimizer {
  return holding('optimizer', () => built(() => startOptimizer(parameters, rule, options)));
}

function startOptimizer(
  parameters: ReadonlyMap<string, Parameter>,
  rule: Rule | JointRule,
  { weight_decay, stochastic_rounding, seed, lrFactor = () => 1 }: OptimizerOptions,
): Optimizer {
  const [{ tensor: first }] = parameters.values();
  const counter = unscoped(() => zeros([1], { device: first.device, dtype: 'int32' }));
  const shared = sharedBy(rule, first);
  const items = [...parameters].map(([name, parameter]): Item => {
    const { master, slots } = keptFor(parameter, rule, stochastic_rounding);
    const kept = [master ?? parameter.tensor, ...Object.values(slots)];
    const rounds = kept.some(({ dtype }) => dtype === 'bfloat16');
    return { name, parameter, master, slots, rounds, factor: lrFactor(name) };
  });
  const { averages } = rule;
  const state = new Map([
    ['step', counter],
    ...Object.entries(shared),
    ...items.flatMap((item) => stateOf(item, averages)),
  ]);
  const begin = (lr: number, gradientScale = 1) => {
    const step = counter.floats()[0] + 1;
    counter.upload(new Uint8Array(Int32Array.of(step).buffer));
    const context = { lr, weightDecay: weight_decay, gradientScale, step };
    const move = (gradients: Gradients): number | undefined =>
      scope(() => {
        const moves = movesOf(items, gradients, context, seed);
        if ('stepAll' in rule) return rule.stepAll(moves, shared, lr);
        update(moves.map(({ tensors, slots, context }) => rule.step(tensors, slots, context)));
        return undefined;
      });
    return { made: step, move };
  };
  return {
    state,
    averages: averages ? new Map(items.map(({ name, slots }) => [name, slots[averages]])) : undefined,
    begin,
    step(lr, gradientScale) {
      const { made, move } = begin(lr, gradientScale);
      return { made, dlr: scope(() => move(gradientsOf(parameters))) };
    },
    weightOf(name) {
      const weight = state.get(`master.${name}`) ?? parameters.get(name)?.tensor;
      if (!weight) throw new Error(`the optimizer has no parameter ${name}`);
      return weight;
    },
    release() {
      const own = items.flatMap(({ master, slots }) => [
        ...(master ? [master] : []),
        ...Object.values(slots),
      ]);
      for (const t of [counter, ...Object.values(shared), ...own]) t.release();
    },
  };
}

/** What a rule keeps for all parameters, where the first one lies. */
const sharedBy = (rule: Rule | JointRule, { device }: Tensor): Slots =>
  Object.fromEntries(
    Object.entries('shared' in rule ? rule.shared : {}).map(([name, numbers]) => [
      name,
      unscoped(() => tensor(numbers, [numbers.length], { device })),
    ]),
  );

/** What is kept for a parameter, by the names of an optimizer's state. */
function stateOf({ name, parameter, master, slots }: Item, averages: string | undefined): [string, Tensor][] {
  const { [averages ?? '']: saved, ...own } = slots;
  const kept = { ...(saved && { weight: parameter.tensor }), ...(master && { master }), ...own };
  return Object.entries(kept).map(([slot, tensor]) => [`${slot}.${name}`, tensor]);
}

/** Of the parameters those that have a gradient. `lr` is that of one with no factor, and `seed` keys how each is rounded. */
function movesOf(
  items: readonly Item[],
  gradients: Gradients,
  { lr, weightDecay, gradientScale, step }: StepContext,
  seed: number,
): Move[] {
  return items.flatMap(({ name, parameter, master, slots, rounds, factor }, index): Move[] => {
    const gradient = gradients.get(name);
    if (!gradient) return [];
    const rounding = rounds ? streamOf(seed, step, index, 'rounding') : undefined;
    const context = { lr: lr * factor, weightDecay, gradientScale, step, rounding };
    return [{ tensors: { weight: parameter.tensor, gradient, master }, slots, context }];
  });
}

/** A parameter, and what is kept for it. */
interface Item {
  name: string;
  parameter: Parameter;
  master?: Tensor;
  slots: Slots;
  /** Whether a step rounds at random. */
  rounds: boolean;
  /** What its learning rate is multiplied by. */
  factor: number;
}

function keptFor(
  parameter: Parameter,
  rule: Rule | JointRule,
  stochastic_rounding: boolean,
): Pick<Item, 'master' | 'slots'> {
  const { tensor } = parameter;
  const needs = tensor.dtype !== 'float32' && !stochastic_rounding && !rule.averages;
  const master = needs ? copyOf(tensor, 'float32') : undefined;
  const slots: Slots = {};
  for (const [slot, kind] of Object.entries(rule.slots(parameter)))
    slots[slot] =
      typeof kind === 'string'
        ? copyOf(tensor, kind === 'weight' ? undefined : 'float32')
        : emptySlot(tensor, kind);
  return { master, slots };
}

const copyOf = (weight: Tensor, dtype?: DType): Tensor => unscoped(() => duplicate(weight, dtype));

const emptySlot = ({ device }: Tensor, { shape, dtype }: Slot): Tensor =>
  unscoped(() => zeros(shape, { device, dtype }));
