// Previews of sdxl sample: each shows what decoding that step's prediction gives, the last one is the picture, and the picture is
// what it is without them, bit for bit; what is wrong with them is one sentence. (Between the
// replays of a GPU's step: cuda_models.test.ts.)
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { openPreviews, type PreviewOptions } from '../../cli/sample/preview.ts';
import { openDevice } from '../../engine/device.ts';
import { readPicture, toPictures } from '../../io/image.ts';
import { openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { autoencoder } from '../../models/vae/autoencoder.ts';
import { latentRgb } from '../../models/vae/latent_rgb.ts';
import { decodeLatents, type Latents } from '../../models/vae/latents.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { allClose, goldenFolder, maxDifference } from '../support/golden.ts';
import { tinyConfig, writeTiny } from '../support/tiny_autoencoder.ts';

const model = join(goldenFolder, 'tiny-sdxl');

/** A call in a folder of its own, on the CPU unless told otherwise, and where its files lie. */
function setting(t: Test) {
  const folder = t.testdir();
  const [preview, output, tae] = ['preview.png', 'out.png', 'tae'].map((name) => join(folder, name));
  writeTiny(tae);
  const draw = (...more: string[]) =>
    sdxl(
      ...['sample', '--model', model, '--prompt', 'a red fox', '--seed', '7', '--steps', '3', '--quiet'],
      ...['--width', '64', '--height', '64', '--device', 'cpu', '--output', output, ...more],
    );
  return { folder, preview, output, tae, draw };
}

test('the projection of latents is a matrix and a bias, per pixel', (t) => {
  // Of one channel alone: ComfyUI's factors of that channel, beside its bias.
  const shape = [2, 4, 1, 1] as const;
  const rgb = latentRgb({ shape, data: Float32Array.of(1, 0, 0, 0, 0, 0, 0, -2) });
  t.same(rgb.shape, [2, 3, 1, 1]);
  const bias = [0.1084, -0.0175, -0.0011];
  const first = [0.3651, 0.4232, 0.4341].map((f, i) => f + bias[i]);
  const last = [-0.3165, -0.2492, -0.2188].map((f, i) => -2 * f + bias[i]);
  allClose(t, 'channels 0 and 3', rgb.data, [...first, ...last], { atol: 1e-6, rtol: 0 });
  // Where a pixel lies it stays: the second of three has channels 1 and 2.
  const row = latentRgb({ shape: [1, 4, 1, 3], data: Float32Array.of(0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0) });
  const second = [-0.2533 + 0.1076, -0.0042 + 0.1111, 0.1068 - 0.0362];
  const at = [0, 1, 2].flatMap((c) => [bias[c], bias[c] + second[c], bias[c]]);
  allClose(t, 'channels 1 and 2', row.data, at, { atol: 1e-6, rtol: 0 });
  t.end();
});

test('a preview is the decoded prediction of its step, and the picture stays what it is', async (t) => {
  const { folder, preview, output, tae, draw } = setting(t);
  t.match(await draw(), { status: 0, err: '' });
  const alone = readFileSync(output);

  const device = openDevice('cpu');
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  const coder = autoencoder(tinyConfig);
  openComponent(tae).load('vae', coder.module, device, 'float32');
  const predicted: Latents[] = [];
  await denoiseToEnd(
    pipeline,
    {
      ...{ prompt: ['a red fox'], width: 64, height: 64, num_inference_steps: 3, guidance_scale: 5 },
      generators: [new TorchGenerator(7)],
    },
    ({ predOriginalSample }) => predicted.push(predOriginalSample()),
  );
  const wanted = {
    proj: (latents: Latents) => latentRgb(latents),
    tae: (latents: Latents) => decodeLatents(coder, latents),
    vae: (latents: Latents) => decodeLatents(pipeline.vae, latents),
  };
  for (const [method, decoded] of Object.entries(wanted)) {
    const more = method === 'tae' ? ['--tae', tae] : [];
    const shown = ['--preview', method, ...more, '--preview-path', preview, '--preview-interval', '2'];
    t.match(await draw(...shown), { status: 0, err: '' });
    t.ok(readFileSync(output).equals(alone), `${method}: the picture, settings and all`);
    const { data, shape } = decoded(predicted[1]);
    const [want] = toPictures(data, shape);
    const got = await readPicture(preview);
    t.same([got.width, got.height], [want.width, want.height], `${method}: its size`);
    t.equal(maxDifference(got.data, want.data), 0, `${method}: step 2 of 3`);
  }
  pipeline.release();

  t.match(await draw('--preview', 'vae', '--preview-path', preview), { status: 0 });
  const [last, final] = [await readPicture(preview), await readPicture(output)];
  t.equal(maxDifference(last.data, final.data), 0, 'the last preview is the picture');
  t.same(readdirSync(folder).sort(), ['out.png', 'preview.png', 'tae'], 'nothing else is left');
  t.end();
});

test('several pictures are shown side by side, through a refiner too', async (t) => {
  const { preview, draw } = setting(t);
  const refiner = ['--refiner', join(goldenFolder, 'tiny-sdxl-refiner'), '--denoising-end', '0.6'];
  const shown = ['--preview', 'proj', '--preview-path', preview];
  t.match(await draw(...shown, '--num-images', '3', ...refiner), { status: 0, err: '' });
  const { width, height } = await readPicture(preview);
  t.same([width, height], [2 * 8 + 3 * 4, 2 * 8 + 3 * 4], 'two rows of two, of 8 pixels, 4 between them');
  t.end();
});

test('where a preview cannot be written the run goes on', async (t) => {
  const folder = t.testdir();
  const lines: string[] = [];
  const options: PreviewOptions = { preview: 'proj', previewPath: join(folder, 'gone', 'preview.png') };
  mkdirSync(join(folder, 'gone'));
  const place = { device: openDevice('cpu'), dtype: 'float32' as const };
  const previews = openPreviews(options, undefined, place, (line) => lines.push(line));
  const latents = { shape: [1, 4, 2, 2], data: new Float32Array(16) };
  const progress = {
    step: 1,
    steps: 2,
    timestep: 0,
    latents,
    truncated: [],
    predOriginalSample: () => latents,
  };
  rmSync(join(folder, 'gone'), { recursive: true });
  for (let i = 0; i < 3; i++) previews.show({ vae: { config: {} } } as never, progress);
  await previews.close();
  t.equal(lines.length, 1, 'told once');
  t.match(lines[0], /^no more previews: .*gone/);
  t.end();
});

test('mistakes', async (t) => {
  const { folder, output, tae, draw } = setting(t);
  const vae = join(model, 'vae');
  await refusesEach(t, draw, [
    [['--preview', 'tea'], /--preview takes none, proj, tae, vae, not "tea"; did you mean "tae"/],
    [['--preview', 'tae'], /--preview tae needs --tae: a tiny autoencoder such as madebyollin\/taesdxl/],
    [['--taesd', tae], /--tae is what --preview tae decodes by; for the picture itself .* as --vae/],
    [['--preview', 'tae', '--tae', vae], /vae holds a VAE, not a tiny autoencoder \(AutoencoderTiny\)/],
    [['--preview', 'tae', '--tae', join(folder, 'none')], /no VAE at .*none/],
    [['--preview-path', 'a.png'], /--preview-path needs --preview proj, tae or vae/],
    [['--preview-interval', '2'], /--preview-interval needs --preview/],
    [['--preview', 'proj', '--preview-interval', '0'], /--preview-interval takes a whole number from 1/],
    [['--preview', 'proj', '--preview-path', 'a.jpg'], /--preview-path a\.jpg: previews are PNGs/],
    [['--preview', 'proj', '--preview-path', output], /out\.png is written by this call already/],
    [
      ['--preview', 'proj', '--preview-path', folder.concat('/out-1.png'), '-b', '2'],
      /out-1\.png is written/,
    ],
    [
      ['--preview', 'proj', '--preview-path', join(folder, 'no', 'a.png')],
      /\/no does not exist, or its folder does not: check the path/,
    ],
  ]);
  t.notOk(existsSync(output));
  const own = await sdxl(
    ...['sample', '--prompt', 'red heart', '--steps', '1', '--device', 'cpu', '--preview', 'proj'],
    ...['--output', output, '--preview-path', join(folder, 'p.png')],
  );
  t.match(own.err, /warning: --preview proj shows SDXL's latents .* this model has others .* --preview vae/);
  t.end();
});
