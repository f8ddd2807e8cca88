// `sdxl sample --adapter`: diffusers' latents by flags, from folder, file and hub; the settings in the picture; sizes; and mistakes.
import { cpSync, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { decodeFloats } from '../../io/dtype.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { locateT2IAdapter } from '../../models/locate/locate.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { pictureIn } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at, type Call, folder } from '../support/golden_calls.ts';
import type { Of } from '../support/ip_adapter_golden.ts';
import { hubOf } from '../support/small_hub.ts';
import { writeT2IAdapter } from '../support/t2i_adapter_golden.ts';

const calls = goldenLines<Call>('t2i_adapter').filter(({ kind }) => kind === 'text2img');
const [model, refiner] = ['tiny-sdxl', 'tiny-sdxl-refiner'].map((name) => join(goldenFolder, name));
for (const name of ['edges', 'sketch']) writeT2IAdapter(at(name), name);
const weights = 'diffusion_pytorch_model.safetensors';
/** A file without a config beside it. */
mkdirSync(at('files'));
const [edges, sketch] = ['edges', 'sketch'].map((name) => {
  const file = join(at('files'), `${name}.safetensors`);
  cpSync(join(at(name), weights), file);
  return file;
});

const pictureFile = (...of: Of): string => pictureIn(folder, ...of);
const seen = pictureFile(1, 64, 64);
const size = ['--width', '64', '--height', '64'];
const sample = (...argv: string[]) =>
  sdxl('sample', '--model', model, '--prompt', 'a red fox in the snow', '--quiet', '--seed', '1', ...argv);

/** What is drawn in two steps. */
async function drawn(...argv: string[]) {
  const output = at('drawn.png');
  const { status, err } = await sample('--steps', '2', ...argv, '--output', output);
  if (status !== 0) throw new Error(err);
  return readPicture(output);
}

test("diffusers' latents, and the settings in the picture", async (t) => {
  for (const { adapters = [], seed, settings, atol, values } of [calls[1], calls[3]]) {
    const [output, saved, again] = ['x.png', 'x.safetensors', 'again.png'].map(at);
    const { width, height, scheduler, adapter_conditioning_factor: factor } = settings;
    const by = adapters.flatMap(([name, of, scale]) => [
      ...[
        '--adapter',
        `${name === 'edges' ? edges : sketch}:${scale}`,
        '--adapter-image',
        pictureFile(...of),
      ],
    ]);
    const { status, err } = await sample(
      ...[...by, '--width', `${width}`, '--height', `${height}`, '--negative-prompt', 'rain'],
      ...['--seed', `${seed}`, '--steps', '5', '--scheduler', `${scheduler}`],
      ...(factor === undefined ? [] : ['--adapter-conditioning-factor', `${factor}`]),
      ...['--output', output, '--save-latents', saved],
    );
    t.equal(status, 0, err);
    const some = savedLatents(saved).filter((_, i) => i % 5 === 0);
    const want = decodeFloats(Buffer.from(values, 'base64'), 'float32');
    allClose(t, `${seed}`, some, want, { atol, rtol: 0 });
    t.equal((await sdxl('sample', '--from', output, '--output', again, '--quiet')).status, 0);
    t.ok(readFileSync(again).equals(readFileSync(output)), 'the same picture and settings');
    const kept = JSON.parse(readPngText(output).sdxl);
    t.equal(kept.adapterConditioningFactor, factor);
    t.equal(kept.adapterImage.length, adapters.length);
  }
});

