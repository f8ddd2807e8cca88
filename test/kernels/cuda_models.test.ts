// Whole models through the cuda device on the virtual GPU, beside the cpu device. Races are looked for op by op in
// cuda.test.ts, and not again here.
import { test } from 'tap';
import { cudaDevice, openDevice } from '../../engine/device.ts';
import { loadTextualInversion } from '../../models/text/textual_inversion.ts';
import { allClose } from '../support/golden.ts';
import { embed, embeddings, open } from '../support/textual_inversions.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { modelErrors, pipelineSteps, replaysAndGradients, trainingStep } from './whole_models.ts';

const device = cudaDevice(openVirtualGpu({ races: false }));
const cpu = openDevice('cpu');

for (const [label, work] of [
  ['the tiny pipeline, four steps', pipelineSteps],
  ['one step of training: loss, gradients, clipping, AdamW, the moving average', trainingStep],
] as const) {
  test(label, (t) => {
    for (const dtype of ['float32', 'bfloat16'] as const) {
      for (const { name, error, bound } of modelErrors(device, cpu, work, dtype)) {
        const shown = `${error.toExponential(2)}, at most ${bound.toExponential(2)}`;
        t.ok(bound > 0 && error <= bound, `${name} in ${dtype}: ${shown}`);
      }
    }
    t.end();
  });
}

test('a prompt with a textual inversion, weighted', { timeout: 300_000 }, (t) => {
  const { toy } = embeddings(t);
  const [want, got] = [cpu, device].map((device) => {
    const before = device.memory.storages;
    const pipeline = open(device, 'tiny-sdxl-refiner');
    loadTextualInversion(pipeline, toy);
    const { context } = embed(pipeline, { prompt: ['a (<toy>:1.5) [fox]'], emphasis: 'original' });
    pipeline.release();
    t.equal(device.memory.storages, before, 'live tensors');
    return context;
  });
  allClose(t, 'context', got, want, { atol: 2.5e-5, rtol: 0 });
  t.end();
});

test('a UNet on Hopper: tensor maps and wgmma, replayed and with gradients', (t) => {
  const gpu = openVirtualGpu({ capability: [9, 0], races: false });
  for (const { name, error, bound } of modelErrors(cudaDevice(gpu), cpu, replaysAndGradients, 'bfloat16')) {
    const shown = `${error.toExponential(2)}, at most ${bound.toExponential(2)}`;
    t.ok(bound > 0 && error <= bound, `${name}: ${shown}`);
  }
  const ran = gpu.coverage().filter(({ entered }) => entered.size > 0);
  for (const kind of ['gemm_sm90', 'conv2d_sm90_forward', 'conv2d_backward_sm90', 'attention_hopper'])
    t.ok(
      ran.some(({ kernel }) => kernel.startsWith(kind)),
      `${kind} has run`,
    );
  t.end();
});
