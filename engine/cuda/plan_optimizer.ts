// Plans of the elementwise optimizer steps: all parameters in one launch. Each call becomes a row, its arguments packed as
// the kernel's struct; beside the rows lie the numbers of their first chunks.
import { type Layout, packRows, structLayout } from './manifest.ts';
import {
  divideUp,
  type KernelLaunch,
  type LaunchArgument,
  type LaunchArguments,
  type Plan,
  type PlanContext,
  walking,
} from './plan.ts';

const ROW_CHUNK = 8192; // optimizer.cuh
const FLOAT = 4;

type Calls = readonly LaunchArguments[];

/** Uploads rows and first chunks: the arguments that every kernel over rows takes, and how many chunks there are. */
function rowsOf(row: Layout, calls: Calls, context: PlanContext): { rows: LaunchArgument[]; chunks: number } {
  const countAt = row.parameters.findIndex(({ kind }) => kind === 'i');
  const firstChunk = new Int32Array(calls.length + 1);
  for (let i = 0; i < calls.length; i++)
    firstChunk[i + 1] = firstChunk[i] + divideUp(Number(calls[i][countAt]), ROW_CHUNK);
  const table = [
    context.upload(packRows(row, calls)),
    context.upload(new Uint8Array(firstChunk.buffer)),
    calls.length,
  ];
  return { rows: table, chunks: firstChunk[calls.length] };
}

/** A step of one launch; the first int of its signature counts the elements. */
function stepPlan(family: string, name: string, signature: string): [string, Plan] {
  const row = structLayout(signature);
  const together = (calls: Calls, context: PlanContext): KernelLaunch[] => {
    const { rows, chunks } = rowsOf(row, calls, context);
    return [walking(family, `${name}_rows`, chunks, 1, rows, context)];
  };
  return [`${name}_forward`, { signature, together, launches: (args, context) => together([args], context) }];
}

function sumSquares(signature: string): [string, Plan] {
  const row = structLayout(signature);
  const together = (calls: Calls, context: PlanContext): KernelLaunch[] => {
    const { rows, chunks } = rowsOf(row, calls, context);
    const partial = context.workspace(Math.max(chunks, 1) * FLOAT);
    return [
      walking('optimizer', 'sum_squares_partial', chunks, 1, [partial, ...rows], context),
      walking('optimizer', 'sum_squares_finish', calls.length, 1, [partial, ...rows], context),
    ];
  };
  return [
    'sum_squares_forward',
    { signature, together, launches: (args, context) => together([args], context) },
  ];
}

export const optimizerPlans: readonly (readonly [string, Plan])[] = [
  stepPlan('optimizer', 'adamw', 'pppppiffffffffiiii'),
  stepPlan('optimizer', 'lion', 'ppppifffffiiii'),
  stepPlan('optimizer', 'ema', 'ppif'),
  stepPlan('adamw_8bit', 'adamw_8bit', 'pppppppiffffffffiiii'),
  sumSquares('ppii'),
];
