// The optimizers by the names a run file gives them.
import type { Parameter } from '../../engine/module.ts';
import { adafactor } from './adafactor.ts';
import { adamw } from './adamw.ts';
import { adamw8bit } from './adamw_8bit.ts';
import { lion } from './lion.ts';
import { type ProdigyOptions, prodigy } from './prodigy.ts';
import { type JointRule, type Optimizer, optimize, type Rule } from './rule.ts';
import { type ScheduleFreeOptions, scheduleFree } from './schedule_free.ts';

export interface OptimizerSettings extends ProdigyOptions, ScheduleFreeOptions {
  name: 'adamw' | 'adafactor' | 'adamw8bit' | 'adamw_schedule_free' | 'lion' | 'prodigy';
  betas: readonly [number, number];
  eps: number;
  /** What AdamW's moments are kept in; bfloat16 ones are rounded up or down at random. */
  moments_dtype: 'float32' | 'bfloat16';
  weight_decay: number;
  /** Adafactor's bound on the root mean square of an update. */
  clip_threshold: number;
  /** Adafactor's exponent of the second moment's decay. */
  decay_rate: number;
  /** Round bfloat16 weights up or down at random instead of keeping float32 masters. */
  stochastic_rounding: boolean;
}

const rules: Record<OptimizerSettings['name'], (settings: OptimizerSettings) => Rule | JointRule> = {
  adamw,
  adafactor,
  adamw8bit,
  adamw_schedule_free: scheduleFree,
  lion,
  prodigy,
};

/** An optimizer over loaded parameters; `seed` keys stochastic rounding, and a parameter's learning rate has its factor. */
export const createOptimizer = (
  parameters: ReadonlyMap<string, Parameter>,
  settings: OptimizerSettings,
  seed: number,
  lrFactor?: (name: string) => number,
): Optimizer =>
  optimize(parameters, rules[settings.name](settings), {
    weight_decay: settings.weight_decay,
    stochastic_rounding: settings.stochastic_rounding,
    seed,
    lrFactor,
  });
