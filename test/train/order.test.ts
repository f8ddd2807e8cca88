// The order of training: what an epoch shows, in which updates and batches, and how epochs follow each other.
import { test } from 'tap';
import { draws, keyOf } from '../../train/data/draws.ts';
import {
  type Placed,
  passesPerUpdate,
  planEpoch,
  samplesPerEpoch,
  turnsFrom,
  updatesPerEpoch,
} from '../../train/data/order.ts';

const placed = (count: number, buckets: number): Placed[] =>
  Array.from({ length: count }, (_, i) => ({ key: keyOf(`${i}`), bucket: (i * i) % buckets }));

test('an epoch shows every sample once, whatever the batch', (t) => {
  const samples = placed(103, 7);
  const plan = (batch: number, accumulation: number, epoch = 3, seed = 1) =>
    planEpoch(samples, { seed, epoch, batch, accumulation });
  const members = (updates: ReturnType<typeof plan>) =>
    updates.map((update) => update.flatMap((micro) => micro.samples));
  for (const [batch, accumulation] of [
    [8, 1],
    [4, 2],
    [2, 4],
    [1, 8],
    [3, 2],
    [1, 1],
    [200, 1],
  ]) {
    const updates = plan(batch, accumulation);
    t.equal(updates.length, updatesPerEpoch(103, batch, accumulation));
    t.strictSame(
      members(updates)
        .flat()
        .sort((a, b) => a - b),
      samples.map((_, i) => i),
      'each once',
    );
    const sizes = members(updates).map((update) => update.length);
    t.ok(
      sizes.slice(0, -1).every((size) => size === batch * accumulation),
      'only the last is short',
    );
    const batches = updates.flat();
    t.ok(
      batches.every((micro) => micro.samples.length <= batch),
      'no batch is too large',
    );
    t.ok(batches.every(({ bucket, samples: each }) => each.every((i) => samples[i].bucket === bucket)));
  }
  t.strictSame(members(plan(4, 2)), members(plan(8, 1)), 'batch 8 and batch 4 twice see the same');
  t.strictSame(members(plan(1, 8)), members(plan(8, 1)));
  t.strictSame(plan(8, 1), plan(8, 1), 'and again');
  t.notSame(members(plan(8, 1, 4)), members(plan(8, 1)), 'another epoch, another order');
  t.notSame(members(plan(8, 1, 3, 2)), members(plan(8, 1)), 'another seed');
  const pure = plan(8, 1).filter((update) => update.length === 1).length;
  t.ok(pure >= 8, `${pure} of 13 updates are of one size`);
  t.end();
});

test('samples and updates come in the order that is drawn, and a size fills its own updates', (t) => {
  const ids = (updates: ReturnType<typeof planEpoch>) =>
    updates.map((update) => update.flatMap(({ samples }) => samples));
  for (const epoch of [0, 1]) {
    const samples = placed(12, 1);
    const random = samples.map(({ key }) => {
      const own = draws(4, epoch, key, 'order');
      return { sample: own.uniform(), update: own.uniform() };
    });
    const order = samples.map((_, i) => i).sort((a, b) => random[a].sample - random[b].sample);
    const cut = [0, 4, 8].map((from) => order.slice(from, from + 4));
    cut.sort(([a], [b]) => random[a].update - random[b].update);
    t.strictSame(ids(planEpoch(samples, { seed: 4, epoch, batch: 4, accumulation: 1 })), cut);
    // 7 of one size, 6 of another and 3 of a third: an update of each of the first two, and one of what is left of all, by size.
    const buckets = [...Array<number>(7).fill(5), ...Array<number>(6).fill(2), 9, 9, 9];
    const mixed = buckets.map((bucket, i) => ({ key: keyOf(`${i}`), bucket }));
    const sizes = planEpoch(mixed, { seed: 4, epoch, batch: 4, accumulation: 1 }).map((update) =>
      update.map(({ bucket, samples: each }) => [bucket, each.length].join('x')).join(),
    );
    t.strictSame(sizes.sort(), ['2x2,5x2', '2x4', '5x1,9x3', '5x4']);
  }
  t.end();
});

test('rare sizes are not kept for the end', (t) => {
  // One update of bucket 1, and one of what is left over of 2 and 3, among sixteen.
  const buckets = [...Array<number>(56).fill(0), 1, 1, 1, 1, 2, 2, 3, 3];
  const samples = buckets.map((bucket, i) => ({ key: keyOf(`${i}`), bucket }));
  const places: number[][] = [[], []];
  for (let epoch = 0; epoch < 300; epoch++)
    planEpoch(samples, { seed: 1, epoch, batch: 4, accumulation: 1 }).forEach(([{ bucket }], i) => {
      if (bucket > 0) places[bucket === 1 ? 0 : 1].push(i / 15);
    });
  for (const at of places) {
    t.equal(at.length, 300);
    // The mean of 300 places, even from 0 to 1, deviates by 0.018.
    const mean = at.reduce((sum, place) => sum + place, 0) / 300;
    t.ok(Math.abs(mean - 0.5) < 0.08, `on average at ${mean.toFixed(2)} of the epoch`);
  }
  t.end();
});

