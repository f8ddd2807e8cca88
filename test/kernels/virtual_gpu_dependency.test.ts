// Programmatic dependent launch: the virtual GPU reports what a kernel does before it has waited for the kernels before it, and
// the engine launches so what waits, and nothing else, where the driver can capture it.
import { test } from 'tap';
import type { LaunchAttributes } from '../../engine/cuda/api.ts';
import { expectedFiles } from '../../engine/cuda/build.ts';
import { forHopper, readPtx } from '../../engine/cuda/kernels.ts';
import { readManifest } from '../../engine/cuda/manifest.ts';
import { cudaDevice } from '../../engine/device.ts';
import { linear } from '../../engine/ops/linear.ts';
import { silu } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { relativeError, values } from '../support/op_cases.ts';
import { checkFaults, type Fault, without } from '../virtual-gpu/fault_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { halves, hopper, runWgemm } from '../virtual-gpu/hopper_runs.ts';
import { synchronisationMutants } from '../virtual-gpu/mutants.ts';
import { type Bench, newBench } from '../virtual-gpu/run_kernel.ts';

const hopperGpu = { capability: [9, 0] as const };

/** 64 threads copy a word each; `before` goes before the wait, `copy` after it. */
const ptxOf = (
  before = '',
  copy = 'ld.global.u32 %r1, [%from]; st.global.u32 [%to], %r1;',
  wait = 'griddepcontrol.wait;',
) =>
  `.version 8.0
.target sm_90a
.address_size 64
.visible .entry op(.param .u64 to, .param .u64 from)
{
.reg .pred %first, %low; .reg .b32 %t, %s, %b, %r<4>; .reg .b64 %to, %from, %o;
.shared .align 128 .b8 tile[512]; .shared .align 8 .b8 barrier[8];
griddepcontrol.launch_dependents;
mov.u32 %t, %tid.x; setp.eq.u32 %first, %t, 0; setp.lt.u32 %low, %t, 32; mul.wide.u32 %o, %t, 4; mov.u32 %s, tile; mov.u32 %b, barrier;
ld.param.u64 %to, [to]; ld.param.u64 %from, [from]; add.s64 %to, %to, %o; add.s64 %from, %from, %o;
@%first mbarrier.init.shared::cta.b64 [%b], 1;
@%first fence.mbarrier_init.release.cluster;
shl.b32 %r2, %t, 2; add.s32 %r2, %r2, %s; st.shared.u32 [%r2], %t; bar.sync 0;
${before}
${wait}
${copy}
ret;
}`;

const early: LaunchAttributes = { programmatic: true };

function run(ptx: string, attributes: LaunchAttributes = early) {
  return (bench: Bench): boolean => {
    const x = Int32Array.from({ length: 64 }, (_, i) => 7 * i);
    const [to, from] = [bench.give(new Int32Array(64)), bench.give(x)];
    bench.launch(ptx, 'op', 1, 64, [to, from], 0, attributes);
    return bench.ints(to, 64).every((v, i) => v === x[i]);
  };
}

const bulk = (direction: string) => `@%first cp.async.bulk.${direction};`;
const touched: Record<string, string> = {
  'a load': 'ld.global.u32 %r1, [%from];',
  'a generic load': 'ld.u32 %r1, [%from];',
  'a load by one thread': '@%first ld.global.u32 %r1, [%from];',
  'a volatile load': 'ld.volatile.global.u32 %r1, [%from];',
  'a load by ld.global.nc': 'ld.global.nc.u32 %r1, [%from];',
  'a store': 'st.global.u32 [%to], %t;',
  'an atomic': 'atom.global.add.u32 %r1, [%to], 0;',
  'a reduction': 'red.global.add.u32 [%to], 0;',
  'a prefetch': 'prefetch.global.L1 [%from];',
  'what L2 may drop': 'discard.global.L2 [%from], 128;',
  'cp.async': 'cp.async.ca.shared.global [%r2], [%from], 4; cp.async.wait_all;',
  'a bulk load': bulk('shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%from], 16, [%b]'),
  'a bulk store': bulk('global.shared::cta.bulk_group [%to], [%s], 16'),
};

