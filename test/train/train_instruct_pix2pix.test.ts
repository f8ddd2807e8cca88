// Training InstructPix2Pix models: the gradients of a pass against diffusers' (golden/inpainting_training.jsonl), what is left away and how
// often, a run that begins with a base model and resumes bit for bit, LoRA on one, what sdxl sample makes of it, and mistakes.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { writePng } from '../../io/image.ts';
import { droppedOf, editing, shownOriginal } from '../../train/controls/instruct_pix2pix.ts';
import { openMaterials } from '../../train/materials.ts';
import { openPictures, viewIn } from '../../train/pictures/pictures.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { sdxl } from '../support/command_line.ts';
import { picture } from '../support/controlnet_golden.ts';
import { writeInpainting, writeInstructPix2Pix } from '../support/inpainting_golden.ts';
import { gradients } from '../support/seeing_golden.ts';
import { basic, device, folder, locate, resumes, sessionOf, silent } from '../support/small_runs.ts';

const editor = writeInstructPix2Pix(join(folder, 'editor'));

/** Two pictures of 64 x 64 with what they were made from in a column. */
const edited = join(folder, 'edited');
mkdirSync(edited);
const rows = [4, 5].map((seed, i) => {
  writePng(join(edited, `${i}.png`), picture(seed + 4, 64, 64));
  writePng(join(edited, `before-${i}.png`), picture(seed, 64, 64));
  return JSON.stringify({ file_name: `${i}.png`, text: 'make it new', original_image: `before-${i}.png` });
});
writeFileSync(join(edited, 'metadata.jsonl'), rows.join('\n'));
const image = join(edited, 'before-0.png');

const editRun = (output: string): RunInput => {
  const { dataset, ...input } = basic(output);
  return {
    ...{ ...input, steps: 3, batch_size: 1 },
    dataset: { ...dataset, path: edited, resolution: 64, original_image_column: 'original_image' },
  };
};

test("a pass's gradients are diffusers', from files on", async (t) => {
  const own = resolveRun({ ...editRun('gradients'), batch_size: 2 }, 'test', 'test');
  await gradients(t, 'instruct_pix2pix', {
    ...{ own, model: editor, shown: shownOriginal(own), controlOf: editing },
  });
});

test('captions, pictures and both are left away at one rate', async (t) => {
  const settings = editRun('dropped');
  const dataset = { ...settings.dataset, conditioning_dropout_prob: 0.2, caption_dropout_rate: 0 };
  const own = resolveRun({ ...settings, dataset }, 'test', 'test');
  const pictures = await openPictures(own, 32, silent);
  const view = viewIn(0, 0, pictures, own);
  const counts = { neither: 0, caption: 0, image: 0, both: 0 };
  const epochs = Array.from({ length: 2000 }, (_, epoch) => epoch);
  for (const epoch of epochs) {
    const { caption, image } = droppedOf(own, view, epoch);
    counts[caption && image ? 'both' : caption ? 'caption' : image ? 'image' : 'neither']++;
  }
  for (const [what, count] of Object.entries(counts))
    t.ok(Math.abs(count / 2000 - (what === 'neither' ? 0.4 : 0.2)) < 0.04, `${what}: ${count} of 2000`);

  const session = await sessionOf(await openMaterials(own, locate, silent));
  const isZero = (values: ArrayLike<number>) => Array.from(values).every((x) => x === 0);
  for (const kind of ['neither', 'caption', 'image', 'both']) {
    const epoch = epochs.find((each) => {
      const { caption, image } = droppedOf(own, view, each);
      return caption === /caption|both/.test(kind) && image === /image|both/.test(kind);
    });
    const { beside, context, pooled } = await session.task.prepare(
      { bucket: 0, samples: [0] },
      Number(epoch),
    );
    t.equal(isZero(beside.values), /image|both/.test(kind), `${kind}: the picture`);
    t.equal(
      isZero(context.values) && isZero(pooled.values),
      /caption|both/.test(kind),
      `${kind}: the caption`,
    );
  }
  session.release();
});

test('a base model learns to edit, LoRA on one too; runs resume bit for bit', async (t) => {
  const before = device.memory.storages;
  const { output: _, ...input } = editRun('');
  const dataset = { ...input.dataset, conditioning_dropout_prob: 0.1 };
  const previews = { prompts: ['make it new'], validation_image: [image], num_inference_steps: 1 };
  const final = await resumes(t, 'editing', { ...input, dataset, previews });
  t.equal(device.memory.storages, before, 'live tensors');
  const json = (...path: string[]) => JSON.parse(readFileSync(join(final, ...path), 'utf8'));
  t.equal(json('unet', 'config.json').in_channels, 8);
  t.equal(json('model_index.json')._class_name, 'StableDiffusionXLInstructPix2PixPipeline');
  const adapter = await resumes(t, 'editing-lora', {
    ...{ ...input, steps: 2, model: editor, train: { target: 'lora' }, previews: {} },
  });
  const drawn = async (...argv: string[]) => {
    const output = join(folder, 'drawn.png');
    const { status, err } = await sdxl(
      ...['sample', '--prompt', 'make it new', '--steps', '2', '--seed', '1', '--quiet'],
      ...['--image', image, '--output', output, ...argv],
    );
    t.equal(status, 0, err);
  };
  await drawn('--model', final);
  await drawn('--model', editor, '--lora', `${adapter}:20`);
  const plan = planOf(await openMaterials(resolveRun(editRun('planned'), 'test', 'test'), locate, silent));
  t.match(describe(plan).join('\n'), /trained +unet, an InstructPix2Pix model:/);
});

test('mistakes', async (t) => {
  const refuses = async (more: RunInput, message: RegExp) => {
    const { dataset, ...input } = editRun('x');
    const opening = async () =>
      openMaterials(
        resolveRun({ ...input, ...more, dataset: { ...dataset, ...more.dataset } }, 'run.ts', 'test'),
        locate,
        silent,
      );
    await t.rejects(opening(), { name: 'UserError', message });
  };
  const none = { original_image_column: '' };
  for (const [more, message] of [
    [{ model: editor, dataset: none }, /say with dataset\.original_image_column where that is/],
    [
      { dataset: { ...none, conditioning_dropout_prob: 0.1 } },
      /"dataset\.conditioning_dropout_prob" is of InstructPix2Pix models/,
    ],
    [
      { train: { target: 'lora' } },
      /takes 4 channels, so it is not an InstructPix2Pix model; .* make one with/,
    ],
    [{ train: { target: 'controlnet' } }, /see, for the targets "unet" and "lora", and "train\.target" is/],
    [{ inpainting: { mask_mode: 'bbox' } }, /see, and "inpainting\.mask_mode" does not go with that/],
    [{ objective: { masked_loss: true } }, /and "objective\.masked_loss" does not go with that/],
    [{ dataset: { conditioning_image_column: 'x' } }, /and "dataset\.conditioning_image_column" does not go/],
    [{ dataset: { class_data_dir: 'x' } }, /and "dataset\.class_data_dir" does not go with that/],
    [{ dataset: { original_image_column: 'x' } }, /has no column "x"/],
    [{ previews: { prompts: ['a'] } }, /"previews\.prompts" has 1 and "previews\.validation_image" 0/],
    [
      { model: writeInpainting(join(folder, 'painter')) },
      /painter is an inpainting model, .* say with inpainting/,
    ],
  ] as const)
    await refuses(more as RunInput, message);
});
