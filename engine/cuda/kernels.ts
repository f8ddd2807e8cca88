// Where the kernels' PTX lies, packed with Brotli: one file per family and storage type, `kernels/ptx/<family>_<dtype>.ptx.br`,
// loaded when first a kernel of it is launched. A family whose name ends in _sm90 is for Hopper alone (compute capability 9.0): it
// uses instructions that no other GPU has, and comes in the half types; matrix products also in float32, as sums of bfloat16. Random
// numbers come in float32 alone.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { brotliDecompressSync } from 'node:zlib';
import { packageRoot } from '../../io/package_root.ts';

export const storageTypes = ['float32', 'bfloat16', 'float16'] as const;
export const ptxFolder = join(packageRoot, 'kernels', 'ptx');
/** The history of the hard kernels, sources and PTX: kernels/lab/README.md. */
export const labFolder = join(packageRoot, 'kernels', 'lab');
export const ptxName = (family: string, dtype: string): string => `${family}_${dtype}.ptx.br`;
export const readPtx = (family: string, dtype: string, folder = ptxFolder): string =>
  brotliDecompressSync(readFileSync(join(folder, ptxName(family, dtype)))).toString('latin1');

export const forHopper = (family: string): boolean => family.endsWith('_sm90');
const splitFloat32 = ['conv2d_sm90', 'gemm_sm90'];
export function typesOf(family: string): readonly string[] {
  if (family === 'random') return storageTypes.slice(0, 1);
  return forHopper(family) && !splitFloat32.includes(family) ? storageTypes.slice(1) : storageTypes;
}
