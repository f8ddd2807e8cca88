// `sdxl sample --controlnet`: diffusers' latents (golden area controlnet), pictures that give their settings back, several
// prompts, a refiner, and mistakes.
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { readPicture, writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { area, disc, type picture, pictureIn, writeControlNet } from '../support/controlnet_golden.ts';
import { allClose, type GoldenCase, goldenFolder, maxDifference } from '../support/golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-cli-controlnet-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const [model, refiner] = ['tiny-sdxl', 'tiny-sdxl-refiner'].map((name) => join(goldenFolder, name));
for (const name of ['full', 'mid', 'small']) writeControlNet(at(name), name);

const pictureFile = (...of: Parameters<typeof picture>): string => pictureIn(folder, ...of);
const size = ['--width', '64', '--height', '64'];
const sample = (...argv: string[]) =>
  sdxl('sample', '--model', model, '--prompt', 'a red fox in the snow', '--quiet', ...argv);

test("diffusers' latents, and the settings in the picture", async (t) => {
  for (const [id, ...argv] of [
    ['plain', '--controlnet', at('full')],
    [
      'two_windows',
      ...['--controlnet', at('mid'), '--controlnet', at('full'), '--control-guidance-start', '0'],
      ...['--control-guidance-start', '0.3', '--control-guidance-end', '0.5', '--control-guidance-end', '1'],
    ],
    ['guess', '--controlnet', at('full'), '--guess-mode', '--num-images', '2'],
    [
      'img2img',
      '--controlnet',
      at('full'),
      '--control-guidance-end',
      '0.5',
      '--image',
      pictureFile(4, 64, 64),
    ],
    ['two', '--controlnet', `${at('full')}:0.7`, '--controlnet', `${at('small')}:1.3`, '--num-images', '2'],
  ]) {
    const c = area.cases.find((each) => each.id === id) as GoldenCase;
    const { guidance_scale, num_inference_steps } = c.settings as Record<string, number>;
    const images = c.control_images as [number, number, number][];
    const [output, saved] = [at(`${id}.png`), at(`${id}.safetensors`)];
    const { status, err, out } = await sample(
      ...[...size, ...argv, '--negative-prompt', 'rain', '--seed', String(c.seed), '--json'],
      ...['--guidance-scale', String(guidance_scale), '--steps', String(num_inference_steps)],
      ...images.flatMap((of) => ['--control-image', pictureFile(...of)]),
      ...['--output', output, '--save-latents', saved],
    );
    t.equal(status, 0, `${id} ${err}`);
    const { tensor, ...tolerance } = c.expect.latents;
    allClose(t, id, savedLatents(saved), area.floats(tensor), tolerance);
    const [first] = JSON.parse(out).files;
    const again = at(`${id}-again.png`);
    const back = await sdxl('sample', '--from', first, '--output', again, '--json', '--quiet');
    t.equal(back.status, 0, `from its own picture ${back.err}`);
    const [second] = JSON.parse(back.out).files;
    t.ok(readFileSync(first).equals(readFileSync(second)), `${id}: the same picture and settings`);
  }
  const kept = JSON.parse(readPngText(at('two_windows.png')).sdxl);
  t.same(kept.controlnet, [at('mid'), at('full')]);
  t.same(kept.controlGuidanceStart, [0, 0.3]);
  t.same(kept.controlImage, [pictureFile(1, 64, 64), pictureFile(3, 64, 64)]);
});

test('the first picture to follow gives the size, several prompts share it, and a refiner goes on alone', async (t) => {
  const [output, alone] = [at('x.png'), at('alone.png')];
  const follow = ['--controlnet', `${at('small')}:0.5`, '--control-image', pictureFile(1, 60, 41)];
  const rest = ['--steps', '4', '--seed', '1', '--json', '--refiner', refiner, '--denoising-end', '0.5'];
  const { status, err, out } = await sample(...follow, ...rest, '--prompt', 'a castle', '--output', output);
  t.equal(status, 0, err);
  const { files, width, height } = JSON.parse(out);
  t.same([files.length, width, height], [2, 56, 40]);
  await sample(...follow, ...rest, '--output', alone);
  t.equal(maxDifference((await readPicture(files[0])).data, (await readPicture(alone)).data), 0);
});

test('a second pass over the picture enlarged is followed too: two calls in one', async (t) => {
  const [first, second, both] = ['first.png', 'second.png', 'both.png'].map(at);
  const follow = ['--control-image', pictureFile(1, 96, 96), '--seed', '1'];
  const large = ['--width', '96', '--height', '96'];
  const hires = ['--hires', '--hires-scale', '1.5', '--hires-upscaler', 'Lanczos'];
  for (const argv of [
    ['--controlnet', at('full'), ...size, '--steps', '4', '--output', first],
    // Four steps of five: what four of a strength of 0.7 come to. Over a picture of the user's a ControlNet is followed at 0.8.
    [
      `--controlnet=${at('full')}:1`,
      ...large,
      '--steps',
      '5',
      '--image',
      first,
      '--strength',
      '0.85',
      '--output',
      second,
    ],
    ['--controlnet', at('full'), ...size, '--steps', '4', ...hires, '--output', both],
  ])
    t.equal((await sample(...follow, ...argv)).status, 0, argv.join(' '));
  t.equal(maxDifference((await readPicture(both)).data, (await readPicture(second)).data), 0);
});

test('a ControlNet in one file is the folder it came from', async (t) => {
  const draw = async (path: string, ...argv: string[]) => {
    const output = at('y.png');
    const follow = ['--controlnet', path, '--control-image', pictureFile(1, 64, 64), '--steps', '2'];
    const { status, err } = await sample(...size, ...follow, '--seed', '1', '--output', output, ...argv);
    t.equal(status, 0, err);
    return (await readPicture(output)).data;
  };
  const want = await draw(at('full'));
  const file = join(at('full'), 'diffusion_pytorch_model.safetensors');
  t.equal(maxDifference(await draw(file), want), 0);
  t.ok(maxDifference(await draw(`${file}:0.5`), want) > 1, 'a scale after it');
  mkdirSync(at('halves'));
  for (const name of ['config.json', 'diffusion_pytorch_model.safetensors'])
    writeFileSync(join(at('halves'), name), readFileSync(join(at('full'), name)));
  renameSync(
    join(at('halves'), 'diffusion_pytorch_model.safetensors'),
    join(at('halves'), 'diffusion_pytorch_model.fp16.safetensors'),
  );
  t.equal(maxDifference(await draw(at('halves')), want), 0, 'a variant that is alone');
  cpSync(at('full'), join(at('checkpoint'), 'controlnet'), { recursive: true });
  t.equal(maxDifference(await draw(at('checkpoint')), want), 0, "a checkpoint of diffusers' script");
  t.match((await sdxl('inspect', at('full'))).out, /ControlNetModel/);
});

test('mistakes', async (t) => {
  const [output, edges] = [at('none.png'), pictureFile(1, 64, 64)];
  const full = ['--controlnet', at('full'), '--control-image', edges];
  mkdirSync(at('empty'));
  const cases: [argv: string[], says: RegExp][] = [
    [
      ['--controlnet', at('full')],
      /there are 1 of --controlnet and 0 of --control-image: give a picture to each/,
    ],
    [['--control-image', edges], /there are 0 of --controlnet and 1 of --control-image/],
    [[...full, '--control-image', at('absent.png')], /1 of --controlnet and 2 of --control-image/],
    [
      ['--controlnet', at('full'), '--control-image', at('absent.png')],
      /--control-image: .*absent\.png does not exist/,
    ],
    [['--control-guidance-start', '0.5'], /--control-guidance-start needs --controlnet/],
    [['--guess-mode'], /--guess-mode needs --controlnet/],
    [[...full, '--control-guidance-end', '2'], /--control-guidance-end takes a number from 0 to 1, not "2"/],
    [
      [...full, '--control-guidance-start', '0.5', '--control-guidance-end', '0.5'],
      /0\.5 is not before .* 0\.5/,
    ],
    [
      [...full, '--control-guidance-start', '0.1', '--control-guidance-start', '0.2'],
      /there are 2 of --control-guidance-start and 1 of --controlnet/,
    ],
    [
      ['--controlnet', `${at('full')}:1.2.3`, '--control-image', edges],
      /--controlnet .*takes a number, not "1\.2\.3"/,
    ],
    [
      ['--controlnet', at('absent'), '--control-image', edges],
      /no ControlNet at .*absent; give a ControlNet's folder/,
    ],
    [['--controlnet', at('empty'), '--control-image', edges], /empty has no config\.json; give/],
    [['--controlnet', edges, '--control-image', edges], /is not a ControlNet: give/],
    [
      ['--controlnet', join(model, 'unet'), '--control-image', edges],
      /holds a UNet2DConditionModel, not a ControlNet that sdxl runs \(ControlNetModel or ControlNetUnionModel or /,
    ],
  ];
  const mask = at('mask.png');
  writePng(mask, disc());
  const inPart = ['--image', pictureFile(4, 64, 64), '--mask', mask, '--padding-mask-crop', '8'];
  const smaller = ['--controlnet', at('full'), '--control-image', pictureFile(1, 40, 56)];
  await refusesEach(t, (...argv) => sample(...size, ...argv, '--output', output), [
    [[...inPart, ...smaller], /cuts a part of 64x64 pixels, and --control-image is 40x56/],
  ]);
  await refusesEach(t, (...argv) => sample(...size, ...argv, '--output', output), cases);
  t.notOk(existsSync(output));
});
