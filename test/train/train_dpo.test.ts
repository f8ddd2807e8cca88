// Diffusion-DPO: its loss and gradients against torch over diffusers' UNet (golden/dpo_esd.py), pairs that are shown alike, runs that resume
// bit for bit and learn what is preferred, and mistakes.
import { copyFileSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { writePng } from '../../io/image.ts';
import { softplus } from '../../train/methods/dpo.ts';
import type { HostTensor, PassInputs } from '../../train/objective/pass_inputs.ts';
import { openPictures } from '../../train/pictures/pictures.ts';
import { planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { picture } from '../support/controlnet_golden.ts';
import { testGradients } from '../support/frozen_golden.ts';
import { says } from '../support/mistake.ts';
import { devices } from '../support/models_golden.ts';
import {
  basic,
  device,
  folder,
  losses,
  opened,
  paired,
  pictures,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

const dataset = { ...basic('').dataset, path: paired };
/** What a run of pairs has beside what `basic` has. */
const ofPairs = (target: 'lora' | 'unet'): RunInput => ({
  train: { target, method: 'dpo' },
  lora: { rank: 2, alpha: 2 },
  dataset,
});
const dpoRun = (output: string, target: 'lora' | 'unet' = 'lora'): RunInput => ({
  ...basic(output),
  ...ofPairs(target),
});

testGradients('dpo', (target) => ({ ...dpoRun(`golden-${target}`, target), dpo: { beta_dpo: 200 } }));

test('softplus and its gradient, where a loss begins and far from there', (t) => {
  const values = [0, 1e-6, -1e-6, 0.3, -0.3, 1, -1, 3, -3, 9, -9, 20, -20, 90, -90, 3e4, -3e4];
  for (const on of devices) {
    scope(() => {
      const x = tensor(values, [values.length], { device: on });
      requireGrad(x);
      const y = softplus(x);
      const got = y.floats();
      backward(y);
      const slopes = gradOf(x)?.floats() ?? [];
      for (const [i, value] of values.entries()) {
        const want = Math.max(value, 0) + Math.log1p(Math.exp(-Math.abs(value)));
        const slope = 1 / (1 + Math.exp(-value));
        t.ok(Math.abs(got[i] - want) <= 3e-7 * want + 1e-37, `${on.name} ${value}: ${got[i]}, ${want}`);
        t.ok(Math.abs(slopes[i] - slope) < 3e-7, `${on.name} ${value}: slope ${slopes[i]}, ${slope}`);
      }
      clearGrad(x);
    });
  }
  t.end();
});

/** The half of an input that is of the preferred pictures, and the other. */
function halves({ values }: HostTensor): [number[], number[]] {
  const middle = values.length / 2;
  return [[...values.slice(0, middle)], [...values.slice(middle)]];
}

test('both pictures of a pair are cropped, mirrored and noised alike', async (t) => {
  const twins = join(folder, 'twins');
  mkdirSync(twins);
  for (let i = 0; i < 6; i++) {
    for (const name of [`${i}.png`, `${i}.rejected.png`])
      copyFileSync(join(paired, `${i}.png`), join(twins, name));
    writeFileSync(join(twins, `${i}.txt`), `picture ${i}`);
  }
  const made = async (path: string) => {
    const input = dpoRun('alike');
    const session = await sessionOf(
      await opened({ ...input, dataset: { ...dataset, path, caption_dropout_rate: 0.5, crops: 3 } }),
    );
    const all: PassInputs[] = [];
    for (let epoch = 0; epoch < 3; epoch++)
      all.push(await session.task.prepare({ bucket: 0, samples: [0, 1, 2, 3] }, epoch));
    t.same(
      Object.entries(session.task.blank({ bucket: 0, samples: [0, 1, 2, 3] })).map(([name, each]) => [
        name,
        each.shape,
        each.dtype,
      ]),
      Object.entries(all[0]).map(([name, each]) => [name, each.shape, each.dtype]),
    );
    session.release();
    return all;
  };
  for (const inputs of await made(twins))
    for (const [name, input] of Object.entries(inputs)) t.same(...halves(input), `of twins ${name}`);
  for (const inputs of await made(paired))
    for (const [name, input] of Object.entries(inputs)) {
      const [preferred, rejected] = halves(input);
      if (name === 'sample') t.notSame(preferred, rejected, 'pictures differ');
      else t.same(preferred, rejected, name);
    }
});

test('runs resume bit for bit', async (t) => {
  const before = device.memory.storages;
  const lora = { ...ofPairs('lora'), lora: { rank: 2, network_dropout: 0.2 } };
  await resumes(t, 'dpo-lora', {
    ...{ ...lora, objective: { snr_gamma: 5 }, validation: { samples: 2 } },
    previews: { prompts: ['stripes'], num_inference_steps: 1, every_steps: 2 },
  });
  const train: RunInput['train'] = { target: 'lora', method: 'dpo', q8: true, gradient_checkpointing: true };
  await resumes(t, 'dpo-q8', { ...lora, dtype: 'bfloat16', train });
  await resumes(t, 'dpo-unet', {
    ...ofPairs('unet'),
    ...{ gradient_accumulation_steps: 1, dataset: { ...dataset, shuffle_caption: true } },
    train: { method: 'dpo', fused_backward_pass: true, parts: ['attn2'] },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  const [[, first]] = losses(join(folder, 'dpo-unet-whole'));
  t.equal(
    Math.fround(first as number),
    Math.fround(Math.LN2),
    'it begins as the model, which prefers nothing',
  );
});

test('it learns what is preferred, in batches and by accumulation alike', async (t) => {
  // White pictures are preferred to black ones.
  const path = join(folder, 'white');
  mkdirSync(path);
  for (let i = 0; i < 4; i++) {
    const flat = (value: number) => ({
      ...{ width: 32, height: 32, channels: 3 as const },
      data: new Uint8Array(3 * 32 * 32).fill(value),
    });
    writePng(join(path, `${i}.png`), flat(255 - 5 * i));
    writePng(join(path, `${i}.rejected.png`), flat(5 * i));
    writeFileSync(join(path, `${i}.txt`), 'paper');
  }
  const of = async (name: string, batch_size: number, gradient_accumulation_steps: number) => {
    await run({
      ...{ ...dpoRun(name), batch_size, gradient_accumulation_steps, steps: 10, ema: { decay: 0 } },
      ...{ train: { method: 'dpo', parts: ['conv_out'] }, lora: {}, dpo: { beta_dpo: 50 } },
      dataset: { ...dataset, path, caption_dropout_rate: 0 },
      objective: { min_timestep: 300, max_timestep: 600 },
      ...{ optimizer: { lr: 1e-2, weight_decay: 0 }, lr_scheduler: { name: 'constant' } },
    });
    return losses(join(folder, name)).map(([, loss]) => loss as number);
  };
  const [whole, parts] = [await of('dpo-batch', 4, 1), await of('dpo-parts', 2, 2)];
  t.ok(
    whole.every((loss, i) => Math.abs(loss - parts[i]) < 1e-4 * loss),
    `${whole} ${parts}`,
  );
  const late = whole.slice(-4).reduce((sum, loss) => sum + loss / 4, 0);
  t.ok(late < 0.4, `far below log 2, where pairs are told apart: ${whole}`);
});

test('mistakes', async (t) => {
  const refuses = (what: string, input: RunInput, sentence: RegExp) =>
    t.rejects(opened(input), says(sentence), what);
  const sound = dpoRun('mistakes');
  for (const [more, sentence] of [
    [{ train: { method: 'dpo', target: 'controlnet' } }, /"dpo" is for the targets "unet" and "lora"/],
    [{ train: { method: 'dpo', target: 'vae' }, lora: {} }, /"dpo" is for the targets "unet" and "lora"/],
    [
      { train: { method: 'dpo', text_encoders: true }, lora: {} },
      /"train\.text_encoders" is of the method "diffusion"/,
    ],
    [{ dpo: { beta_dpo: 0 } }, /"dpo\.beta_dpo" is 0, .* such as 5000/],
    [{ objective: { loss: 'huber' } }, /"objective\.loss" is of the method "diffusion", .* "dpo"/],
    [{ objective: { masked_loss: true } }, /"objective\.masked_loss" is of the method "diffusion"/],
    [{ dataset: { ...dataset, class_data_dir: pictures } }, /"dataset\.class_data_dir" has no part in/],
    [{ dataset: { ...dataset, conditioning_image_column: 'x' } }, /"dataset\.conditioning_image_column" has/],
    [{ train: {}, lora: {}, dpo: { beta_dpo: 1 } }, /"dpo\.beta_dpo" is of Diffusion-DPO, .* "diffusion"/],
    [
      { train: {}, lora: {}, dataset: { ...dataset, rejected_image_column: 'x' } },
      /"dataset\.rejected_image_column" is of Diffusion-DPO/,
    ],
    [
      { train: {}, lora: {}, dataset: { ...dataset, label_column: 'x' } },
      /"dataset\.label_column" is of Diffusion-DPO/,
    ],
    [{ dataset: { ...dataset, label_column: 'x' } }, /dataset\.label_column is a column of parquet files/],
    [
      { dataset: { ...dataset, path: pictures } },
      /no picture with a caption and a rejected picture \(.*0\.png has no rejected picture 0\.rejected\.png beside it/,
    ],
  ] as const)
    await t.rejects(
      async () => opened({ ...sound, ...(more as RunInput) }),
      says(sentence),
      String(sentence),
    );

  const place = join(folder, 'misshapen');
  mkdirSync(place);
  writeFileSync(join(place, 'a.txt'), 'a');
  writePng(join(place, 'a.png'), picture(1, 48, 40));
  writePng(join(place, 'a.rejected.png'), picture(2, 40, 48));
  const input = { ...sound, dataset: { ...dataset, path: place } };
  await refuses(
    'another shape',
    input,
    /the rejected picture a\.rejected\.png is 40x48 and its picture a\.png 48x40: make it the picture's shape/,
  );
  writePng(join(place, 'a.rejected.png'), picture(2, 96, 80));
  const { hash } = await openPictures(resolveRun(input, 'test', 'test'), 32, silent);
  t.pass('a larger one of the same shape is made as small');
  writePng(join(place, 'a.rejected.png'), picture(3, 96, 80));
  const other = await openPictures(resolveRun(input, 'test', 'test'), 32, silent);
  t.not(other.hash, hash, 'a resumed run must see the same ones');
  rmSync(join(place, 'a.txt'));
  writeFileSync(
    join(place, 'metadata.jsonl'),
    JSON.stringify({ file_name: 'a.png', text: 'a', worse_file_name: 'a.rejected.png' }),
  );
  const named = { ...input, dataset: { ...input.dataset, rejected_image_column: 'worse' } };
  t.equal((await openPictures(resolveRun(named, 'test', 'test'), 32, silent)).samples.length, 1);
  await refuses('no column', input, /has no column "rejected"; its columns are/);
  t.same(readdirSync(place).sort(), ['a.png', 'a.rejected.png', 'metadata.jsonl']);
  const plan = planOf(await opened(sound));
  t.equal(plan.run.dataset.rejected_image_column, 'rejected');
});
