// Learning rates by update, with the names and formulas of diffusers' get_scheduler. A schedule is a function of the
// update's number alone, so resuming needs no state.
import { UserError } from '../../io/errors.ts';

export interface LrSchedule {
  name:
    | 'constant'
    | 'constant_with_warmup'
    | 'linear'
    | 'cosine'
    | 'cosine_with_restarts'
    | 'polynomial'
    | 'piecewise_constant';
  /** Updates over which the rate rises from 0, or below 1 that share of all; `constant` and `piecewise_constant` have no warm-up. */
  warmup_steps: number;
  /** Hard restarts of cosine_with_restarts. */
  num_cycles: number;
  /** Exponent of polynomial. */
  power: number;
  /** piecewise_constant: "1:10,0.1:20,0.01" is the rate for 10 updates, a tenth of it up to 20, then a hundredth. */
  step_rules: string;
}

/** Where polynomial ends. */
const LR_END = 1e-7;

/**
 * The learning rate of update `step` (counted from 0) of `total`, `lr` being the configured one.
 * @throws UserError for rules that cannot be read, and for a rate that would rise to where polynomial ends
 */
export function learningRate(schedule: LrSchedule, lr: number, step: number, total: number): number {
  const { name, warmup_steps, num_cycles, power } = schedule;
  const warmup = warmup_steps < 1 ? Math.floor(warmup_steps * total) : warmup_steps;
  if (name === 'constant') return lr;
  if (name === 'piecewise_constant') return lr * piecewise(schedule.step_rules, step);
  if (name === 'polynomial' && lr <= LR_END)
    throw new UserError(
      `lr_scheduler.name "polynomial" ends at a rate of ${LR_END}, and optimizer.lr ${lr} is not above it; raise optimizer.lr, or take another schedule such as "linear"`,
    );
  if (step < warmup) return (lr * step) / Math.max(1, warmup);
  const progress = (step - warmup) / Math.max(1, total - warmup);
  const cosine = (turns: number) => lr * Math.max(0, 0.5 * (1 + Math.cos(Math.PI * turns)));
  if (name === 'linear') return lr * Math.max(0, 1 - progress);
  if (name === 'cosine') return cosine(progress);
  if (name === 'cosine_with_restarts') return progress >= 1 ? 0 : cosine((num_cycles * progress) % 1);
  if (name === 'polynomial') return step > total ? LR_END : (lr - LR_END) * (1 - progress) ** power + LR_END;
  return lr;
}

/** The factor that `rules` give at `step`. @throws UserError when they cannot be read */
function piecewise(rules: string, step: number): number {
  const complain = () =>
    new UserError(
      `lr_scheduler.step_rules is "${rules}"; write factor:steps pairs and a last factor, as in "1:10,0.1:20,0.01"`,
    );
  const parts = rules
    .split(',')
    .map((rule) => rule.split(':').map((word) => Number(word.trim() || Number.NaN)));
  const last = parts.pop();
  if (last?.length !== 1 || parts.some((rule) => rule.length !== 2)) throw complain();
  if ([...parts.flat(), ...last].some((value) => !Number.isFinite(value))) throw complain();
  const current = parts.sort(([, a], [, b]) => a - b).find(([, until]) => step < until);
  return current ? current[0] : last[0];
}
