// What is done with a mask before and after a picture is drawn, as A1111 does it (golden/a1111_masks.jsonl), and through the command line.
import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { preprocessMask, readPicture, writePng } from '../../io/image.ts';
import { blurMask } from '../../io/mask_blur.ts';
import { layBack } from '../../io/mask_crop.ts';
import { fillMasked } from '../../io/mask_fill.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import { readPngText } from '../../io/png.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { sdxl } from '../support/command_line.ts';
import { disc } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';

interface Case {
  size: [width: number, height: number];
  sigma: number;
  box: [left: number, top: number, right: number, bottom: number];
  blurred: string;
  filled: string;
  laid_back: string;
}

const levels = (length: number, factor: number) =>
  Uint8Array.from({ length }, (_, i) => Math.floor((factor * i * i + 31 * i) / 8) % 256);
const digest = ({ data }: Picture | Mask) => createHash('sha256').update(data).digest('hex');

for (const golden of goldenLines<Case>('a1111_masks')) {
  const [width, height] = golden.size;
  test(`a mask in ${width}x${height}, softened by ${golden.sigma}, as OpenCV and Pillow have it`, (t) => {
    const [picture, drawn] = [7, 5].map(
      (factor): Picture => ({ width, height, channels: 3, data: levels(3 * width * height, factor) }),
    );
    const [left, top, right, bottom] = golden.box;
    const data = levels(width * height, 3).map((grey, i) => {
      const [x, y] = [i % width, Math.floor(i / width)];
      if (x < left || x >= right || y < top || y >= bottom) return 0;
      return grey < 32 ? grey : 255;
    });
    const soft = blurMask({ width, height, channels: 1, data }, golden.sigma);
    t.equal(digest(soft), golden.blurred, 'blurred');
    t.equal(digest(fillMasked(picture, soft)), golden.filled, 'filled');
    t.equal(digest(layBack(picture, soft, drawn)), golden.laid_back, 'laid back');
    t.end();
  });
}

const model = join(goldenFolder, 'tiny-sdxl');

test('latents under a mask begin as noise or as nothing', async (t) => {
  const pipeline = loadPipeline(openModel(model), { device: devices[0], dtype: 'float32' });
  const numbers = (seed: number) => new TorchGenerator(seed).randn(4 * 8 * 8);
  const mask = preprocessMask(disc());
  const marked = (i: number) => mask.data[Math.floor((i % 64) / 8) * 8 * 64 + (i % 8) * 8] === 1;
  const drawn = async (data: Float32Array, more: Partial<Asked>) => {
    const { latents } = await denoiseToEnd(pipeline, {
      ...{ prompt: 'a fox', num_inference_steps: 4, strength: 0.8, width: 64, height: 64, mask },
      ...{ image: { shape: [1, 4, 8, 8], data }, generators: [new TorchGenerator(3)], ...more },
    });
    return latents.data;
  };
  const [picture, noise] = [numbers(1), numbers(3)];
  const plain = await drawn(picture, {});
  for (const [masked_content, under] of [
    ['latent-noise', noise],
    ['latent-nothing', new Float32Array(256)],
  ] as const) {
    // Latents that are a caller's own are compared with diffusers in starts.test.ts.
    const own = picture.map((value, i) => (marked(i) ? under[i] : value));
    const got = await drawn(picture, { masked_content });
    t.equal(maxDifference(got, await drawn(own, {})), 0, masked_content);
    t.ok(maxDifference(got, plain) > 0.01);
  }
  pipeline.release();
});

test('sdxl sample fills, softens and lays back', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-masks-'));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  const at = (name: string) => join(folder, `${name}.png`);
  const [width, height] = [64, 72];
  const picture: Picture = { width, height, channels: 3, data: levels(3 * width * height, 7) };
  const black = (i: number) => i % width >= 20 && i % width < 44 && i >= 30 * width && i < 50 * width;
  const data = Uint8Array.from({ length: width * height }, (_, i) => (black(i) ? 0 : 255));
  const mask: Mask = { width, height, channels: 1, data };
  const soft = blurMask({ ...mask, data: data.map((level) => 255 - level) }, 3);
  for (const [name, pixels] of Object.entries({ picture, mask, soft, filled: fillMasked(picture, soft) }))
    writePng(at(name), pixels);
  const asked = ['-m', model, '-p', 'x', '--steps', '4', '-s', '1', '--strength', '0.5', '--quiet'];
  const sample = async (name: string, ...flags: string[]) => {
    const { status, err } = await sdxl('sample', ...flags, '-o', at(name));
    t.equal(status, 0, err);
    return readPicture(at(name));
  };
  const own = await sample('own', ...asked, '-i', at('filled'), '--mask', at('soft'));
  const said = ['--invert-mask', '--mask-blur', '3', '--masked-content', 'fill'];
  const got = await sample('got', ...asked, '-i', at('picture'), '--mask', at('mask'), ...said);
  t.equal(maxDifference(got.data, layBack(picture, soft, own).data), 0);
  t.match(
    readPngText(at('got')).parameters,
    'Denoising strength: 0.5, Mask mode: Inpaint not masked, Mask blur: 3, Masked content: fill, ',
  );
  await sample('again', '--from', at('got'), '--quiet');
  t.ok(readFileSync(at('again')).equals(readFileSync(at('got'))), 'and again by its settings');

  const part = ['--padding-mask-crop', '4', '--masked-content', 'latent-noise', '--mask-blur', '2'];
  const cropped = await sample(
    'part',
    ...asked,
    '-W',
    '64',
    '-H',
    '64',
    '-i',
    at('picture'),
    '--mask',
    at('mask'),
    '--invert-mask',
    ...part,
  );
  t.same([cropped.width, cropped.height], [width, height]);
  const beside = (i: number) => i % width < 12 || i >= 60 * width;
  const changed = cropped.data.filter((level, i) => beside(Math.floor(i / 3)) && level !== picture.data[i]);
  t.equal(changed.length, 0, 'a part of it');
  t.match(
    readPngText(at('part')).parameters,
    'Mask blur: 2, Inpaint area: Only masked, Masked area padding: 4, Masked content: latent noise, ',
  );

  const alone = await sdxl('sample', ...asked, '-i', at('picture'), '--mask-blur', '4');
  t.equal(alone.status, 2);
  t.match(alone.err, /--mask-blur needs --mask/);
});