test('folder, file and hub have the same, and sizes that nobody typed divide', async (t) => {
  const by = (path: string, image = seen) => ['--adapter', path, '--adapter-image', image];
  const want = await drawn(...size, ...by(at('edges')));
  const same = async (path: string) =>
    t.equal(maxDifference((await drawn(...size, ...by(path))).data, want.data), 0);
  await same(edges);
  await same(join(at('edges'), weights));
  t.ok(maxDifference((await drawn(...size, ...by(`${edges}:0.5`))).data, want.data) > 1);
  cpSync(at('edges'), join(at('published'), 'repo'), { recursive: true });
  const fp16 = weights.replace('.safe', '.fp16.safe');
  renameSync(join(at('published'), 'repo', weights), join(at('published'), 'repo', fp16));
  const asked = await hubOf(t, at('published'));
  const source = await locateT2IAdapter('TencentARC/t2i-adapter-canny-sdxl-1.0');
  t.same(asked.sort(), ['config.json', fp16]);
  await same(source.path);

  const sides = ({ width, height }: { width: number; height: number }) => [width, height];
  t.same(sides(await drawn(...by(edges, pictureFile(1, 60, 41)))), [48, 32], 'of the picture');
  const over = ['--image', pictureFile(4, 72, 56), '--strength', '0.9'];
  t.same(sides(await drawn(...by(edges), ...over)), [64, 48], 'of the picture to start from');
  const hires = ['--hires', '--hires-scale', '1.2'];
  const [larger, other] = [await drawn(...size, ...by(edges), ...hires), await drawn(...size, ...hires)];
  t.same(
    [sides(larger), sides(other)],
    [
      [64, 64],
      [72, 72],
    ],
  );
});

test('in a second pass and in a part of a picture it is followed, and by a refiner not', async (t) => {
  const by = ['--adapter', edges, '--adapter-image', seen];
  const pair = async (...argv: string[]) => {
    const [with_, without] = [await drawn(...size, ...argv, ...by), await drawn(...size, ...argv)];
    return maxDifference(with_.data, without.data);
  };
  const first = at('first.png');
  await sample(...size, ...by, '--steps', '2', '--output', first);
  const again = ['--width', '96', '--height', '96', '--image', first, '--strength', '1'];
  const hires = ['--hires', '--hires-width', '96', '--hires-upscaler', 'Lanczos'];
  const [second, both] = [
    await drawn(...by, ...again),
    await drawn(...size, ...by, ...hires, '--hires-denoising-strength', '1'),
  ];
  t.equal(maxDifference(both.data, second.data), 0, 'two calls in one');
  const mask = at('mask.png');
  writePng(mask, { width: 64, height: 64, channels: 1, data: new Uint8Array(4096).fill(255, 0, 900) });
  const crop = ['--image', pictureFile(4, 64, 64), '--mask', mask, '--padding-mask-crop', '8'];
  t.ok((await pair(...crop)) > 1);
  t.ok((await pair('--refiner', refiner, '--denoising-end', '0.5')) > 1);
});

/** The adapter's file under other names, or with a tensor of another shape. */
function changed(
  name: string,
  change: (name: string, shape: readonly number[]) => [string, readonly number[]],
): string {
  const file = openSafetensors(edges);
  const entries = [...file.tensors.values()].map((info) => {
    const [key, shape] = change(info.name, info.shape);
    const bytes = file.read(info.name).subarray(0, 2 * shape.reduce((a, b) => a * b, 1));
    return { name: key, dtype: info.dtype, shape, bytes };
  });
  file.close();
  const path = join(at('files'), `${name}.safetensors`);
  writeSafetensors(path, entries);
  return path;
}
const old = changed('old', (name, shape) =>
  name.endsWith('conv_in.weight') ? [name, [16, 192, 3, 3]] : [name, shape],
);
const torn = changed('torn', (name, shape) =>
  name.endsWith('in_conv.weight') ? [name, [2, ...shape.slice(1)]] : [name, shape],
);
const original = changed('original', (name, shape) => [name.replace('adapter.', ''), shape]);

