// Training inpainting models: how masks are drawn, and the gradients of a pass, against the peers (golden/inpainting_training.jsonl); runs
// that begin with a base model or with an inpainting one and resume bit for bit, what sdxl sample makes of them, and mistakes.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { writePng } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { maskOf, paintingIn, shownMasked } from '../../train/controls/inpainting.ts';
import { draws } from '../../train/data/draws.ts';
import { drawMask } from '../../train/data/random_mask.ts';
import { openMaterials } from '../../train/materials.ts';
import { openPictures, viewIn } from '../../train/pictures/pictures.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { sdxl } from '../support/command_line.ts';
import { disc, picture } from '../support/controlnet_golden.ts';
import { goldenFolder } from '../support/golden.ts';
import { writeInpainting, writeInstructPix2Pix } from '../support/inpainting_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { gradients, seeingGolden } from '../support/seeing_golden.ts';
import {
  basic,
  device,
  folder,
  locate,
  losses,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

const painter = writeInpainting(join(folder, 'painter'));
const editor = writeInstructPix2Pix(join(folder, 'editor'));

/** Two pictures of 64 x 64 with masks beside them. */
const masked = join(folder, 'masked');
mkdirSync(masked);
for (const [i, seed] of [4, 5].entries()) {
  writePng(join(masked, `${i}.png`), picture(seed, 64, 64));
  const data = Uint8Array.from({ length: 3 * 64 * 64 }, (_, at) => {
    const red = disc().data[Math.floor(at / 3)];
    return at % 3 ? 99 : i ? 255 - red : red;
  });
  writePng(join(masked, `${i}.conditioning_image.png`), { width: 64, height: 64, channels: 3, data });
  writeFileSync(join(masked, `${i}.txt`), 'stripes');
}

test("masks are drawn as often at each place as the peers'", (t) => {
  for (const each of seeingGolden) {
    if (!('mode' in each)) continue;
    const { mode, size, mean, deviation, rates } = each;
    const [h, w] = size;
    const count = mode === 'random_mask' ? 4000 : 200;
    const shares: number[] = [];
    const own = rates.map(() => 0);
    for (let i = 0; i < count; i++) {
      const mask = drawMask(mode, 0, size, draws(1, 0, i, 'mask'));
      shares.push(mask.reduce((sum, x) => sum + x, 0) / mask.length);
      own.forEach((_, k) => {
        const [y, x] = [h / 8 + (h / 4) * Math.floor(k / 4), w / 8 + (w / 4) * (k % 4)];
        own[k] += mask[Math.floor(y) * w + Math.floor(x)] / count;
      });
    }
    const average = shares.reduce((sum, x) => sum + x / count, 0);
    const spread = Math.sqrt(shares.reduce((sum, x) => sum + (x - average) ** 2 / count, 0));
    const off = Math.abs(average - mean);
    t.ok(off < (4 * deviation) / Math.sqrt(count), `${mode}: ${average} of the picture, theirs ${mean}`);
    t.ok(Math.abs(spread / deviation - 1) < 0.1, `${mode}: by ${spread}, theirs ${deviation}`);
    const worst = own.map(
      (rate, k) => Math.abs(rate - rates[k]) - 4.5 * Math.sqrt((rates[k] * (1 - rates[k])) / count),
    );
    t.ok(Math.max(...worst) <= 1e-9, `${mode}: ${own} and ${rates}`);
  }
  const whole = Array.from({ length: 1000 }, (_, i) =>
    drawMask('bbox', 0.25, [8, 8], draws(2, 0, i, 'mask')),
  );
  const rate = whole.filter((mask) => mask.every((x) => x === 1)).length / 1000;
  t.ok(Math.abs(rate - 0.25) < 0.05, `${rate} are whole`);
  t.end();
});

const beside = (output: string): RunInput => {
  const { dataset, ...input } = basic(output);
  return {
    ...{ ...input, model: painter, inpainting: { mask_mode: 'conditioning_image' } },
    dataset: { ...dataset, path: masked, resolution: 64 },
  };
};

test("a pass's gradients are diffusers', from files on", async (t) => {
  const own = resolveRun({ ...beside('gradients'), batch_size: 2 }, 'test', 'test');
  await gradients(t, 'inpainting', { own, model: painter, shown: shownMasked(own), controlOf: paintingIn });
});

const image = join(masked, '0.png');
const mask = join(masked, '0.conditioning_image.png');

const drawn = async (name: string, ...argv: string[]) => {
  const output = join(folder, `${name}.png`);
  const { status, err } = await sdxl(
    ...['sample', '--prompt', 'stripes', '--steps', '2', '--seed', '1', '--quiet', '--image', image],
    ...['--mask', mask, '--output', output, ...argv],
  );
  t0(status, `${name} ${err}`);
  return readFileSync(output);
};
const t0 = (status: number, what: string): void => {
  if (status !== 0) throw new Error(what);
};

test('a base model becomes an inpainting one, and the run resumes bit for bit', async (t) => {
  const before = device.memory.storages;
  const inpainting: RunInput['inpainting'] = { mask_mode: 'random_mask', full_mask_rate: 0.25 };
  const previews: RunInput['previews'] = {
    ...{ prompts: ['stripes', 'dots'], validation_image: [image], num_inference_steps: 1, every_steps: 2 },
  };
  const final = await resumes(t, 'painting', {
    ...{ inpainting, previews, validation: { samples: 2 } },
    train: { gradient_checkpointing: true },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  const json = (...path: string[]) => JSON.parse(readFileSync(join(final, ...path), 'utf8'));
  t.equal(json('unet', 'config.json').in_channels, 9);
  t.equal(json('model_index.json')._class_name, 'StableDiffusionXLInpaintPipeline');
  t.same(readdirSync(join(folder, 'painting-whole', 'previews', 'step-00000002')), ['0.png', '1.png']);
  await drawn('learnt', '--model', final);
  const exported = join(folder, 'exported');
  const checkpoint = join(folder, 'painting-whole', 'checkpoints', 'step-00000003');
  t0((await sdxl('export', checkpoint, exported, '--ema', '--quiet')).status, 'export');
  const unetOf = (path: string) => readFileSync(join(path, 'unet', 'diffusion_pytorch_model.safetensors'));
  t.ok(unetOf(exported).equals(unetOf(final)));

  // Without a learning rate it is the base model behind zeros, and says what that says.
  const still = { ...basic('still'), steps: 1, optimizer: { lr: 0 }, ema: { decay: 0 } };
  const plain = await run(still);
  const { folder: zeros } = await run({ ...still, output: join(folder, 'zeros'), inpainting });
  const [[, a], [, b]] = [losses(join(folder, 'still'))[0], losses(join(folder, 'zeros'))[0]];
  t.ok(Math.abs(Number(a) / Number(b) - 1) < 3e-6, `the first loss ${b}, without a mask ${a}`);
  const [base, wide] = [plain.folder, zeros].map((path) => openModel(path).weights('unet'));
  for (const key of nonEmpty(base.names.filter((each) => each !== 'conv_in.weight')))
    if (!Buffer.from(base.bytes(key)).equals(Buffer.from(wide.bytes(key)))) t.fail(key);
  const [four, nine] = [base.floats('conv_in.weight'), wide.floats('conv_in.weight')];
  t.same([four.length, nine.length], [16 * 4 * 9, 16 * 9 * 9]);
  t.ok(nine.every((x, at) => x === (at % 81 < 36 ? four[36 * Math.floor(at / 81) + (at % 81)] : 0)));
  for (const weights of [base, wide]) weights.close();
});

test("LoRA on an inpainting model, by the dataset's masks, with a loss that these weigh", async (t) => {
  const { output: _, ...input } = beside('');
  const final = await resumes(t, 'painting-lora', {
    ...{ ...input, steps: 2, batch_size: 1, train: { target: 'lora' } },
    objective: { masked_loss: true },
    previews: { prompts: ['stripes'], num_inference_steps: 1, every_steps: 2 },
  });
  const free = await drawn('free', '--model', painter);
  t.notOk(free.equals(await drawn('adapted', '--model', painter, '--lora', `${final}:20`)));
});

test('each version of a picture has a mask of its own, which its name in the cache tells', async (t) => {
  const settings: RunInput = { ...basic('versions'), inpainting: { mask_mode: 'irregular' } };
  const own = resolveRun(settings, 'test', 'test');
  const pictures = await openPictures(own, 32, silent);
  const views = [0, 1, 2].map((epoch) => viewIn(epoch, 0, pictures, own));
  const masks = await Promise.all(views.map((view) => maskOf(own, view)));
  t.notSame(masks[0], masks[1]);
  t.same(masks[2], masks[0], 'dataset.crops is 2');
  const names = (run: typeof own) => views.map((view) => JSON.stringify(shownMasked(run).nameOf(view)));
  t.equal(new Set(names(own)).size, 2);
  const [place] = views;
  const versions = [0, 1].map((variant) => JSON.stringify(shownMasked(own).nameOf({ ...place, variant })));
  t.not(versions[0], versions[1], 'also where both show the same part of the picture');
  const other = resolveRun({ ...settings, seed: 4 }, 'test', 'test');
  t.ok(names(other).every((name) => !names(own).includes(name)));
  const plan = planOf(await openMaterials(own, locate, silent));
  t.match(describe(plan).join('\n'), /trained +unet, an inpainting model \(irregular masks\)/);
});

test('a preview paints in part of a picture, and all where there is none', (t) => {
  const own = resolveRun({ ...basic('look'), inpainting: { mask_mode: 'bbox' } }, 'test', 'test');
  const pipeline = loadPipeline(openModel(painter), { device, dtype: 'float32' });
  const { preview } = paintingIn(own, pipeline, () => {
    throw new Error('no latents are asked for');
  });
  const marked = (image?: ReturnType<typeof picture>) => {
    const { mask } = preview({ width: 64, height: 64, seed: 3 } as Parameters<typeof preview>[0], image);
    return mask?.data.reduce((sum, x) => sum + x, 0) ?? 0;
  };
  t.equal(marked(), 64 * 64);
  const part = marked(picture(4, 64, 64));
  t.ok(part > 0 && part < 64 * 64, `${part} of ${64 * 64} pixels`);
  pipeline.release();
  t.end();
});

test('mistakes', async (t) => {
  const refuses = async (input: RunInput, message: RegExp) => {
    const opening = async () => {
      const materials = await openMaterials(resolveRun(input, 'run.ts', 'test'), locate, silent);
      (await sessionOf(materials)).release();
    };
    await t.rejects(opening(), { name: 'UserError', message });
  };
  const inpainting: RunInput['inpainting'] = { mask_mode: 'bbox' };
  const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
  const { inpainting: _, ...unmasked } = beside('x');
  const token = { placeholder_token: '<x>', initializer_token: 'a' };
  for (const [more, message] of [
    [
      { model: editor },
      /editor is an InstructPix2Pix model, .*; say with dataset\.original_image_column where that is/,
    ],
    [{ model: painter }, /painter is an inpainting model, .* say with inpainting\.mask_mode/],
    [
      { model: painter, train: { method: 'esd' } },
      /painter is an inpainting model, .*, which the method "diffusion" trains, and train\.method is "esd"/,
    ],
    [
      { model: painter, train: { target: 'controlnet' }, dataset: { path: masked } },
      /trains it with target "unet" or "lora", not "controlnet"/,
    ],
    [
      { model: painter, train: { target: 'textual_inversion' }, textual_inversion: token },
      /not "textual_inversion"; begin with a base model/,
    ],
    [
      { inpainting, train: { target: 'lora' } },
      /the UNet of .* takes 4 channels, so it is not an inpainting model; begin with one such as .*, or make one with train\.target "unet"/,
    ],
    [{ inpainting, model: refiner }, /is a refiner, which does not become an inpainting model/],
    [{ inpainting, train: { parts: ['attn2'] } }, /which train\.parts \["attn2"\] leaves at zero/],
    [
      { inpainting, train: { target: 'vae' } },
      /"inpainting\.mask_mode" is of inpainting models, .* "train\.target" is "vae"/,
    ],
    [{ inpainting: { full_mask_rate: 0.5 } }, /"inpainting\.full_mask_rate" is of masks that are drawn/],
    [
      { inpainting: { mask_mode: 'conditioning_image', full_mask_rate: 0.5 } },
      /"inpainting\.full_mask_rate" is of masks that are drawn/,
    ],
    [
      { inpainting: { mask_mode: 'conditioning_image' } },
      /has no conditioning image 0\.conditioning_image\.png beside it/,
    ],
    [
      { previews: { prompts: ['a'], validation_image: [image] } },
      /is for what is trained to follow images, or for an inpainting or InstructPix2Pix model/,
    ],
    [
      { inpainting, previews: { prompts: ['a', 'b', 'c'], validation_image: [image, image] } },
      /has 3 and "previews\.validation_image" 2/,
    ],
  ] as const)
    await refuses({ ...basic('x'), ...more } as RunInput, message);
  await refuses(
    { ...unmasked, inpainting, dataset: { ...unmasked.dataset, conditioning_image_column: 'x' } },
    /masks for "inpainting\.mask_mode", which is not "conditioning_image"/,
  );
});
