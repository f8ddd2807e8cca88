// The choice of Hopper's tiles at the sizes of SDXL, by the plans alone: no kernel runs here (kernel_proof.ts runs them).
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { MEASURED_MULTIPROCESSORS, measured } from '../../engine/cuda/measured_sm90.ts';
import type { PlanContext } from '../../engine/cuda/plan.ts';
import {
  type Choice,
  candidates,
  chooseHopper,
  cycles,
  keyOf,
  lookupsOf,
  overrides,
  type ProductKind,
  type ProductSize,
  type TileName,
  tiles,
  tilesOf,
} from '../../engine/cuda/plan_sm90.ts';
import { planned } from '../../engine/cuda/plans.ts';
import { packageRoot } from '../../io/package_root.ts';

/** What the plans see of an H200. */
const h200: PlanContext = {
  ...{ dtype: 'bfloat16', elementBytes: 2, multiprocessors: 132, sharedBytes: 227 * 1024, hopper: true },
  ...{
    upload: () => 256n,
    workspace: () => 256n,
    tiledMap: () => new Uint8Array(128),
    im2colMap: () => new Uint8Array(128),
  },
};

test('tiles fill the multiprocessors at the sizes of SDXL', (t) => {
  const sizes: readonly [ProductKind, m: number, n: number, k: number][] = [
    ['nt', 2048, 1280, 1280],
    ['nt', 2048, 3840, 1280],
    ['nt', 2048, 1280, 5120],
    ['nt', 8192, 640, 640],
    ['nt', 8192, 640, 2560],
    ['geglu', 2048, 5120, 1280],
    ['geglu', 8192, 2560, 640],
    ['forward', 32768, 320, 2880],
    ['forward', 8192, 640, 5760],
    ['forward', 2048, 1280, 11520],
  ];
  for (const [kind, m, n, k] of sizes) {
    const choice = chooseHopper({ kind, m, n, steps: k / 64, slabs: 1 }, false, 132);
    const tile = tiles[choice.tile];
    const columns = tile.n / (kind === 'geglu' ? 2 : 1);
    const items = Math.ceil(m / tile.m) * Math.ceil(n / columns);
    const used = (m * n) / (Math.ceil(items / 132) * 132 * tile.m * columns);
    t.ok(used > 0.9, `${kind} ${m} x ${n} x ${k}: tile ${choice.tile} uses ${used.toFixed(2)}`);
  }
  t.end();
});