test('orders are fair', (t) => {
  const samples = placed(6, 1);
  const counts = new Map<string, number>();
  for (let epoch = 0; epoch < 7200; epoch++) {
    const order = planEpoch(samples.slice(0, 4), { seed: 5, epoch, batch: 1, accumulation: 1 });
    const name = order.map(([micro]) => micro.samples[0]).join('');
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  t.equal(counts.size, 24, 'every permutation comes');
  // Chi-square with 23 degrees of freedom is below 50 with probability 0.999.
  const chi = [...counts.values()].reduce((sum, n) => sum + (n - 300) ** 2 / 300, 0);
  t.ok(chi < 50, `chi-square ${chi}`);
  const alone = samples.map(({ key }) => key);
  t.equal(new Set(alone).size, 6);
  t.end();
});

test('samples for prior preservation come in turn, as many in an epoch as others', (t) => {
  const own = placed(5, 1);
  const prior = placed(12, 1).map(({ key }) => ({ key: key + 1000, bucket: 0, prior: true }));
  const samples = [...own, ...prior];
  const sizes = { seed: 3, batch: 2, accumulation: 1 };
  const counts = new Map<number, number>();
  for (let epoch = 0; epoch < 12; epoch++) {
    const updates = planEpoch(samples, { ...sizes, epoch });
    const members = updates.flatMap((update) => update.flatMap(({ samples: each }) => each));
    t.equal(updates.length, updatesPerEpoch(samplesPerEpoch(samples), 2, 1));
    t.equal(new Set(members).size, 10, 'none twice');
    t.equal(members.filter((i) => i < 5).length, 5, 'and all of the others');
    for (const i of members) counts.set(i, (counts.get(i) ?? 0) + 1);
  }
  t.same([...new Set(prior.map((_, i) => counts.get(5 + i)))], [5], 'each as often as any other');
  const first = (seed: number) =>
    planEpoch(samples, { ...sizes, seed, epoch: 0 })
      .flat()
      .flatMap((pass) => pass.samples);
  const chosen = [1, 2, 3, 4].map((seed) =>
    first(seed)
      .filter((i) => i >= 5)
      .sort()
      .join(),
  );
  t.ok(new Set(chosen).size > 1, 'the seed draws which come first');
  t.equal(samplesPerEpoch([...own, ...prior.slice(0, 3)]), 8, 'fewer than the others: all');
  t.equal(samplesPerEpoch(own), 5);
  t.end();
});

test('turns are the updates of one epoch after another', (t) => {
  const placed = Array.from({ length: 7 }, (_, key) => ({ key, bucket: key % 2 }));
  const sizes = { seed: 3, batch: 2, accumulation: 1 };
  const want = [4, 5, 6].flatMap((epoch) =>
    planEpoch(placed, { ...sizes, epoch }).map((update, i, all) => ({
      ...{ update, epoch },
      endsEpoch: i + 1 === all.length,
    })),
  );
  const turns = turnsFrom(placed, sizes, { epoch: 4, update: 2 });
  t.same(
    want.slice(2).map(() => turns.next().value),
    want.slice(2),
  );
  t.equal(want.length, 12, 'each epoch ends with a short one');
  t.end();
});

test('no update has more passes than are foreseen, and some have as many', (t) => {
  for (const [counts, batch, accumulation] of [
    [[3, 1], 2, 2],
    [[1, 1, 1], 4, 1],
    [[9], 2, 3],
    [[5, 4, 1], 1, 4],
    [[5, 1], 2, 4],
    [[2], 4, 2],
  ] as const) {
    const samples = counts.flatMap((count, bucket) =>
      Array.from({ length: count }, (_, i) => ({ key: keyOf(`${bucket}-${i}`), bucket })),
    );
    const most = passesPerUpdate(samples.length, counts.length, { batch, accumulation });
    const passes = Array.from({ length: 20 }, (_, epoch) =>
      planEpoch(samples, { seed: 1, epoch, batch, accumulation }).map((update) => update.length),
    );
    t.equal(Math.max(...passes.flat()), most, `${counts} pictures of a size, ${batch} x ${accumulation}`);
  }
  t.end();
});