const tensors = (ptx: string) => (bench: Bench) => {
  const launch: Bench['launch'] = (text, kernel, grid, block, args, shared) =>
    bench.launch(text, kernel, grid, block, args, shared, early);
  return runWgemm({ ...bench, launch }, halves(128 * 320, 1), halves(64 * 320, 2), {}, ptx).length > 0;
};
const waiting = hopper.replace(
  /(\.entry wgemm\([^{]*\{[\s\S]*?\n)(\s*ld\.param)/,
  '$1\tgriddepcontrol.wait;\n$2',
);

/** The same, where before the wait a box of so many dimensions is asked for. */
const asking = (rank: number): string =>
  waiting.replace(
    'griddepcontrol.wait;',
    `{ .reg .b64 %map; .reg .b32 %zero; mov.b32 %zero, 0; mov.b64 %map, wgemm_param_0; cvta.param.u64 %map, %map;
cp.async.bulk.prefetch.tensor.${rank}d.L2.global.tile [%map, {${Array(rank).fill('%zero')}}]; }
griddepcontrol.wait;`,
  );

const faults: readonly Fault[] = [
  ['control', /nothing/, run(ptxOf())],
  ['control: launched as others are', /nothing/, run(ptxOf(), {})],
  ['control: nothing to wait for', /nothing/, run(ptxOf('ld.global.u32 %r1, [%from];', undefined, ''), {})],
  [
    'control: a bulk copy after the wait',
    /nothing/,
    run(
      ptxOf(
        '',
        `${bulk('prefetch.L2.global [%from], 16')} ld.global.u32 %r1, [%from]; st.global.u32 [%to], %r1;`,
      ),
    ),
  ],
  ['control: a map is prefetched', /nothing/, run(ptxOf('prefetch.tensormap [%from];'))],
  ['control: a line is prefetched to L2', /nothing/, run(ptxOf('prefetch.global.L2 [%from];'))],
  ['control: bytes are prefetched to L2', /nothing/, run(ptxOf(bulk('prefetch.L2.global [%from], 16')))],
  ...Object.entries(touched).map(
    ([name, text]): Fault => [`${name} before the wait`, /grid dependency/, run(ptxOf(text))],
  ),
  ['no wait', /grid dependency/, run(ptxOf('', undefined, ''))],
  ['no wait, and nothing is touched', /grid dependency/, run(ptxOf('', '', ''))],
  [
    'one warp waits for another',
    /grid dependency/,
    run(ptxOf('', undefined, '@%low griddepcontrol.wait; bar.sync 0;')),
  ],
  [
    'a thread waits for its warp',
    /grid dependency/,
    run(ptxOf('', undefined, '@%first griddepcontrol.wait; bar.sync 0;')),
  ],
  ['a warp ends without', /grid dependency/, run(ptxOf('@%low ret;'))],
  [
    'ld.global.nc after the wait',
    /grid dependency/,
    run(ptxOf('', 'ld.global.nc.u32 %r1, [%from]; st.global.u32 [%to], %r1;')),
  ],
  ['a tensor copy before the wait', /grid dependency/, tensors(hopper)],
  ['control: a box is prefetched to L2 before the wait', /nothing/, tensors(asking(2))],
  ['a box of a third dimension is prefetched', /tensor map/, tensors(asking(3))],
  ['control: tensor copies after the wait', /nothing/, tensors(waiting)],
];
checkFaults('what a grid may not do before it has waited', faults, hopperGpu);

test('only the wait has a mutant, and it dies', (t) => {
  const mutants = synchronisationMutants(ptxOf()).filter(({ name }) => name.includes('griddepcontrol'));
  t.match(mutants, [{ name: /griddepcontrol\.wait/ }]);
  t.equal(mutants.length, 1);
  t.throws(() => run(without(ptxOf(), 'op', /griddepcontrol/))(newBench(hopperGpu)), {
    message: /grid dependency/,
  });
  t.end();
});

test('every kernel for Hopper waits, and no other', (t) => {
  const entries = expectedFiles().flatMap(({ family, dtype }) => {
    const ofHopper = forHopper(family);
    return [...readManifest(readPtx(family, dtype)).values()].map((entry) => ({ ...entry, ofHopper }));
  });
  t.ok(entries.some(({ waits }) => waits));
  t.same(
    entries.filter(({ waits, ofHopper }) => waits !== ofHopper).map(({ name }) => name),
    [],
  );
  t.end();
});

/** Two linear layers with an elementwise op between them, four times, of which the last two are of a graph; and how each was launched. */
function launched(driverVersion: number) {
  const seen = new Set<string>();
  const names = new Map<bigint, string>();
  const gpu = openVirtualGpu({ ...hopperGpu, driverVersion, arenaBytes: 2 ** 24 });
  const device = cudaDevice({
    ...gpu,
    cuModuleGetFunction(module, name) {
      const kernel = gpu.cuModuleGetFunction(module, name);
      names.set(kernel, name);
      return kernel;
    },
    cuLaunchKernel(...args) {
      seen.add(`${names.get(args[0])?.split('_')[1]} ${args[7]?.programmatic}`);
      gpu.cuLaunchKernel(...args);
    },
  });
  const make = (shape: readonly number[], seed: number) =>
    tensor(values(shape[0] * shape[1], seed), shape, { device, dtype: 'bfloat16' });
  const [x, weight] = [make([136, 72], 1), make([72, 72], 2)];
  const step = device.step(() => linear(silu(linear(x, weight)), weight));
  const results = Array.from({ length: 4 }, () => step.run((y: Tensor) => scope(() => y.floats())));
  step.release();
  return { seen: [...seen].sort(), results };
}

test('what waits is launched so, where a capture takes it', (t) => {
  const [old, since] = [launched(12020), launched(12030)];
  t.same(old.seen, ['forward false', 'sm90 false']);
  t.same(since.seen, ['forward false', 'sm90 true']);
  for (const { results } of [old, since])
    for (const result of results) t.equal(relativeError(result, old.results[0]), 0);
  t.throws(
    () => {
      const bench = newBench({ ...hopperGpu, driverVersion: 12020 });
      const stream = bench.gpu.cuStreamCreate(1);
      const kernel = bench.gpu.cuModuleGetFunction(bench.gpu.cuModuleLoadData(ptxOf()), 'op');
      bench.gpu.cuStreamBeginCapture(stream);
      bench.gpu.cuLaunchKernel(kernel, [1, 1, 1], [64, 1, 1], 0, stream, new Uint8Array(16), [0, 8], early);
    },
    { name: 'CudaError' },
  );
  t.end();
});
