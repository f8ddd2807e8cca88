// What a pass is given by the host: numbers for tensors that are made on the device, by the names that the loss knows.
import type { DType } from '../../io/dtype.ts';

/** Numbers for a tensor that is yet to be made. */
export interface HostTensor {
  readonly shape: readonly number[];
  readonly values: Float32Array | Int32Array;
  readonly dtype: DType;
}

/** What a pass reads, by the names its loss knows. */
export type PassInputs = Readonly<Record<string, HostTensor>>;
