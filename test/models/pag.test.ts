import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { refusesEach } from '../support/command_line.ts';
import { goldenLines, maxDifference } from '../support/golden.ts';
import {
  type Call,
  latentsOf,
  pipelineOf,
  sampleSmall,
  seeded,
  testCalls,
  testSample,
} from '../support/golden_calls.ts';

testCalls(goldenLines<Call>('pag'), 12, 0);

test('a scale of 0 leaves every bit as it is', async (t) => {
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const want = await latentsOf(pipeline, seeded());
  const off = await latentsOf(pipeline, seeded({ pag_scale: 0, pag_applied_layers: 'up' }));
  t.equal(maxDifference(off, want), 0);
  // Rows that are perturbed change nothing of the others.
  const faded = await latentsOf(pipeline, seeded({ pag_scale: 1e-3, pag_adaptive_scale: 1 }));
  t.ok(maxDifference(faded, want) < 1e-5, 'nor does one that fades before the first step, but for rounding');
  const one = await latentsOf(pipeline, seeded({ pag_scale: 3, pag_applied_layers: 'mid' }));
  t.ok(maxDifference(one, want) > 1e-2, 'others do not');
  const caching = { cache_interval: 2, cache_branch_id: 5 };
  const both = await latentsOf(pipeline, seeded({ pag_scale: 3, ...caching }));
  t.ok(maxDifference(both, one) > 1e-3, 'with DeepCache beside it');
  t.ok(maxDifference(both, await latentsOf(pipeline, seeded(caching))) > 1e-2, 'each has its part');
  pipeline.release();
});

testSample(
  [
    ...['--negative-prompt', 'rain', '--pag-scale', '3', '--pag-adaptive-scale', '0.001'],
    ...['--pag-applied-layers', 'mid', '--pag-applied-layers', 'up_blocks.0'],
  ],
  seeded({ pag_scale: 3, pag_adaptive_scale: 0.001, pag_applied_layers: ['mid', 'up_blocks.0'] }),
);

test('mistakes', async (t) => {
  await refusesEach(t, sampleSmall, [
    [['--pag-scale', '-1'], /--pag-scale/],
    [['--pag-adaptive-scale', '0.1'], /--pag-adaptive-scale needs --pag-scale/],
    [['--pag-applied-layers', 'mid'], /--pag-applied-layers needs --pag-scale/],
    [
      ['--pag-scale', '3', '--pag-applied-layers', 'middle'],
      /pag_applied_layers \(--pag-applied-layers\) "middle" names no self-attention of this UNet: give a part of a name, as up or down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1$/m,
    ],
    // It has no transformers.
    [
      ['--pag-scale', '3', '--pag-applied-layers', 'down_blocks.0'],
      /"down_blocks\.0" names no self-attention/,
    ],
    [['--pag-scale', '3', '--pag-applied-layers', 'up,'], /"up," names no self-attention/],
  ]);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  for (const [more, says] of [
    [{ pag_scale: -1 }, /pag_scale is -1: give a number from 0/],
    [{ pag_scale: 3, pag_applied_layers: [] }, /pag_applied_layers is \[\]: give a text, or a list of texts/],
    [{ pag_scale: 3, pag_applied_layers: '' }, /"" names no self-attention/],
    [
      { pag_scale: 3, guess_mode: true },
      /guess_mode \(--guess-mode\) and pag_scale \(--pag-scale\) do not go together/,
    ],
  ] as const)
    await t.rejects(latentsOf(pipeline, seeded(more)), { message: says });
  pipeline.release();
});
