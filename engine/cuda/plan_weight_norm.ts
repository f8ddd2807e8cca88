// Plans of weight_norm.cu. The gradient of the magnitude is a sum over rows by chunks, which a small launch joins in order.
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArguments,
  PACK,
  type Plan,
  type PlanContext,
  single,
  THREADS,
} from './plan.ts';

/** weight_norm.cu's. */
const [ROWS, COLUMNS, LANES] = [8, 64, 16];

/** Blocks in all where there are rows enough, some four to each multiprocessor of an H200: a constant, as the cut is. Not measured. */
const BLOCKS = 512;

function launch(entry: string, grid: [number, number, number], args: LaunchArguments): KernelLaunch {
  return { family: 'weight_norm', entry, grid, block: THREADS, shared: 0, args };
}

function rowNorms(args: LaunchArguments): KernelLaunch[] {
  return [launch('row_norms_forward', [divideUp(Number(args[4]), ROWS), 1, 1], args)];
}

function magnitudeGradient(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [dmagnitude, dy, x, norms] = args;
  const [rows, c] = args.slice(4).map(Number);
  const across = divideUp(c, COLUMNS);
  // Each lane of a block has four rows or more.
  const wanted = Math.max(1, Math.min(Math.floor(BLOCKS / across), divideUp(rows, 4 * LANES)));
  const length = divideUp(rows, wanted);
  const chunks = divideUp(rows, length);
  const partial = context.workspace(chunks * c * FLOAT);
  return [
    launch('weight_norm_partial', [across, chunks, 1], [partial, dy, x, rows, c, length]),
    launch('weight_norm_finish', [divideUp(c, THREADS), 1, 1], [dmagnitude, partial, norms, chunks, c]),
  ];
}

export const weightNormPlans: readonly (readonly [string, Plan])[] = [
  ['row_norms_forward', { launches: rowNorms }],
  single('weight_norm', 'weight_norm_forward', (args) => args[5] * divideUp(args[6], PACK), THREADS),
  ['weight_norm_backward', { signature: 'ppppii', launches: magnitudeGradient }],
];