test('a launch fits a multiprocessor, and what TMA cannot walk goes by the other kernels', (t) => {
  const linear = (m: number, n: number, k: number, x = 256n) =>
    planned('linear_forward', [256n, x, 256n, 0n, 0n, m, n, k, 0], h200);
  for (const tile of tilesOf.nt) {
    overrides.set(keyOf({ kind: 'nt', m: 256, n: 320, steps: 5, slabs: 1 }), { tile, splits: 1 });
    const [launch] = linear(256, 320, 320);
    t.ok(launch.entry.endsWith(tile));
    t.ok(launch.shared + 1024 <= 227 * 1024, `${tile}: ${launch.shared} bytes`);
  }
  overrides.clear();
  const families = [
    linear(2048, 1280, 1280),
    linear(2, 1280, 1280),
    linear(2048, 1276, 1280),
    linear(2048, 1280, 1276),
    linear(2048, 1280, 1280, 264n),
  ].map(([launch]) => launch.family);
  t.same(families, ['gemm_sm90', 'gemv', 'gemm', 'gemm', 'gemm']);
  const [split, join] = linear(128, 320, 8192);
  t.same([split.entry, join?.entry], ['gemm_sm90_nt_80', 'gemm_join']);
  const strided = [256n, 256n, 256n, 2, 64, 64, 320, 32, 32, 320, 3, 3, 2, 1, 1];
  const familiesOf = (symbol: string, args: Parameters<typeof planned>[1]) =>
    planned(symbol, args, h200).map(({ family }) => family);
  t.same(familiesOf('conv2d_backward_x', strided), ['im2col', 'conv2d_backward_sm90'], 'dy is spread first');
  // A filter of 256 pixels: its corners would do, its last offset would not.
  const long = (width: number) =>
    planned(
      'conv2d_forward',
      [256n, 256n, 256n, 256n, 0n, 0n, 0n, 1, 1, 320, 64, 1, 575 - width, 64, 1, width, 1, 0, 127, 64],
      h200,
    )[0].family;
  t.same([long(255), long(256)], ['conv2d_sm90', 'conv2d']);
  t.equal(planned('conv2d_backward_weight', strided, h200)[0].family, 'conv2d_backward_sm90');
  t.same(
    lookupsOf(() => planned('conv2d_backward_x', strided, h200)).map(({ size }) => keyOf(size)),
    ['backward_x 8192 320 45 1'],
  );
  // The UNet's first convolution and its last, of few channels.
  const image = (c: number, o: number) => [2, 128, 128, c, 128, 128, o, 3, 3, 1, 1, 1];
  const pointers = [256n, 256n, 256n];
  const forward = (c: number, o: number) =>
    familiesOf('conv2d_forward', [...pointers, 256n, 0n, 0n, 0n, ...image(c, o), c]);
  t.same(forward(4, 320), ['im2col', 'im2col', 'gemm_sm90'], "x's taps, the weight's rows, the product");
  t.same(forward(320, 4), ['gemm_sm90', 'im2col']);
  const ofWeight = familiesOf('conv2d_backward_weight', [...pointers, ...image(4, 320)]);
  t.same(ofWeight, ['im2col', 'gemm_sm90', 'gemm', 'move'], 'joined, and cut to its width');
  t.same(familiesOf('conv2d_backward_x', [...pointers, ...image(320, 4)]), ['im2col', 'gemm_sm90']);
  t.end();
});

test('a product is looked up by the key under which a measured choice goes before the model', (t) => {
  const size = [2, 64, 64, 320, 64, 64, 640, 3, 3, 1, 1, 1];
  const calls = {
    'nn 8192 320 10 1': ['linear_backward_x', [256n, 256n, 256n, 8192, 640, 320]],
    'tn 640 320 128 1': ['linear_backward_weight', [256n, 256n, 256n, 8192, 640, 320]],
    'backward_x 8192 320 90 1': ['conv2d_backward_x', [256n, 256n, 256n, ...size]],
    'backward_weight 640 320 128 9': ['conv2d_backward_weight', [256n, 256n, 256n, ...size]],
  } as const;
  for (const [key, [symbol, args]] of Object.entries(calls)) {
    const plan = () => planned(symbol, args, h200);
    t.same(
      lookupsOf(plan).map(({ size, canSplit }) => [keyOf(size), canSplit]),
      [[key, true]],
    );
    const [kind] = key.split(' ');
    overrides.set(key, { tile: '256', splits: 2, paired: true });
    const [{ entry, cluster }, join] = plan();
    t.ok(entry.endsWith(`${kind}_256`), entry);
    t.same([cluster, join.entry], [2, 'gemm_join']);
    overrides.set(key, { tile: '160', splits: 1 });
    t.ok(plan()[0].entry.endsWith(`${kind}_160`));
    t.equal(plan().length, 1);
  }
  overrides.clear();
  t.end();
});

/** How many clusters of so many blocks an H200 runs at a time, by its own profile. */
const clustersAbreast: Record<number, number> = { 1: 132, 2: 66, 4: 31, 8: 15 };