test('inspect', async (t) => {
  for (const [path, says, wanted] of [
    [at('edges'), /diffusers component: T2IAdapter/, 0],
    [sketch, /T2I-Adapter in one file/, 0],
    [old, /old\.safetensors is a T2I-Adapter that sees other squares than of 16x16/, 2],
    [torn, /misshapen adapter\.body\.1\.in_conv\.weight is \[2,16,1,1\]/, 2],
  ] as const) {
    const { status, out, err } = await sdxl('inspect', path);
    t.match(out + err, says);
    t.equal(status, wanted);
  }
});

test('mistakes', async (t) => {
  const output = at('none.png');
  const by = (path: string, ...argv: string[]) => ['--adapter', path, '--adapter-image', seen, ...argv];
  const of = (name: string, more: Record<string, unknown>) => writeT2IAdapter(at(name), 'edges', more);
  mkdirSync(at('empty'));
  writeFileSync(at('x.txt'), '');
  await refusesEach(t, (...argv) => sample(...size, ...argv, '--output', output), [
    [['--adapter', edges], /there are 1 of --adapter and 0 of --adapter-image: give a picture to each/],
    [['--adapter-image', seen], /there are 0 of --adapter and 1 of --adapter-image/],
    [['--adapter', edges, '--adapter-image', at('absent.png')], /absent\.png does not exist/],
    [['--adapter-conditioning-factor', '0.5'], /--adapter-conditioning-factor needs --adapter/],
    [
      by(edges, '--adapter-conditioning-factor', '2'),
      /--adapter-conditioning-factor takes a number from 0 to 1/,
    ],
    [by(`${edges}:1.2.3`), /--adapter .*takes a number, not "1\.2\.3"/],
    [by(at('absent')), /no T2I-Adapter at .*absent; give a T2I-Adapter's folder/],
    [by(at('empty')), /empty has no config\.json; give/],
    [by(at('x.txt')), /x\.txt is not a T2I-Adapter: give/],
    [
      by(edges, '--width', '72'),
      /sees squares of 16x16 pixels, into which 72x64 does not divide: give a width/,
    ],
    [by(edges, '--hires', '--hires-width', '88'), /into which 88x80 does not divide/],
    [by(join(model, 'unet')), /holds a UNet2DConditionModel, not a T2I-Adapter \(T2IAdapter\); give/],
    [
      by(of('full', { adapter_type: 'full_adapter' })),
      /"adapter_type" is "full_adapter", as those of SD 1\.5/,
    ],
    [
      by(of('light', { adapter_type: 'light_adapter' })),
      /"adapter_type" is "light_adapter", as those of SD 1\.5/,
    ],
    [by(of('unsaid', { adapter_type: undefined })), /"adapter_type" is "full_adapter"/],
    [by(of('four', { in_channels: 4 })), /"in_channels" is 4, not 3 \(a picture in colour\) or 1 \(grey\)/],
    [
      by(of('grey', { in_channels: 1 })),
      /misshapen adapter\.conv_in\.weight is \[16,768,3,3\] and should be/,
    ],
    [by(of('three', { channels: [16, 24, 32] })), /"channels" is \[16,24,32\], not a list of four widths/],
    [
      by(of('wide', { channels: [320, 640, 1280, 1280] })),
      /gives features 320 wide at 1\/16, .* takes 16 wide at/,
    ],
    [
      by(of('fine', { downscale_factor: 8 })),
      /features 16 wide at 1\/8, .* and the UNet takes 16 wide at 1\/16/,
    ],
    [by(edges, '--model', refiner), /the UNet takes .*: take one that was made for this model/],
    [
      by(old),
      /old\.safetensors is a T2I-Adapter that sees other squares than of 16x16 pixels, as those of SD 1\.5 do/,
    ],
    [by(torn), /misshapen adapter\.body\.1\.in_conv\.weight/],
    [by(original), /original\.safetensors is no T2I-Adapter under diffusers' keys/],
    [['--controlnet', at('edges'), '--control-image', seen], /holds a T2IAdapter, not a ControlNet/],
  ]);
  t.notOk(existsSync(output));
});
