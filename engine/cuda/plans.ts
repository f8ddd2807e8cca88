// Every kernel symbol's plan, by its name without the storage type, and the launches that it makes of calls.
import { checkArguments } from '../signature.ts';
import { type KernelLaunch, type LaunchArguments, type Plan, type PlanContext, simplePlans } from './plan.ts';
import { adafactorPlans } from './plan_adafactor.ts';
import { attentionPlans } from './plan_attention.ts';
import { convolutionPlans } from './plan_conv2d.ts';
import { fp8Plans } from './plan_fp8.ts';
import { matrixPlans } from './plan_matrix.ts';
import { optimizerPlans } from './plan_optimizer.ts';
import { reducePlans } from './plan_reduce.ts';
import { weightNormPlans } from './plan_weight_norm.ts';

export const plans: ReadonlyMap<string, Plan> = new Map([
  ...simplePlans,
  ...reducePlans,
  ...matrixPlans,
  ...convolutionPlans,
  ...attentionPlans,
  ...adafactorPlans,
  ...optimizerPlans,
  ...fp8Plans,
  ...weightNormPlans,
]);

/** A symbol's plan, once arguments are checked against its signature. Throws where there is no such kernel. */
function planFor(op: string, args: LaunchArguments): Plan {
  const plan = plans.get(op);
  if (!plan) throw new Error(`the GPU has no kernel ${op}`);
  if (plan.signature !== undefined) checkArguments(op, plan.signature, args);
  return plan;
}

const hasWork = ({ grid }: KernelLaunch): boolean => !grid.includes(0);

/** The launches of a call. */
export const planned = (op: string, args: LaunchArguments, context: PlanContext): KernelLaunch[] =>
  planFor(op, args).launches(args, context).filter(hasWork);

/** The launches of independent calls: all together where the plan can, else each when the one before is queued. */
export function* plannedTogether(
  op: string,
  calls: readonly LaunchArguments[],
  context: PlanContext,
): Iterable<KernelLaunch> {
  const each = calls.map((args) => planFor(op, args));
  if (each[0]?.together) yield* each[0].together(calls, context).filter(hasWork);
  else for (const args of calls) yield* planned(op, args, context);
}