test("the base UNet's group norms at 1024x1024, two images: one launch forward, and one more backward", (t) => {
  const norms: readonly (readonly [count: number, side: number, c: number, skip?: number])[] = [
    [8, 128, 320],
    [1, 64, 320],
    [1, 32, 640],
    [11, 64, 640],
    [2, 128, 640, 320],
    [1, 64, 960, 320],
    [1, 128, 960, 320],
    [16, 32, 1280],
    [1, 64, 1280, 640],
    [1, 32, 1920, 640],
    [1, 64, 1920, 640],
    [2, 32, 2560, 1280],
  ];
  for (const [count, side, c, skip = 0] of norms) {
    const sizes = [2, side * side, c];
    const forward = planned(
      'group_norm_forward',
      [256n, 256n, 256n, 256n, skip ? 256n : 0n, 256n, 256n, ...sizes, c - skip, 32, 1, 1e-5],
      h200,
    );
    const backward = planned('group_norm_backward', [...Array(9).fill(256n), ...sizes, 32, 1], h200);
    t.same([forward.length, backward.map(({ entry }) => entry)[1]], [1, 'norm_join']);
    for (const { entry, grid, cluster = 1, block, shared } of [forward[0], backward[0]]) {
      const name = `${entry} ${count} times at ${side} x ${side} x ${c}: ${grid.join(' x ')} blocks`;
      t.ok(cluster <= 8 && grid[0] === cluster && block === 512, name);
      t.ok(shared <= 227 * 1024, `${name}: ${shared} bytes`);
      t.ok(grid[0] * grid[1] * grid[2] >= 64, name);
    }
    // One wave: a sixteenth cluster of eight would come after the fifteen that run abreast, where a block fills a multiprocessor.
    const [{ grid, shared }] = forward;
    const abreast = clustersAbreast[grid[0]] * (shared <= 113 * 1024 ? 2 : 1);
    t.ok(grid[1] * grid[2] <= abreast, `${grid.join(' x ')} blocks of ${shared} bytes`);
  }
  t.end();
});

test('a group norm of more than L2 holds is three launches of many blocks', (t) => {
  const launches = (side: number, c: number) =>
    planned('group_norm_forward', [...Array(7).fill(256n), 1, side * side, c, c, 32, 1, 1e-5], h200).length;
  t.same([launches(256, 512), launches(512, 256), launches(512, 512)], [1, 3, 3]);
  t.end();
});

test('a skip connection is read where it lies: one launch, which no copy precedes where TMA and packs can walk it', (t) => {
  const norm = (own: number) =>
    planned('group_norm_forward', [...Array(7).fill(256n), 2, 64, 64, own, 2, 1, 1e-5], h200);
  t.same(
    norm(40).map(({ family }) => family),
    ['norm_sm90'],
  );
  t.same(
    norm(42).map(({ family }) => family),
    ['move', 'move', 'norm_sm90'],
  );
  const shortcut = (own: number) =>
    planned(
      'conv2d_forward',
      [...Array(4).fill(256n), 0n, 0n, 256n, 2, 128, 128, 960, 128, 128, 320, 1, 1, 1, 0, 0, own],
      h200,
    );
  t.same(
    shortcut(640).map(({ family }) => family),
    ['conv2d_sm90'],
  );
  t.same(
    shortcut(644).map(({ family }) => family),
    ['conv2d'],
  );
  t.end();
});

test('float32 is multiplied as sums of bfloat16 where that pays', (t) => {
  const float32 = { ...h200, dtype: 'float32', elementBytes: 4 } as const;
  const entries = (symbol: string, args: readonly (bigint | number)[]) =>
    planned(symbol, args, float32).map(({ entry }) => entry.replace(/_\d+(_pingpong)?$/, ''));
  const conv = (side: number, c: number, o: number, own = c) =>
    entries('conv2d_forward', [
      ...[256n, 256n, 256n, 256n, 0n, 256n, own < c ? 256n : 0n],
      ...[1, side, side, c, side, side, o, 3, 3, 1, 1, 1, own],
    ]);
  t.same(conv(128, 512, 512), ['gemm_split', 'gemm_split', 'conv2d_sm90_split_forward']);
  t.equal(conv(128, 640, 640, 320).length, 4, 'a skip connection has halves of its own');
  t.same(conv(1024, 128, 3), ['gemm_split', 'gemm_split', 'gemm_sm90_split_nt', 'col2im']);
  t.equal(conv(16, 64, 64)[0], 'conv2d_forward_small');
  const linear = (m: number, n: number, k: number) =>
    entries('linear_forward', [256n, 256n, 256n, 256n, 0n, m, n, k, 0]);
  t.same(linear(16384, 512, 512), ['gemm_split', 'gemm_split', 'gemm_sm90_split_nt', 'gemm_join']);
  t.notOk(linear(2, 1280, 1280).includes('gemm_split'));
  // Pieces of 1368 queries: q's and the weights' halves in each, k's and v's once.
  const scale = 512 ** -0.5;
  const attention = entries('attention_forward', [
    256n,
    256n,
    256n,
    512n,
    768n,
    1,
    1,
    16384,
    16384,
    512,
    0,
    scale,
  ]);
  const [softmaxes, splits] = ['attention_softmax', 'gemm_split'].map(
    (name) => attention.filter((entry) => entry === name).length,
  );
  t.same([softmaxes, splits], [12, 2 * 12 + 2]);
  t.notOk(attention.some((entry) => entry.endsWith('small')));
  t.end();
});

