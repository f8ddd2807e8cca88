// Float32's products on Hopper, whose tensor cores have no such type: x is split into hi = bf16(x) and lo = bf16(x - hi), and
// lo hi + hi lo + hi hi is summed in float32 (Henry, Tang & Heinecke 2019; torch calls it the precision "high"). What is left
// out of a product is some 2^-17 of it; tf32, torch's own choice for convolutions, leaves out 2^-11. One launch (gemm_split)
// writes an operand's halves to a workspace as large as the operand. Weights are split anew each time: for the VAE's that is
// 0.4 GB to move beside 18 GB for its images. Whether it pays is reasoned from rates measured with other kernels.
import { divideUp, type KernelLaunch, PACK, type PlanContext, THREADS, walking } from './plan.ts';
import { chooseHopper, cycles, type ProductSize, type Slabs, STEP } from './plan_sm90.ts';

/** Products of halves that count. */
const PASSES = 3;
/** Multiply-adds in a cycle of a multiprocessor by fma: an H200's, where the VAE ran at 27 TFLOP/s. */
const FMA = 58;
/** Bytes in one to and from memory, and cycles for a launch more. */
const MEMORY = 16;
const LAUNCH = 3500;

/** Steps along k, which is walked in each pass. */
export const splitSteps = (steps: number): number => PASSES * steps;

/** Whether a product of k numbers is faster so than by fma, whose tiles are 64 x 64, with operands of so many elements in all. */
export function splitPays(size: ProductSize, k: number, elements: number, context: PlanContext): boolean {
  const { hopper, multiprocessors } = context;
  const { m, n, slabs } = size;
  if (!hopper || m < STEP) return false;
  const splitting = 2 * LAUNCH + (8 * elements) / (MEMORY * multiprocessors);
  const products = cycles(size, chooseHopper(size, slabs === 1, multiprocessors), multiprocessors);
  const byFma = (STEP * divideUp(m, STEP) * STEP * divideUp(n, STEP) * k * slabs) / (FMA * multiprocessors);
  return splitting + products < byFma;
}

/** Where the halves of each of `rows` rows will lie, hi and then lo, and the launch that writes them. */
export function split(
  address: bigint,
  rows: number,
  inner: number,
  context: PlanContext,
): { address: bigint; launch: KernelLaunch } {
  const halves = context.workspace(4 * rows * inner);
  const args = [halves, address, rows, inner];
  const launch = walking('gemm', 'gemm_split', divideUp(rows * inner, PACK), THREADS, args, context);
  return { address: halves, launch };
}

/** A matrix, or a batch of them, without gaps between its rows. */
export const isDense = ({ rows, columns, stride, slabs = 1, slabStride }: Slabs): boolean =>
  stride === columns && (slabs === 1 || slabStride === rows * columns);

/** Halves that several products of a plan have in common, by address and size, and the context that they outlive a turn in. */
export interface Halves {
  readonly context: PlanContext;
  readonly known: Map<string, bigint>;
}

/** The halves of a dense tensor, as twice as many slabs, and the launch that writes them unless `halves` has them. */
export function splitSlabs(
  tensor: Slabs,
  context: PlanContext,
  halves?: Halves,
): { tensor: Slabs; launches: KernelLaunch[] } {
  const { rows, columns, slabs = 1 } = tensor;
  const inner = slabs * rows * columns;
  const doubled = (address: bigint) => ({ ...tensor, address, slabs: 2 * slabs, slabStride: rows * columns });
  const key = `${tensor.address} ${inner}`;
  const known = halves?.known.get(key);
  if (known !== undefined) return { tensor: doubled(known), launches: [] };
  const { address, launch } = split(tensor.address, 1, inner, halves?.context ?? context);
  halves?.known.set(key, address);
  return { tensor: doubled(address), launches: [launch] };
}
