// Every kernel symbol's plan, by its name without the storage type.
import { type Plan, simplePlans } from './plan.ts';
import { adafactorPlans } from './plan_adafactor.ts';
import { attentionPlans } from './plan_attention.ts';
import { convolutionPlans } from './plan_conv2d.ts';
import { fp8Plans } from './plan_fp8.ts';
import { matrixPlans } from './plan_matrix.ts';
import { optimizerPlans } from './plan_optimizer.ts';
import { reducePlans } from './plan_reduce.ts';

export const plans: ReadonlyMap<string, Plan> = new Map([
  ...simplePlans,
  ...reducePlans,
  ...matrixPlans,
  ...convolutionPlans,
  ...attentionPlans,
  ...adafactorPlans,
  ...optimizerPlans,
  ...fp8Plans,
]);