/** Microseconds that an H200 took for products of the UNet, by the names of their choices: `256 paired /2`. */
type Times = Readonly<Record<string, Readonly<Record<string, number>>>>;
const times = JSON.parse(readFileSync(join(packageRoot, 'bench/results/h200-tiles.json'), 'utf8')) as Times;

function choiceNamed(name: string): Choice {
  const [tile, ...words] = name.split(' ');
  const splits = Number(/\/(\d+)$/.exec(name)?.[1] ?? 1);
  return { tile: tile as TileName, splits, ...(words.includes('paired') ? { paired: true } : {}) };
}

test('the model chooses about as fast as an H200 was, and where it does not the measurement goes first', (t) => {
  const excesses = Object.entries(times).map(([key, all]) => {
    const [kind, m, n, steps, slabs] = key.split(' ');
    const size = { kind: kind as ProductKind, m: +m, n: +n, steps: +steps, slabs: +slabs };
    t.equal(keyOf(size), key);
    const byModel = ([name]: [string, number]) => cycles(size, choiceNamed(name), MEASURED_MULTIPROCESSORS);
    const measuredOnes = Object.entries(all);
    const [, chosen] = measuredOnes.reduce((least, one) => (byModel(one) < byModel(least) ? one : least));
    const [fastest, least] = measuredOnes.reduce((a, b) => (b[1] < a[1] ? b : a));
    const excess = chosen / least - 1;
    t.same(measured[key], excess >= 0.01 ? choiceNamed(fastest) : undefined, key);
    return excess;
  });
  t.ok(excesses.length > 140);
  t.ok(excesses.reduce((sum, x) => sum + x, 0) / excesses.length < 0.05);
  t.end();
});

test('what was measured is a choice that its product has, and goes before the model on such a GPU', (t) => {
  for (const [key, choice] of Object.entries(measured)) {
    const [kind, ...lengths] = key.split(' ');
    const [m, n, steps, slabs] = lengths.map(Number);
    const size: ProductSize = { kind: kind as ProductKind, m, n, steps, slabs };
    const canSplit = kind !== 'geglu';
    t.ok(
      candidates(size, canSplit).some(
        ({ tile, splits, paired }) =>
          tile === choice.tile && splits === choice.splits && Boolean(paired) === Boolean(choice.paired),
      ),
      key,
    );
    t.same(chooseHopper(size, canSplit, MEASURED_MULTIPROCESSORS), choice, key);
  }
  t.end();
});

test('pairs take an even number of tiles down and of blocks', (t) => {
  const grids = [2048, 300, 1920].map((m) => {
    const key = keyOf({ kind: 'nt', m, n: 320, steps: 20, slabs: 1 });
    overrides.set(key, { tile: '160', splits: 1, paired: true });
    const [{ grid, cluster, args }] = planned('linear_forward', [256n, 256n, 256n, 0n, 0n, m, 320, 1280, 0], {
      ...h200,
      multiprocessors: 31,
    });
    const [down, across, , items] = args.slice(12, 16);
    return [cluster, grid[0], down, across, items];
  });
  overrides.clear();
  t.same(grids, [
    [2, 30, 16, 2, 32],
    [2, 8, 4, 2, 8],
    [2, 30, 16, 2, 32],
  ]);
  t.end();
});
