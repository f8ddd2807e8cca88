// Masked loss: masks of latents, which follow their pictures' crops and mirroring; runs under white and half masks, of images beside
// the pictures and of their own alpha; mistakes.
import { copyFileSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import sharp from 'sharp';
import { type Test, test } from 'tap';
import { writePng } from '../../io/image.ts';
import { latentMask } from '../../train/controls/mask.ts';
import { openMaterials } from '../../train/materials.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { picture } from '../support/controlnet_golden.ts';
import { basic, folder, locate, losses, resumes, run, sessionOf, silent } from '../support/small_runs.ts';

/** Four pictures of 64 x 32, each with a mask that is as white as `red` says of a column. */
function place(name: string, red: (x: number) => number): string {
  const path = join(folder, name);
  mkdirSync(path);
  for (let i = 0; i < 4; i++) {
    const mask = Uint8Array.from({ length: 3 * 64 * 32 }, (_, at) => (at % 3 ? 77 : red((at / 3) % 64)));
    writePng(join(path, `${i}.png`), picture(i, 64, 32));
    writePng(join(path, `${i}.conditioning_image.png`), { width: 64, height: 32, channels: 3, data: mask });
    writeFileSync(join(path, `${i}.txt`), `picture ${i}`);
  }
  return path;
}
const halfRed = (x: number) => (x < 44 ? 255 : 0);
const [white, half] = [place('white', () => 255), place('half', halfRed)];

/** The pictures alone. */
const bare = join(folder, 'bare');
mkdirSync(bare);
for (const name of readdirSync(white).filter((name) => !name.includes('conditioning')))
  copyFileSync(join(white, name), join(bare, name));

/** The same pictures with the red of their masks as their alpha. */
async function transparent(name: string, red: (x: number) => number): Promise<string> {
  const path = join(folder, name);
  mkdirSync(path);
  for (let i = 0; i < 4; i++) {
    const { data } = picture(i, 64, 32);
    const rgba = Uint8Array.from({ length: 4 * 64 * 32 }, (_, at) => {
      const pixel = Math.floor(at / 4);
      return at % 4 === 3 ? red(pixel % 64) : data[3 * pixel + (at % 4)];
    });
    await sharp(rgba, { raw: { width: 64, height: 32, channels: 4 } }).toFile(join(path, `${i}.png`));
    writeFileSync(join(path, `${i}.txt`), `picture ${i}`);
  }
  return path;
}

const maskedRun = (output: string, path: string, masked_loss = true): RunInput => ({
  ...basic(output),
  ...{ steps: 2, ema: { decay: 0 }, objective: { masked_loss } },
  dataset: { ...basic(output).dataset, path },
});

test('a latent counts as its pixels do on average, by their red', (t) => {
  const image = Float32Array.from({ length: 2 * 4 * 3 }, (_, i) => (i % 3 === 0 ? i / 3 / 8 : 0.5));
  t.same([...latentMask(image, [2, 4], 2)], [(0 + 1 + 4 + 5) / 32, (2 + 3 + 6 + 7) / 32]);
  t.end();
});

for (const alpha_mask of [false, true])
  test(`${alpha_mask ? 'alpha' : 'a mask'} follows the crop and the mirroring of its picture`, (t) =>
    follows(t, alpha_mask));

async function follows(t: Test, alpha_mask: boolean): Promise<void> {
  const path = alpha_mask ? await transparent('followed-alpha', halfRed) : half;
  const input = maskedRun('followed', path);
  const own = resolveRun(
    // Moments have the bits of pictures that were encoded as many at once, so these are kept from the runs below.
    { ...input, dataset: { ...input.dataset, cache: join(folder, 'followed'), crops: 4, alpha_mask } },
    'test',
    'test',
  );
  const session = await sessionOf(await openMaterials(own, locate, silent));
  const counts = new Set<string>();
  for (let epoch = 0; epoch < 4; epoch++) {
    const { mask, timeIds } = await session.task.prepare({ bucket: 0, samples: [0, 1, 2, 3] }, epoch);
    t.same([mask.shape, mask.dtype], [[4, 4, 4, 1], 'float32']);
    for (let i = 0; i < 4; i++) {
      // The crop's left is told as if the picture had been mirrored first.
      const left = timeIds.values[6 * i + 3];
      const squares = Array.from({ length: 16 }, (_, k) => mask.values[16 * i + k] ** 2);
      const wanted = (mirrored: boolean) =>
        Array.from({ length: 16 }, (_, k) => {
          const columns = Array.from({ length: 8 }, (_, x) => left + 8 * (k % 4) + x);
          return columns.filter((x) => (mirrored ? 63 - x : x) < 44).length / 8;
        });
      const near = (values: number[]) => values.every((x, k) => Math.abs(x - squares[k]) < 1e-6);
      const found = [false, true].filter((mirrored) => near(wanted(mirrored)));
      t.ok(found.length > 0, `epoch ${epoch}, picture ${i}, a crop at ${left}: ${squares.slice(0, 4)}`);
      counts.add(squares.slice(0, 4).join());
    }
  }
  t.ok(counts.size > 4, 'crops differ');
  session.release();
}

test('a white mask changes no bit, a half one what is learnt; runs resume', async (t) => {
  const of = async (name: string, path: string, masked: boolean) => {
    await run(maskedRun(name, path, masked));
    return losses(join(folder, name)).map(([, loss]) => loss as number);
  };
  const [free, whole, part] = [
    await of('free', bare, false),
    await of('whole', white, true),
    await of('part', half, true),
  ];
  t.same(whole, free);
  t.ok(part[0] < free[0] && part[0] > 0, `${part[0]} of ${free[0]}`);
  const { output: _, ...resumed } = maskedRun('', half);
  await resumes(t, 'masked', resumed);
});

const alphaRun = (output: string, path: string): RunInput => {
  const { dataset, ...input } = maskedRun(output, path);
  return { ...input, dataset: { ...dataset, alpha_mask: true } };
};

test("a picture's alpha counts as a mask beside it would, over the colours that are stored beneath", async (t) => {
  const levels = (x: number) => (x < 30 ? 255 : 4 * (63 - x));
  const [beside, alpha] = [place('levels', levels), await transparent('levels-alpha', levels)];
  // What lies on white stands in the cache, under another name.
  await run(maskedRun('on-white', alpha, false));
  await run(maskedRun('beside', beside));
  await run(alphaRun('alpha', alpha));
  const [onWhite, want, got] = ['on-white', 'beside', 'alpha'].map((name) => losses(join(folder, name)));
  t.same(got, want, 'bit for bit');
  t.notSame(got, onWhite);
  await run(alphaRun('opaque', bare));
  t.same(
    losses(join(folder, 'opaque')),
    losses(join(folder, 'free')),
    'without alpha a picture counts wholly',
  );
  const { output: _, ...resumed } = alphaRun('', alpha);
  await resumes(t, 'alpha-mask', resumed);
  const stopped = await run(alphaRun('switched', alpha), { until: 1 });
  await t.rejects(run(maskedRun('switched', alpha, false), { checkpoint: stopped.folder }), {
    name: 'UserError',
    message: /is of another run: dataset\.alpha_mask was true and is false/,
  });
});

test("pictures of a class count by their own alpha, as kohya's do", async (t) => {
  const alpha = await transparent('class-alpha', halfRed);
  const input = alphaRun('class', bare);
  const dataset = {
    ...input.dataset,
    class_data_dir: alpha,
    class_prompt: 'stripes',
    center_crop: true,
    random_flip: false,
  };
  const own = resolveRun({ ...input, dataset }, 'test', 'test');
  const session = await sessionOf(await openMaterials(own, locate, silent));
  const { mask } = await session.task.prepare({ bucket: 0, samples: [0, 4] }, 0);
  const [first, second] = [mask.values.subarray(0, 16), mask.values.subarray(16)];
  t.ok(
    first.every((x) => x === 1),
    'plain',
  );
  const columns = Array.from({ length: 16 }, (_, i) => (i % 4 === 3 ? 0.5 : 1));
  t.ok(
    second.every((x, i) => Math.abs(x ** 2 - columns[i]) < 1e-7),
    `of the class: ${second}`,
  );
  session.release();
});

test('mistakes', async (t) => {
  for (const [more, sentence] of [
    [
      { train: { target: 'controlnet' } },
      /"objective\.masked_loss" is for the targets "unet", "lora" and "textual_inversion"/,
    ],
    [
      { train: { target: 'vae' } },
      /"objective\.masked_loss" is for the targets "unet", "lora" and "textual_inversion"/,
    ],
    [
      { objective: {}, dataset: { conditioning_image_column: 'mask' } },
      /masks for "objective\.masked_loss", which is off; leave it out/,
    ],
  ] as const)
    t.throws(() => resolveRun({ ...maskedRun('x', half), ...more }, 'run.ts', 'test'), { message: sentence });
  for (const [more, dataset, sentence] of [
    [
      { objective: {} },
      {},
      /^run\.ts: "dataset\.alpha_mask" makes .* mask of "objective\.masked_loss", which is off/,
    ],
    [
      { objective: {}, train: { target: 'controlnet' } },
      {},
      /"dataset\.alpha_mask" is for the targets "unet", "lora" and/,
    ],
    [
      { objective: {}, train: { target: 'vae' } },
      {},
      /"dataset\.alpha_mask" .* "train\.target" is "vae"; leave/,
    ],
    [{}, { conditioning_image_column: 'mask' }, /"dataset\.conditioning_image_column" each name a mask/],
  ] as const) {
    const { dataset: own, ...input } = alphaRun('x', half);
    t.throws(() => resolveRun({ ...input, ...more, dataset: { ...own, ...dataset } }, 'run.ts', 'test'), {
      message: sentence,
    });
  }
  const huber = { ...maskedRun('huber', half), objective: { masked_loss: true, loss: 'huber' as const } };
  const materials = await openMaterials(resolveRun(huber, 'run.ts', 'test'), locate, silent);
  await t.rejects(sessionOf(materials), { message: /objective\.masked_loss weighs each place/ });
});
