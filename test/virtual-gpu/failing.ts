// A driver that fails when told: any GpuApi, with the n-th call of one kind from now returning an error in its place, once or
// from there on.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { CudaError, type CudaResult } from '../../engine/cuda/errors.ts';

export interface FailingGpu {
  readonly api: GpuApi;
  /** The `at`-th call from now (counted from 1) fails; with `always` all after it do too. */
  fail(call: keyof GpuApi, result: CudaResult, options?: { at?: number; always?: boolean }): void;
  /** Calls of one kind so far. */
  made(call: keyof GpuApi): number;
  /** Whether a failure that was asked for has come. */
  readonly failed: boolean;
  /** Fails no more. */
  heal(): void;
}

export function failingGpu(api: GpuApi): FailingGpu {
  let planned: { call: string; result: CudaResult; left: number; always: boolean } | undefined;
  let failed = false;
  const counts = new Map<string, number>();
  const wrap = (name: string, call: (...args: unknown[]) => unknown) => {
    return (...args: unknown[]): unknown => {
      counts.set(name, (counts.get(name) ?? 0) + 1);
      if (planned?.call === name && --planned.left <= 0 && (planned.left === 0 || planned.always)) {
        failed = true;
        throw new CudaError(planned.result, name);
      }
      return call(...args);
    };
  };
  return {
    api: Object.fromEntries(
      Object.entries(api).map(([name, call]) => [name, typeof call === 'function' ? wrap(name, call) : call]),
    ) as unknown as GpuApi,
    fail(call, result, { at = 1, always = false } = {}) {
      planned = { call, result, left: at, always };
      failed = false;
    },
    made: (call) => counts.get(call) ?? 0,
    get failed() {
      return failed;
    },
    heal() {
      planned = undefined;
    },
  };
}
