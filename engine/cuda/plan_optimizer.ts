// Plans of the elementwise optimizer steps: all parameters in one launch. Each call becomes a row, its arguments packed as
// the kernel's struct; beside the rows lie the numbers of their first chunks.
import { type Layout, packRows, structLayout } from './manifest.ts';
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArgument,
  type LaunchArguments,
  type Plan,
  type PlanContext,
  single,
  walking,
} from './plan.ts';

export const ROW_CHUNK = 8192; // optimizer.cuh

export type Calls = readonly LaunchArguments[];

/** Uploads rows and first chunks: the arguments that every kernel over rows takes, and how many chunks there are. */
export function rowsOf(
  row: Layout,
  calls: Calls,
  chunksOf: (args: LaunchArguments) => number,
  context: PlanContext,
): { rows: LaunchArgument[]; chunks: number } {
  const firstChunk = new Int32Array(calls.length + 1);
  for (let i = 0; i < calls.length; i++) firstChunk[i + 1] = firstChunk[i] + chunksOf(calls[i]);
  const table = [
    context.upload(packRows(row, calls)),
    context.upload(new Uint8Array(firstChunk.buffer)),
    calls.length,
  ];
  return { rows: table, chunks: firstChunk[calls.length] };
}

/** The plan of a symbol whose calls go together, one or many. */
export const updatePlan = (
  symbol: string,
  signature: string,
  together: (calls: Calls, context: PlanContext) => KernelLaunch[],
): [string, Plan] => [
  symbol,
  { signature, together, launches: (args, context) => together([args], context) },
];

/** Elements in chunks; the first int of a row counts them. */
function elementChunks(row: Layout): (args: LaunchArguments) => number {
  const countAt = row.parameters.findIndex(({ kind }) => kind === 'i');
  return (args) => divideUp(Number(args[countAt]), ROW_CHUNK);
}

/** A step of one launch. */
function stepPlan(family: string, name: string, signature: string): [string, Plan] {
  const row = structLayout(signature);
  const chunksOf = elementChunks(row);
  return updatePlan(`${name}_forward`, signature, (calls, context) => {
    const { rows, chunks } = rowsOf(row, calls, chunksOf, context);
    return [walking(family, `${name}_rows`, chunks, 1, rows, context)];
  });
}

/** A measure of each parameter: `sums` of it by chunks, then those of each row joined. */
function measurePlan(family: string, name: string, signature: string, sums: number): [string, Plan] {
  const row = structLayout(signature);
  const chunksOf = elementChunks(row);
  return updatePlan(`${name}_forward`, signature, (calls, context) => {
    const { rows, chunks } = rowsOf(row, calls, chunksOf, context);
    const partial = context.workspace(sums * chunks * FLOAT);
    return [
      walking(family, `${name}_partial`, chunks, 1, [partial, ...rows], context),
      walking(family, `${name}_finish`, sums * calls.length, 1, [partial, ...rows], context),
    ];
  });
}

export const optimizerPlans: readonly (readonly [string, Plan])[] = [
  stepPlan('optimizer', 'adamw', 'pppppiffffffffiiii'),
  stepPlan('optimizer', 'adamw_bf16_moments', 'pppppiffffffffiiii'),
  stepPlan('optimizer', 'lion', 'ppppifffffiiii'),
  stepPlan('optimizer', 'ema', 'ppif'),
  stepPlan('adamw_8bit', 'adamw_8bit', 'pppppppiffffffffiiii'),
  measurePlan('optimizer', 'sum_squares', 'ppii', 1),
  measurePlan('prodigy', 'prodigy_moments', 'ppppppppiiifffffff', 2),
  single('prodigy', 'prodigy_d_forward', () => 1, 1),
  stepPlan('prodigy', 'prodigy', 'pppppifffiiii'),
  stepPlan('schedule_free', 'schedule_free', 'pppppifffffffff'),
];
