// Plans of Adafactor's step, all parameters together: the moments and what the updates' squares sum to, the size of each
// parameter's step from that, then the weights. Linear layers need their moments whole before the squares; convolutions and
// vectors do not, and go apart from them.
import { structLayout } from './manifest.ts';
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArguments,
  type Plan,
  type PlanContext,
  walking,
} from './plan.ts';
import { type Calls, ROW_CHUNK, rowsOf, updatePlan } from './plan_optimizer.ts';

const TILE = 256; // adafactor.cu

const signature = 'pppppiiiifffffffiiii';
const row = structLayout(signature);
/** Outer, rows, columns and inner of a row's matrices. */
const shapeOf = (args: LaunchArguments): number[] => args.slice(5, 9).map(Number);

/** Linear layers, by tiles: their rows' and columns' sums, and the factors that are made of these, take 2 KiB for each. */
function layers(calls: Calls, context: PlanContext): KernelLaunch[] {
  const tilesOf = (args: LaunchArguments): number => {
    const [, rows, columns] = shapeOf(args);
    return divideUp(rows, TILE) * divideUp(columns, TILE);
  };
  const { rows, chunks: tiles } = rowsOf(row, calls, tilesOf, context);
  const sums = context.workspace(tiles * 2 * TILE * FLOAT);
  const partial = context.workspace(tiles * FLOAT);
  const walk = (entry: string, jobs: number, ...first: bigint[]) =>
    walking('adafactor', `adafactor_${entry}`, jobs, 1, [...first, ...rows], context);
  return [
    walk('sums', tiles, sums),
    walk('factors', calls.length, sums),
    walk('squares', tiles, partial, sums),
    walk('size', calls.length, partial),
    walk('apply', tiles, partial, sums),
  ];
}

/** Convolutions and vectors, by pairs of channels. */
function taps(calls: Calls, context: PlanContext): KernelLaunch[] {
  const chunksOf = (args: LaunchArguments): number => {
    const [outer, , , inner] = shapeOf(args);
    return divideUp(outer * inner, ROW_CHUNK);
  };
  const { rows, chunks } = rowsOf(row, calls, chunksOf, context);
  const partial = context.workspace(chunks * FLOAT);
  const walk = (entry: string, jobs: number) =>
    walking('adafactor', `adafactor_${entry}`, jobs, 1, [partial, ...rows], context);
  return [walk('tap_moments', chunks), walk('size', calls.length), walk('tap_apply', chunks)];
}

function matrices(calls: Calls, context: PlanContext): KernelLaunch[] {
  const isLayer = (args: LaunchArguments): boolean => args[5] === 1 && args[8] === 1;
  const kinds = [calls.filter(isLayer), calls.filter((args) => !isLayer(args))];
  return kinds.flatMap((some, i) => (some.length === 0 ? [] : [layers, taps][i](some, context)));
}

/** A vector is matrices of one element, whose moments of rows and of columns are one. */
function vectors(calls: Calls, context: PlanContext): KernelLaunch[] {
  const rows = calls.map(([weight, master, gradient, expAvgSq, n, ...more]) => [
    ...[weight, master, gradient, expAvgSq, expAvgSq, 1, 1, 1, n, ...more],
  ]);
  return taps(rows, context);
}

export const adafactorPlans: readonly (readonly [string, Plan])[] = [
  updatePlan('adafactor_forward', signature, matrices),
  updatePlan('adafactor_vector_forward', 'ppppifffffffiiii', vectors),
];
