// How products are cut on GPUs before Hopper and after it, for the shapes of SDXL's passes: no tile but for whole rounds of the
// multiprocessors, no k in parts that make none. What runs is proved in test/kernels.
import { test } from 'tap';
import type { PlanContext } from '../../engine/cuda/plan.ts';
import { choose } from '../../engine/cuda/plan_gemm.ts';

const geforce = { dtype: 'bfloat16', elementBytes: 2, sharedBytes: 99 * 1024, hopper: false } as const;
const on = (multiprocessors: number, more: Partial<PlanContext> = {}) =>
  ({ ...geforce, multiprocessors, ...more }) as PlanContext;

const cut = ([m, n, k]: readonly number[], context: PlanContext, whole = 3, canSplit = true) => {
  const { tile, splits, kPart } = choose({ m, n, k, batch: 1 }, whole, canSplit, context);
  return {
    tile: tile.name,
    splits,
    blocks: Math.ceil(m / tile.side) * Math.ceil(n / tile.side) * splits,
    kPart,
  };
};

test('tiles are cut so that multiprocessors are busy to the end', (t) => {
  const narrow = [2048, 1280, 1280] as const; // 160 large tiles, 640 small ones
  t.match(cut(narrow, on(128)), { tile: 'small', splits: 1 }, 'of 128 (RTX 4090) 32 would have two');
  t.match(cut(narrow, on(170)), { tile: 'large', splits: 1 }, 'of 170 (RTX 5090) nearly all have one');
  t.match(cut(narrow, on(82)), { tile: 'large', splits: 1 }, 'of 82 (RTX 3090) nearly all have two');
  t.match(cut([8192, 1280, 2560], on(128)), { tile: 'large' }, 'large tiles read less');
  for (const multiprocessors of [28, 46, 68, 76, 82, 108, 128, 142, 170])
    for (const [m, n, k] of [
      narrow,
      [2048, 1280, 5120],
      [8192, 640, 640],
      [154, 640, 2048],
      [2048, 1280, 11520],
    ]) {
      const { blocks, splits, kPart } = cut([m, n, k], on(multiprocessors));
      const alone = cut([m, n, k], on(multiprocessors), 3, false);
      const rounds = (all: number) => Math.ceil(all / multiprocessors);
      const where = `${m}x${n}x${k} on ${multiprocessors}`;
      t.ok(
        splits * kPart >= k && (splits - 1) * kPart < k,
        `${where}: every part has some of k, and all is in one`,
      );
      if (splits > 1)
        t.ok(rounds(blocks) * kPart < rounds(alone.blocks) * k, `${where}: k in parts is done in less time`);
    }
  t.end();
});

test('k is in parts where tiles are few, and not for a launch alone', (t) => {
  t.ok(cut([154, 640, 2048], on(128)).splits > 1, 'keys of two prompts');
  t.equal(cut([154, 640, 2048], on(128), 3, false).splits, 1, 'where it may not be');
  t.equal(
    cut([64, 64, 1024], on(128, { sharedBytes: 163 * 1024 })).splits,
    1,
    'what takes a microsecond is not cut',
  );
  t.match(
    cut([4096, 4096, 512], on(128), 1),
    { tile: 'small' },
    'rows that are no whole chunks have small tiles',
  );
  t.match(cut([4096, 4096, 512], on(128, { dtype: 'float32', elementBytes: 4 })), { tile: 'small' });
  t.end();
});
