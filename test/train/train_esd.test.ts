// Erasing concepts (ESD): its loss and gradients against torch over diffusers' UNet (golden/dpo_esd.py), runs that resume bit for bit and
// forget what a caption stands for, and mistakes.
import { join } from 'node:path';
import { test } from 'tap';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { testGradients } from '../support/frozen_golden.ts';
import { basic, device, folder, losses, opened, resumes, run } from '../support/small_runs.ts';

const ofConcept = (target: 'lora' | 'unet'): RunInput => ({
  train: { target, method: 'esd' },
  lora: { rank: 2, alpha: 2 },
});

testGradients('esd', (target) => ({
  ...{ ...basic(`esd-golden-${target}`), ...ofConcept(target) },
  esd: { negative_guidance: 1.5 },
}));

test('runs resume bit for bit', async (t) => {
  const before = device.memory.storages;
  await resumes(t, 'esd-lora', {
    ...ofConcept('lora'),
    objective: { snr_gamma: 5 },
    validation: { samples: 2 },
  });
  await resumes(t, 'esd-unet', {
    ...{ dtype: 'bfloat16', gradient_accumulation_steps: 1 },
    ...{ dataset: { ...basic('').dataset, shuffle_caption: true } },
    train: { method: 'esd', fused_backward_pass: true, parts: ['attn2'] },
  });
  t.equal(device.memory.storages, before, 'live tensors');
});

test('what captions stand for is forgotten', async (t) => {
  const input: RunInput = {
    ...{ ...basic('esd-forgets'), batch_size: 6, gradient_accumulation_steps: 1, steps: 10 },
    ...{ ...ofConcept('lora'), lora: { rank: 4, alpha: 4 }, ema: { decay: 0 } },
    dataset: { ...basic('').dataset, caption_dropout_rate: 0 },
    ...{ optimizer: { lr: 1e-2, weight_decay: 0 }, lr_scheduler: { name: 'constant' } },
  };
  await run(input);
  const [first, ...others] = losses(join(folder, 'esd-forgets')).map(([, loss]) => loss as number);
  t.ok(
    others.slice(-3).every((loss) => loss < 0.5 * first),
    `${[first, ...others]}`,
  );
  t.match(
    describe(planOf(await opened(input))).join('\n'),
    /objective {3}epsilon, esd, mse, negative_guidance 1/,
  );
});

test('mistakes', (t) => {
  for (const [more, sentence] of [
    [{ train: { method: 'esd', target: 'controlnet' } }, /"esd" is for the targets "unet" and "lora"/],
    [
      { train: { method: 'esd', text_encoders: true } },
      /"train\.text_encoders" is of the method "diffusion", .* "esd"/,
    ],
    [{ esd: { negative_guidance: 2 } }, /"esd\.negative_guidance" is of ESD, .* "diffusion"/],
    [{ train: { method: 'esd' }, esd: { negative_guidance: -1 } }, /negative_guidance" is -1; .* from 0/],
    [{ train: { method: 'esd' }, dpo: { beta_dpo: 2 } }, /"dpo\.beta_dpo" is of Diffusion-DPO, .* "esd"/],
    [
      { train: { method: 'esd' }, inpainting: { mask_mode: 'bbox' } },
      /"inpainting\.mask_mode" is of models that see more than latents, .* "esd"/,
    ],
    [
      { train: { method: 'esd' }, dataset: { path: 'x', original_image_column: 'before' } },
      /"dataset\.original_image_column" is of models that see more than latents, .* "esd"/,
    ],
  ] as const)
    t.throws(() => resolveRun({ ...basic('x'), ...more }, 'run.ts', 'test'), { message: sentence });
  t.end();
});
