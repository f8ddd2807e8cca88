// DeepCache (Ma et al. 2023): what a UNet's deep layers give changes little from one step to the next, so in every `cache_interval`-th
// call all of it runs, and in the calls between only the layers around the skip connections up to `cache_branch_id`, with what the
// deeper ones gave last. Names, counting from the first call, and what is cut are DeepCacheSDHelper's (skip_mode "uniform"). It knows a
// call by its timestep, where samplers of second order repeat one; here each call counts.
import { update } from '../../engine/op.ts';
import { copy } from '../../engine/ops/move.ts';
import { keep } from '../../engine/scope.ts';
import { empty, type Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { DeepFeature } from './unet.ts';
import { type EncoderConfig, featureWidths } from './unet_encoder.ts';

/** The part of a request that says how much of the UNet runs. */
export interface CacheRequest {
  /** In every so many calls all of the UNet runs in the first; 1, always, where absent. */
  cache_interval?: number;
  /**
   * The last skip connection that the other calls use, 0 to 8 for SDXL's base and 0 to 11 for its refiner; 0, the first convolution's, where
   * absent. Each has a layer more on the way down and one on the way up.
   */
  cache_branch_id?: number;
}

export interface Caching {
  interval: number;
  branch: number;
}

/** What a request comes to for a UNet. @throws UserError for a branch that it has not */
export function cachingOf(
  { cache_interval: interval = 1, cache_branch_id: branch = 0 }: CacheRequest,
  config: EncoderConfig,
): Caching {
  const last = featureWidths(config).length - 1;
  if (branch > last)
    throw new UserError(
      `cache_branch_id (--cache-branch-id) is ${branch}, and this UNet's branches are 0 to ${last}: give one of them`,
    );
  return { interval, branch };
}

/** The deep feature of whole calls, for the shallow calls after them. Its memory is no recording's, so that a recording may read it. */
export function deepCache(branch: number) {
  let kept: Tensor | undefined;
  return {
    whole: {
      branch,
      keep(h: Tensor) {
        kept ??= keep(empty(h.shape, h));
        update([copy(kept, h)]);
      },
    } satisfies DeepFeature,
    shallow: {
      branch,
      get kept() {
        return kept;
      },
    } satisfies DeepFeature,
    /** Forgets it: the next call has to be a whole one. */
    release() {
      kept?.release();
      kept = undefined;
    },
  };
}
