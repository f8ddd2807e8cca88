// Plans of Adafactor's step: the moments, the size of the update from its root mean square, then the weights.
import {
  divideUp,
  type KernelLaunch,
  type LaunchArgument,
  type LaunchArguments,
  PACK,
  type Plan,
  type PlanContext,
  THREADS,
  walking,
} from './plan.ts';

const SQUARES_CHUNK = 8192; // adafactor.cu
const FLOAT = 4;

/** Sums the squared updates (`squares` is the launch of it, without its output) and makes size[0] of them. */
function stepSize(
  [entry, args]: readonly [string, LaunchArguments],
  n: number,
  lr: LaunchArgument,
  threshold: LaunchArgument,
  context: PlanContext,
): { size: bigint; launches: KernelLaunch[] } {
  const chunks = divideUp(n, SQUARES_CHUNK);
  const partial = context.workspace(chunks * FLOAT);
  const size = context.workspace(FLOAT);
  const finish = [size, partial, chunks, n, lr, threshold];
  return {
    size,
    launches: [
      walking('adafactor', entry, chunks, 1, [partial, ...args], context),
      walking('adafactor', 'adafactor_size', 1, 1, finish, context),
    ],
  };
}

function matrix(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [weight, master, gradient, row, col] = args;
  const shape = args.slice(5, 9).map(Number);
  const [outer, rows, columns, inner] = shape;
  const [gradientScale, beta2, oneMinusBeta2, eps, lr, decay, threshold, ...rounding] = args.slice(9);
  const [width, n] = [columns * inner, outer * rows * columns * inner];
  // Rows are summed in chunks where one thread to a column would leave the device idle.
  const wanted = Math.max(1, Math.min(256, Math.floor(65536 / (outer * width)), Math.floor(rows / 16)));
  const length = divideUp(rows, wanted);
  const chunks = divideUp(rows, length);
  const partial = context.workspace(outer * chunks * width * FLOAT);
  const means = context.workspace(outer * inner * FLOAT);
  const walk = (entry: string, jobs: number, perBlock: number, given: LaunchArguments) =>
    walking('adafactor', entry, jobs, perBlock, given, context);
  const squares = [gradient, row, col, means, ...shape, gradientScale];
  const { size, launches } = stepSize(['adafactor_squares', squares], n, lr, threshold, context);
  return [
    walk('adafactor_rows', outer * rows * inner * (inner === 1 ? 32 : 1), THREADS, [
      ...[row, gradient, ...shape, gradientScale, beta2, oneMinusBeta2, eps],
    ]),
    walk('adafactor_columns_partial', outer * chunks * width, THREADS, [
      ...[partial, gradient, outer, rows, width, length, chunks, gradientScale, eps],
    ]),
    walk('adafactor_columns', outer * width, THREADS, [
      ...[col, partial, outer, rows, width, chunks, beta2, oneMinusBeta2],
    ]),
    walk('adafactor_means', outer * inner * 32, THREADS, [means, row, outer, rows, inner]),
    ...launches,
    walk('adafactor_apply', divideUp(n, PACK), THREADS, [
      ...[weight, master, gradient, row, col, means, size, ...shape, gradientScale, decay, ...rounding],
    ]),
  ];
}

function vector(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [weight, master, gradient, expAvgSq, count] = args;
  const [gradientScale, beta2, oneMinusBeta2, eps, lr, decay, threshold, ...rounding] = args.slice(5);
  const n = Number(count);
  const walk = (entry: string, given: LaunchArguments) =>
    walking('adafactor', entry, divideUp(n, PACK), THREADS, given, context);
  const squares = [gradient, expAvgSq, n, gradientScale];
  const { size, launches } = stepSize(['adafactor_vector_squares', squares], n, lr, threshold, context);
  return [
    walk('adafactor_vector_moments', [expAvgSq, gradient, n, gradientScale, beta2, oneMinusBeta2, eps]),
    ...launches,
    walk('adafactor_vector_apply', [
      ...[weight, master, gradient, expAvgSq, size, n, gradientScale, decay, ...rounding],
    ]),
  ];
}

export const adafactorPlans: readonly (readonly [string, Plan])[] = [
  ['adafactor_forward', { signature: 'pppppiiiifffffffiiii', launches: matrix }],
  ['adafactor_vector_forward', { signature: 'ppppifffffffiiii', launches: vector }],
];
