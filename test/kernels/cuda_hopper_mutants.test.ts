// No synchronisation of Hopper's main loop can be taken away unnoticed: the kernel of a shared tile, by a block alone and by a
// pair, of a tall one, and the one whose warpgroups take turns, with and without a residual. One multiprocessor makes a block, or a pair, take
// all items, so that the ring of stages goes round. What mutants_equivalent.ts lists may live.
import { test } from 'tap';
import { readPtx } from '../../engine/cuda/kernels.ts';
import { keyOf, overrides, type TileName } from '../../engine/cuda/plan_sm90.ts';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { linear } from '../../engine/ops/linear.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { relativeError, size, values } from '../support/op_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import type { Schedule } from '../virtual-gpu/machine.ts';
import { moduleOf, survivors, synchronisationMutants } from '../virtual-gpu/mutants.ts';
import { schedules } from '../virtual-gpu/run_kernel.ts';
import { unexplained } from './mutant_judge.ts';

interface Case {
  readonly tile: TileName;
  readonly paired?: boolean;
  readonly m: number;
  readonly n: number;
  readonly k: number;
}

/** A linear layer with bias, with and without a residual. */
function layers(device: Device, { m, n, k }: Case): Float32Array[] {
  const make = (shape: readonly number[], seed: number) =>
    tensor(values(size(shape), seed), shape, { device, dtype: 'bfloat16' });
  return [true, false].map((added) => {
    const [x, weight, bias] = [make([m, k], 1), make([n, k], 2), make([n], 3)];
    return scope(() => linear(x, weight, bias, added ? { residual: make([m, n], 4) } : {}).floats());
  });
}

const cases: readonly Case[] = [
  { tile: '80', m: 200, n: 168, k: 136 },
  { tile: '160_pingpong', m: 200, n: 328, k: 136 },
  { tile: '160_tall', m: 420, n: 168, k: 136 },
  { tile: '80', paired: true, m: 270, n: 168, k: 136 },
];

for (const one of cases) {
  test(`synchronisation mutants of the tile ${one.tile}${one.paired ? ' in pairs' : ''} die`, (t) => {
    const { tile, paired, m, n, k } = one;
    overrides.set(keyOf({ kind: 'nt', m, n, steps: Math.ceil(k / 64), slabs: 1 }), {
      tile,
      splits: 1,
      paired,
    });
    const ptx = moduleOf(readPtx('gemm_sm90', 'bfloat16'), `gemm_sm90_nt_${tile}_bfloat16`);
    const want = layers(openDevice('reference'), one);
    const runUnder = (schedule: Schedule, text: string) => {
      const gpu = openVirtualGpu({ capability: [9, 0], multiprocessors: 1, arenaBytes: 2 ** 22, schedule });
      const got = layers(cudaDevice({ ...gpu, cuModuleLoadData: () => gpu.cuModuleLoadData(text) }), one);
      const errors = got.map((y, i) => relativeError(y, want[i]));
      if (!errors.every((error) => error <= 3.1e-3)) throw new Error(`errors of ${errors}`);
    };
    // A mutant that one schedule does not catch meets the next.
    const run = (text: string) => {
      for (const schedule of schedules) runUnder(schedule, text);
    };
    run(ptx);
    // A block alone meets no other; the blocks of a pair begin together.
    const unused = paired ? /bar\.sync 0/ : /barrier\.cluster/;
    const mutants = synchronisationMutants(ptx).filter(({ name }) => !unused.test(name));
    t.ok(mutants.length > 30, `${mutants.length} mutants`);
    const alive = survivors(mutants, (mutant) => run(mutant.ptx));
    const verdicts = alive.map(({ kernel, name }) => ({ kernel, mutant: name, alive: true }));
    t.same(
      unexplained(verdicts).map(({ mutant }) => mutant),
      [],
    );
    t.end();
  });
}
