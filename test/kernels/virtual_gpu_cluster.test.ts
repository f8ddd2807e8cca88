// Clusters on the virtual GPU: shared memory of other blocks, barriers of a cluster and TMA multicast give right results under
// every schedule, and each way of getting their synchronisation wrong is reported.
import { test } from 'tap';
import {
  type ClusterShape,
  clusterPtx,
  exchanged,
  multicasted,
  runExchange,
  runMulticast,
} from '../virtual-gpu/cluster_runs.ts';
import { checkFaults, type Fault, without } from '../virtual-gpu/fault_cases.ts';
import type { VirtualGpuOptions } from '../virtual-gpu/gpu.ts';
import { survivors, synchronisationMutants } from '../virtual-gpu/mutants.ts';
import { type Bench, newBench, schedules } from '../virtual-gpu/run_kernel.ts';

const onHopper: VirtualGpuOptions = { capability: [9, 0] };

const same = (got: ArrayLike<number>, want: ArrayLike<number>): boolean =>
  got.length === want.length && Array.from(want).every((v, i) => v === got[i]);

type Run = (bench: Bench, ptx?: string, shape?: ClusterShape) => boolean;
const exchange: Run = (bench, ptx, shape) => same(runExchange(bench, shape, ptx), exchanged(shape));
const bring =
  (kernel: Parameters<typeof runMulticast>[0]): Run =>
  (bench, ptx, shape) =>
    same(runMulticast(kernel, bench, shape, ptx), multicasted(kernel, shape));
const multicast = bring('multicast');
const pixels = bring('multicast_pixels');
const boxes = bring('multicast_boxes');

/** Without the n-th meeting of a cluster's blocks, arrival and wait. */
function unmet(kernel: string, n: number): string {
  const arrived = without(clusterPtx, kernel, /cluster\.arrive/, n);
  return without(arrived, kernel, /cluster\.wait/, n);
}
/** exchange, whose n-th arrival hands nothing on. */
function relaxed(n: number): string {
  const [before, after] = clusterPtx.split(/(?<=\.entry exchange)/);
  let left = n;
  return (
    before +
    after.replace(/(cluster\.arrive)\.release/g, (all, arrive) => (left-- ? all : `${arrive}.relaxed`))
  );
}
const mutant = (kernel: string, what: RegExp, n = 0) => without(clusterPtx, kernel, what, n);

