// Where the kernels' PTX lies: one file per family and storage type, `kernels/ptx/<family>_<dtype>.ptx`, loaded when first
// a kernel of it is launched.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { packageRoot } from '../cpu/build.ts';

export const storageTypes = ['float32', 'bfloat16', 'float16'] as const;
export const ptxFolder = join(packageRoot, 'kernels', 'ptx');
export const ptxName = (family: string, dtype: string): string => `${family}_${dtype}.ptx`;
export const readPtx = (family: string, dtype: string): string =>
  readFileSync(join(ptxFolder, ptxName(family, dtype)), 'utf8');
