// Micro-kernels of how grids and blocks follow each other on Hopper: programmatic dependent launch, and a store to another block of
// a cluster.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { type Entry, packParameters, readManifest } from '../../engine/cuda/manifest.ts';
import { type Bench, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { sameBits } from './agreement.ts';
import type { MicroKernel } from './micro.ts';
import { integers } from './micro_matrix.ts';
import { kernel, onHopper, THREADS } from './micro_sm90.ts';

/** Rows of threads read what other blocks of the launch before wrote, and take their time before they write. */
const CHAIN = { blocks: 256, launches: 8, shift: 1000 };
const WORDS = CHAIN.blocks * THREADS;

const chainPtx = kernel(
  '.param .u64 to, .param .u64 from, .param .u32 step',
  '',
  `griddepcontrol.launch_dependents;
ld.param.u64 %to, [to]; ld.param.u64 %from, [from]; ld.param.u32 %n, [step];
mov.u32 %b, %ctaid.x; mad.lo.s32 %x, %b, ${THREADS}, %t; add.s32 %y, %x, ${CHAIN.shift}; and.b32 %y, %y, ${WORDS - 1};
mul.wide.u32 %o, %x, 4; add.s64 %to, %to, %o; mul.wide.u32 %o, %y, 4; add.s64 %from, %from, %o;
griddepcontrol.wait;
ld.global.u32 %r1, [%from]; mad.lo.s32 %r1, %r1, 3, %n; nanosleep.u32 2000; st.global.u32 [%to], %r1;`,
);

/**
 * Launches to and fro between two buffers, each of which may begin while the one before runs; as they come, or from a graph.
 * Mixed, every third is an ordinary one, and after each the driver writes over a quarter of what the kernel wrote.
 */
function chain(how: 'launched' | 'replayed', mixed = false): MicroKernel {
  const run = (bench: Bench<GpuApi>) => {
    const { gpu } = bench;
    const stream = gpu.cuStreamCreate(1);
    const buffers = [1, 2].map((seed) => bench.give(Int32Array.from(integers(WORDS, seed))));
    const entry = readManifest(chainPtx).get('op') as Entry;
    const offsets = entry.parameters.map(({ offset }) => offset);
    const op = gpu.cuModuleGetFunction(gpu.cuModuleLoadData(chainPtx), 'op');
    gpu.cuCtxSynchronize();
    if (how === 'replayed') gpu.cuStreamBeginCapture(stream);
    for (let step = 0; step < CHAIN.launches; step++) {
      const parameters = packParameters(entry, [buffers[(step + 1) % 2], buffers[step % 2], step]);
      const [grid, block] = [CHAIN.blocks, THREADS].map((x) => [x, 1, 1] as const);
      const programmatic = !(mixed && step % 3 === 1);
      gpu.cuLaunchKernel(op, grid, block, 0, stream, parameters, offsets, { programmatic });
      if (mixed) gpu.cuMemsetD8Async(buffers[(step + 1) % 2], step, WORDS, stream);
    }
    if (how === 'replayed') gpu.cuGraphLaunch(gpu.cuGraphInstantiate(gpu.cuStreamEndCapture(stream)), stream);
    gpu.cuStreamSynchronize(stream);
    return bench.bytes(buffers[CHAIN.launches % 2], WORDS * 4);
  };
  const name = `programmatic dependent launch, ${how}${mixed ? ', with other work between' : ''}`;
  return { ...onHopper, name, ptx: chainPtx, run, agree: sameBits('u32') };
}

/** Two numbers of each thread to the other block of a pair, once that has begun. */
const handedPtx = kernel(
  '.param .u64 to, .param .u64 from',
  '.reg .f32 %f<4>; .shared .align 16 .b8 tile[1024];',
  `barrier.cluster.arrive.relaxed; ld.param.u64 %to, [to]; ld.param.u64 %from, [from];
mov.u32 %b, %ctaid.x; mad.lo.s32 %x, %b, ${THREADS}, %t; mul.wide.u32 %o, %x, 8; add.s64 %from, %from, %o; add.s64 %to, %to, %o;
ld.global.v2.f32 {%f1, %f2}, [%from]; mov.u32 %s, tile; shl.b32 %r1, %t, 3; add.s32 %s, %s, %r1; xor.b32 %r2, %b, 1;
barrier.cluster.wait.acquire; mapa.shared::cluster.u32 %r3, %s, %r2; st.shared::cluster.v2.f32 [%r3], {%f1, %f2};
barrier.cluster.arrive.release; barrier.cluster.wait.acquire; ld.shared.v2.f32 {%f1, %f2}, [%s]; st.global.v2.f32 [%to], {%f1, %f2};`,
);

function handed(): MicroKernel {
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(2 * THREADS * 8);
    const from = bench.give(floatsFrom(4 * THREADS, 14));
    bench.launch(handedPtx, 'op', 2, THREADS, [to, from], 0, { cluster: 2 });
    return bench.bytes(to, 2 * THREADS * 8);
  };
  const name = "a store to the other block's shared memory";
  return { ...onHopper, name, ptx: handedPtx, run, agree: sameBits('u32') };
}

export const gridKernels = (): MicroKernel[] => [
  ...[false, true].flatMap((mixed) => [chain('launched', mixed), chain('replayed', mixed)]),
  handed(),
];
