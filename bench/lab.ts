// The history of attention's forward kernel as launches, slow to fast: kernels/lab/README.md. Each step takes what the plan of
// attention_forward takes, so tests and benchmarks drive all of them by the op's own samples.
import { TensorMapDataType, TensorMapSwizzle } from '../engine/cuda/api.ts';
import { labFolder, ptxFolder } from '../engine/cuda/kernels.ts';
import { divideUp, type KernelLaunch, type LaunchArguments, type PlanContext } from '../engine/cuda/plan.ts';
import { plans } from '../engine/cuda/plans.ts';

export interface LabStep {
  readonly name: string;
  /** Where the PTX of its families lies. */
  readonly folder: string;
  launches(args: LaunchArguments, context: PlanContext): KernelLaunch[];
}

const family = 'attention_steps_sm90';
const WARPGROUP = 128;
const HALF_TILE_BYTES = 64 * 64 * 2;

/** [y, lse, q, k, v, n, heads, lq, lk, d, causal, scale] of a call that is not causal, with heads 64 wide. */
function split(args: LaunchArguments) {
  const [n, heads, lq, lk, , , scale] = args.slice(5).map(Number);
  return { tensors: args.slice(0, 5) as readonly bigint[], n, heads, lq, lk, scale };
}

function threads(args: LaunchArguments): KernelLaunch[] {
  const { tensors, n, heads, lq, lk, scale } = split(args);
  return [
    {
      ...{ family, entry: 'lab_attention_threads', block: WARPGROUP, shared: 0 },
      grid: [divideUp(lq, WARPGROUP), n * heads, 1],
      args: [...tensors, heads, lq, lk, scale],
    },
  ];
}

function warpgroup(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const { tensors, n, heads, lq, lk, scale } = split(args);
  const [y, lse, q, k, v] = tensors;
  const map = (globalAddress: bigint, l: number, rows: number) =>
    context.tiledMap({
      dataType: TensorMapDataType.BFLOAT16,
      globalAddress,
      globalDim: [heads * 64, l, n],
      globalStrides: [heads * 128, l * heads * 128],
      elementStrides: [1, 1, 1],
      boxDim: [64, rows, 1],
      swizzle: TensorMapSwizzle.B128,
    });
  return [
    {
      ...{ family, entry: 'lab_attention_warpgroup', block: WARPGROUP, shared: 1024 + 6 * HALF_TILE_BYTES },
      grid: [divideUp(lq, 64), n * heads, 1],
      args: [map(q, lq, 64), map(k, lk, 128), map(v, lk, 128), map(y, lq, 16), lse, heads, lq, lk, scale],
    },
  ];
}

const shipped = (hopper: boolean) => (args: LaunchArguments, context: PlanContext) =>
  plans.get('attention_forward')?.launches(args, { ...context, hopper }) ?? [];

export const attentionSteps: readonly LabStep[] = [
  { name: 'a thread to a query', folder: labFolder, launches: threads },
  { name: 'mma.sync', folder: ptxFolder, launches: shipped(false) },
  { name: 'wgmma, one warpgroup', folder: labFolder, launches: warpgroup },
  { name: 'wgmma, three warpgroups', folder: ptxFolder, launches: shipped(true) },
];
