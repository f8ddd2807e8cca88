// Perturbed-attention guidance against diffusers' pipelines that have it (golden/pag.jsonl): whole calls. That it goes with
// DeepCache, and `sdxl sample`. Recorded steps: cuda_recorded.test.ts.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at, type Call, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';

testCalls(goldenLines<Call>('pag'), 12, 0);

const seeded = (more: Partial<Asked> = {}): Asked => ({
  ...{ prompt: 'a red fox in the snow', negative_prompt: 'rain', width: 64, height: 64 },
  ...{ num_inference_steps: 4, guidance_scale: 5, generators: [new TorchGenerator(3)] },
  ...more,
});

test('a scale of 0 leaves every bit as it is', async (t) => {
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const want = await latentsOf(pipeline, seeded());
  const off = await latentsOf(pipeline, seeded({ pag_scale: 0, pag_applied_layers: 'up' }));
  t.equal(maxDifference(off, want), 0);
  // Rows that are perturbed change nothing of the others.
  const faded = await latentsOf(pipeline, seeded({ pag_scale: 1e-3, pag_adaptive_scale: 1 }));
  t.ok(maxDifference(faded, want) < 1e-3, 'nor does one that fades before the first step, but for rounding');
  const one = await latentsOf(pipeline, seeded({ pag_scale: 3, pag_applied_layers: 'mid' }));
  t.ok(maxDifference(one, want) > 1e-2, 'others do not');
  const caching = { cache_interval: 2, cache_branch_id: 5 };
  const both = await latentsOf(pipeline, seeded({ pag_scale: 3, ...caching }));
  t.ok(maxDifference(both, one) > 1e-3, 'with DeepCache beside it');
  t.ok(maxDifference(both, await latentsOf(pipeline, seeded(caching))) > 1e-2, 'each has its part');
  pipeline.release();
});

const sample = (...argv: string[]) =>
  sdxl(
    ...['sample', '--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a red fox in the snow'],
    ...['--width', '64', '--height', '64', '--steps', '4', '--seed', '3', '--quiet', ...argv],
  );

test('sdxl sample', async (t) => {
  const [drawn, saved] = [at('drawn.png'), at('drawn.safetensors')];
  const { status, err } = await sample(
    ...['--negative-prompt', 'rain', '--pag-scale', '3', '--pag-adaptive-scale', '0.001'],
    ...['--pag-applied-layers', 'mid', '--pag-applied-layers', 'up_blocks.0'],
    ...['--output', drawn, '--save-latents', saved],
  );
  t.equal(status, 0, err);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const layers = { pag_applied_layers: ['mid', 'up_blocks.0'] };
  const own = await latentsOf(pipeline, seeded({ pag_scale: 3, pag_adaptive_scale: 0.001, ...layers }));
  pipeline.release();
  const latents = decodeFloats(openSafetensors(saved).read('latents'), 'float32');
  t.equal(maxDifference(latents, own), 0, "as a program's");
  const again = at('again.png');
  t.equal((await sdxl('sample', '--from', drawn, '--output', again, '--quiet')).status, 0);
  t.ok(readFileSync(again).equals(readFileSync(drawn)), 'the same picture and settings');
});

test('mistakes', async (t) => {
  await refusesEach(t, sample, [
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
    [['--pag-scale', '3', '--pag-applied-layers', ''], /"" names no self-attention/],
  ]);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  for (const [more, says] of [
    [{ pag_scale: -1 }, /pag_scale is -1: give a number from 0/],
    [{ pag_scale: 3, pag_applied_layers: [] }, /pag_applied_layers is \[\]: give a text, or a list of texts/],
    [
      { pag_scale: 3, guess_mode: true },
      /guess_mode \(--guess-mode\) and pag_scale \(--pag-scale\) do not go together/,
    ],
  ] as const)
    await t.rejects(latentsOf(pipeline, seeded(more)), { message: says });
  pipeline.release();
});