for (const schedule of schedules) {
  const options = { ...onHopper, schedule };
  test(`clusters, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    for (const shape of [
      {},
      { cluster: 4, blocks: 8 },
      { cluster: 1, blocks: 2 },
      { cluster: 8, blocks: 8, steps: 1 },
      { missing: 3 },
    ]) {
      const name = JSON.stringify(shape);
      t.ok(exchange(newBench(options), clusterPtx, shape), `shared memory of other blocks ${name}`);
      t.ok(multicast(newBench(options), clusterPtx, shape), `multicast ${name}`);
      t.ok(pixels(newBench(options), clusterPtx, shape), `multicast by im2col ${name}`);
      t.ok(boxes(newBench(options), clusterPtx, shape), `multicast of boxes ${name}`);
    }
    t.end();
  });

  const waits = synchronisationMutants(clusterPtx, (kernel) => kernel === 'multicast').filter((m) =>
    /try_wait/.test(m.name),
  );
  const faults: readonly Fault[] = [
    ['control', /nothing/, (b) => exchange(b)],
    ['reached before it has begun', /cluster/, (b) => exchange(b, unmet('exchange', 0))],
    ['read before the others have written', /race|uninitialised/, (b) => exchange(b, unmet('exchange', 1))],
    ['ends while it is reached', /cluster/, (b) => exchange(b, unmet('exchange', 2))],
    ['known to have begun by a relaxed arrival', /nothing/, (b) => exchange(b, relaxed(0))],
    ['written before a relaxed arrival', /race|uninitialised/, (b) => exchange(b, relaxed(1))],
    ['an arrival missing', /barrier/, (b) => exchange(b, mutant('exchange', /cluster\.arrive/))],
    ['a wait missing', /uninitialised|race/, (b) => exchange(b, mutant('exchange', /cluster\.wait/, 1))],
    ['mapa to a block that is not there', /cluster/, (b) => exchange(b, clusterPtx, { flags: 8 })],
    ['beyond the shared memory', /out of bounds/, (b) => exchange(b, clusterPtx, { flags: 16 })],
    ['grid of broken clusters', /refused/, (b) => exchange(b, clusterPtx, { cluster: 2, blocks: 3 })],
    ['clusters of 16', /refused/, (b) => exchange(b, clusterPtx, { cluster: 16, blocks: 16 })],

    ['control of multicast', /nothing/, (b) => multicast(b)],
    ['only its own stage waited for', /race/, (b) => multicast(b, clusterPtx, { flags: 1 })],
    ['half of the bytes expected', /race|uninitialised|async/, (b) => multicast(b, clusterPtx, { flags: 2 })],
    ['more bytes expected than come', /deadlock/, (b) => multicast(b, clusterPtx, { flags: 4 })],
    ['multicast to a block that is not there', /cluster/, (b) => multicast(b, clusterPtx, { flags: 8 })],
    [
      'free stages not told',
      /deadlock/,
      (b) => multicast(b, mutant('multicast', /mbarrier\.arrive\.shared::cluster/)),
    ],
    ['empty barrier not waited for', /race|uninitialised/, (b) => multicast(b, waits[0].ptx)],
    ['full barrier not waited for', /race|uninitialised|mbarrier/, (b) => multicast(b, waits[1].ptx)],
    [
      'init of mbarriers not fenced',
      /proxy fence/,
      (b) => multicast(b, mutant('multicast', /mbarrier_init/)),
    ],
    [
      'mbarriers of others used too early',
      /race|mbarrier|cluster/,
      (b) => multicast(b, unmet('multicast', 0)),
    ],
    ['ends while others still tell it of free stages', /cluster/, (b) => multicast(b, unmet('multicast', 1))],
    ['control of im2col', /nothing/, (b) => pixels(b)],
    ['im2col: only its own stage waited for', /race/, (b) => pixels(b, clusterPtx, { flags: 1 })],
  ];
  checkFaults(`planted faults of clusters, ${schedule.async}, ${schedule.order}`, faults, options);
}

test('synchronisation mutants of clusters die', (t) => {
  const runs: Record<string, Run> = { exchange, multicast, multicast_pixels: pixels, multicast_boxes: boxes };
  const mutants = synchronisationMutants(clusterPtx).filter(({ name }) => !name.includes('bar.warp.sync'));
  const alive = survivors(mutants, ({ kernel, ptx }) => {
    for (const schedule of schedules)
      if (!runs[kernel](newBench({ ...onHopper, schedule }), ptx)) throw new Error('a wrong result');
  });
  t.ok(mutants.length > 20, `${mutants.length} mutants`);
  t.same(
    alive.map((m) => `${m.kernel} ${m.name}`),
    [],
  );
  t.end();
});

test('a graph keeps the clusters of its launches', (t) => {
  const bench = newBench(onHopper);
  const { gpu } = bench;
  const stream = gpu.cuStreamCreate(1);
  const y = bench.room(4 * 128 * 4);
  const x = Int32Array.from({ length: 256 }, (_, i) => 1000 + i);
  const parameters = new DataView(new ArrayBuffer(20));
  parameters.setBigUint64(0, bench.give(x), true);
  parameters.setBigUint64(8, y, true);
  const kernel = gpu.cuModuleGetFunction(gpu.cuModuleLoadData(clusterPtx), 'exchange');
  const packed = new Uint8Array(parameters.buffer);
  gpu.cuStreamBeginCapture(stream);
  gpu.cuLaunchKernel(kernel, [4, 1, 1], [64, 1, 1], 0, stream, packed, [0, 8, 16], { cluster: 2 });
  const graph = gpu.cuStreamEndCapture(stream);
  gpu.cuGraphLaunch(gpu.cuGraphInstantiate(graph), stream);
  t.ok(same(bench.ints(y, 512), exchanged()));
  t.end();
});

test('clusters are refused before Hopper', (t) => {
  t.throws(() => exchange(newBench({ capability: [8, 9] })), { name: 'CudaError' });
  t.end();
});
