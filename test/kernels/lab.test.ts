// The history of attention's forward kernel (kernels/lab) on the virtual GPU: every step, at the op's own samples with heads
// 64 wide, gives what the reference gives, under every schedule.
import { test } from 'tap';
import { attentionSteps } from '../../bench/lab.ts';
import { labFiles } from '../../engine/cuda/build.ts';
import { labFolder, readPtx } from '../../engine/cuda/kernels.ts';
import type { PlanContext } from '../../engine/cuda/plan.ts';
import { openDevice } from '../../engine/device.ts';
import { registry } from '../../engine/op.ts';
import { type AnyRecord, type AnySample, relativeError, runOn, size, values } from '../support/op_cases.ts';
import { fromBf16, toBf16 } from '../virtual-gpu/numbers.ts';
import { newBench, schedules } from '../virtual-gpu/run_kernel.ts';

/** The square root of an NMSE of 1e-5. */
const bound = 3.1e-3;
const record = { ...registry.get('attention'), backward: undefined } as AnyRecord;
const samples = (record.samples as readonly AnySample[]).filter(({ inputs, attrs }) => {
  const { heads, causal } = attrs as { heads: number; causal: boolean };
  return inputs.q[2] === 64 * heads && !causal;
});

/** How far a step's y is from the reference's. */
function errorOf(
  step: (typeof attentionSteps)[number],
  sample: AnySample,
  bench: ReturnType<typeof newBench>,
) {
  const { q, k } = sample.inputs;
  const { heads, scale } = sample.attrs as { heads: number; scale: number };
  const [n, lq, lk] = [q[0], q[1], k[1]];
  const given = ['q', 'k', 'v'].map((name, i) =>
    bench.give(Uint16Array.from(values(size(sample.inputs[name]), i + 1), toBf16)),
  );
  const y = bench.room(size(q) * 2);
  const context: PlanContext = {
    ...{
      dtype: 'bfloat16',
      elementBytes: 2,
      multiprocessors: 4,
      sharedBytes: 227 * 1024,
      hopper: true,
      workspace: bench.room,
      upload: bench.give,
    },
    tiledMap: (map) => bench.gpu.cuTensorMapEncodeTiled(map),
    im2colMap: (map) => bench.gpu.cuTensorMapEncodeIm2col(map),
  };
  const args = [y, bench.room(n * heads * lq * 4), ...given, n, heads, lq, lk, 64, 0, scale];
  for (const { family, entry, grid, block, args: own, shared } of step.launches(args, context)) {
    const ptx = readPtx(family, 'bfloat16', step.folder);
    bench.launch(ptx, `${entry}_bfloat16`, grid, block, own, shared);
  }
  const got = new Uint16Array(bench.ints(y, size(q) / 2).buffer);
  return relativeError(
    Float32Array.from(got, fromBf16),
    runOn(openDevice('reference'), record, sample, 'bfloat16').y,
  );
}

for (const step of attentionSteps) {
  test(`attention's history: ${step.name}`, (t) => {
    t.ok(samples.length >= 3, `${samples.length} samples`);
    samples.forEach((sample, i) => {
      const bench = newBench({ capability: [9, 0], schedule: schedules[i % schedules.length] });
      const error = errorOf(step, sample, bench);
      t.ok(error <= bound, `${JSON.stringify(sample.inputs)} ${error}`);
    });
    t.end();
  });
}

test("the history's PTX is made from its sources", (t) => {
  for (const { family, dtype, digest } of labFiles())
    t.ok(readPtx(family, dtype, labFolder).split('\n')[0].includes(digest), family);
  t.end();
});
