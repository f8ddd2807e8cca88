import type { Outcome, WarpCall } from './warp_ops.ts';

export function mbarrier({ i }: WarpCall): Outcome {
  throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
}
