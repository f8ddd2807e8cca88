// Plans of 8-bit floats: a tensor's scale and its bytes, and linear layers over them. Hopper multiplies the bytes where TMA can
// walk them; other GPUs, and shapes it cannot walk, turn both operands back into the storage type first.
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
  walking,
} from './plan.ts';
import { GEGLU } from './plan_gemm.ts';
import { linearForward } from './plan_matrix.ts';
import { hopperLaunches } from './plan_matrix_sm90.ts';
import { bytesAlong, hopperTakes, isWalkable, STEP } from './plan_sm90.ts';

const SCALE_CHUNK = 8192; // fp8.cu

function scale([y, x, n]: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const chunks = divideUp(Number(n), SCALE_CHUNK);
  const partial = context.workspace(chunks * FLOAT);
  return [
    walking('fp8', 'fp8_scale_partial', chunks, 1, [partial, x, n], context),
    walking('fp8', 'fp8_scale_finish', 1, 1, [y, partial, chunks], context),
  ];
}

function linear(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  return onHopper(args, context) ?? throughStorage(args, context);
}

function onHopper(args: LaunchArguments, context: PlanContext): KernelLaunch[] | undefined {
  const [y, x, xScale, weight, weightScale, bias, residual] = args.slice(0, 7).map(BigInt);
  const [m, n, k, activation] = args.slice(7).map(Number);
  if (!hopperTakes(m, n, context) || k % 16 !== 0 || (x | weight) % 16n !== 0n || bias % 4n !== 0n)
    return undefined;
  const half = activation === GEGLU;
  const output = { address: y, rows: m, columns: n, stride: n };
  if (![output, { ...output, address: residual }].every(isWalkable)) return undefined;
  return hopperLaunches(
    {
      ...{ family: 'fp8_sm90', kind: half ? 'e4m3_geglu' : 'e4m3', m, n, steps: divideUp(k, 2 * STEP) },
      ...{ slabs: 1, y: output, bias, residual },
      a: bytesAlong({ address: x, rows: m, columns: k, stride: k }),
      b: bytesAlong({ address: weight, rows: half ? 2 * n : n, columns: k, stride: k }, 2),
      own: (tile) => [half ? 0 : activation, half ? n : tile.n / 2, xScale, weightScale],
    },
    { strides: [n, m * n], canSplit: !half, extras: [bias, 0n, residual], activation },
    context,
  );
}

function throughStorage(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, x, xScale, weight, weightScale, bias, residual] = args;
  const [m, n, k, activation] = args.slice(7).map(Number);
  const back = (bytes: bigint | number, factor: bigint | number, count: number) => {
    const values = context.workspace(count * context.elementBytes);
    const given = [values, bytes, factor, count];
    return { values, launch: walking('fp8', 'from_fp8', divideUp(count, PACK), THREADS, given, context) };
  };
  const left = back(x, xScale, m * k);
  const right = back(weight, weightScale, (activation === GEGLU ? 2 * n : n) * k);
  const product = [y, left.values, right.values, bias, residual, m, n, k, activation];
  return [left.launch, right.launch, ...linearForward(product, context)];
}

export const fp8Plans: readonly (readonly [string, Plan])[] = [
  ['fp8_scale_forward', { signature: 'ppi', launches: scale }],
  single('fp8', 'to_fp8_forward', (args) => divideUp(args[3], PACK), THREADS),
  ['linear_fp8_forward', { signature: 'pppppppiiii', launches: linear }],
];
