// Networks that enlarge pictures: BasicSR's numbers (golden/rrdbnet.jsonl) on every device and from files in each spelling; tiles; the
// flags of `sdxl sample`; files that are none.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters } from '../../engine/module.ts';
import { standInDevice } from '../../engine/profile.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { empty, sizeOf, tensor } from '../../engine/tensor.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { readPicture } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { readPngText } from '../../io/png.ts';
import { resize } from '../../io/resize.ts';
import { type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { loadAndClose } from '../../models/checkpoint/weights.ts';
import { type RRDBNetConfig, rrdbnet } from '../../models/upscaler/rrdbnet.ts';
import { openUpscalerFile } from '../../models/upscaler/rrdbnet_file.ts';
import { enlargeTo, openUpscaler } from '../../models/upscaler/upscaler.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';

interface Line {
  scale: number;
  width: number;
  height: number;
  atol: number;
  /** [height scale, width scale, 3] float32 in base64, not clamped. */
  values: string;
}
const golden = goldenLines<Line>('rrdbnet');
const valuesOf = ({ values }: Line) => new Float32Array(new Uint8Array(Buffer.from(values, 'base64')).buffer);

const configOf = (scale: number): RRDBNetConfig => ({
  num_feat: 8,
  num_block: 2,
  num_grow_ch: 4,
  doublings: 2,
  unshuffle: 4 / scale,
});

/** The golden data's weights under BasicSR's keys. */
const weightsOf = (config: RRDBNetConfig): TensorEntry[] =>
  [...namedParameters(rrdbnet(config))].map(([name, { shape }], k) => {
    const more = name === 'conv_last.bias' ? 0.3 : 0;
    const value = (i: number) => ((((7 * i * i + 37 * i + 11 * k) % 101) - 50) * 5) / 1024 + more;
    const values = Float32Array.from({ length: sizeOf(shape) }, (_, i) => value(i));
    return { name, shape, dtype: 'float32', bytes: encodeNumbers(values, 'float32') };
  });

function pictureOf(width: number, height: number): Picture {
  const data = new Uint8Array(width * height * 3);
  for (let i = 0; i < data.length; i++) {
    const [x, y, c] = [Math.floor(i / 3) % width, Math.floor(i / 3 / width), i % 3];
    data[i] = (5 * x + 3 * y + 50 * c) % 256;
  }
  return { width, height, channels: 3, data };
}

/** As other programs name the same tensors: ESRGAN's own, its trainer's before, and with BasicSR's own of a training. */
const spellings: Record<string, (name: string) => string> = {
  BasicSR: (name) => name,
  'params_ema.': (name) => `params_ema.${name}`,
  ESRGAN: (name) =>
    name
      .replace(/^body\./, 'RRDB_trunk.')
      .replace('rdb', 'RDB')
      .replace('conv_body', 'trunk_conv')
      .replace('conv_up', 'upconv')
      .replace('conv_hr', 'HRconv'),
  numbered: (name) =>
    name
      .replace('conv_first', 'model.0')
      .replace(/body\.(\d)\.rdb(\d)\.conv(\d)/, 'model.1.sub.$1.RDB$2.conv$3.0')
      .replace('conv_body', 'model.1.sub.2')
      .replace('conv_up1', 'model.3')
      .replace('conv_up2', 'model.6')
      .replace('conv_hr', 'model.8')
      .replace('conv_last', 'model.10'),
};

function written(t: Test, scale: number, spelling = 'BasicSR'): string {
  const path = join(t.testdir(), `x${scale}.safetensors`);
  const spelled = spellings[spelling];
  const entries = weightsOf(configOf(scale)).map((each) => ({ ...each, name: spelled(each.name) }));
  // Files of the numbered layers are sorted by name, as their numbers are not.
  writeSafetensors(
    path,
    entries.sort((a, b) => (a.name < b.name ? -1 : 1)),
  );
  return path;
}

const sameBytes = (one: Picture, two: Picture): boolean => Buffer.compare(one.data, two.data) === 0;

const bytesOf = (values: Float32Array): number[] =>
  [...values].map((value) => 255 * Math.min(1, Math.max(0, value)));

test("BasicSR's numbers", (t) => {
  for (const line of golden)
    for (const device of devices) {
      const upscaler = openUpscaler(openUpscalerFile(written(t, line.scale)), device);
      const made = upscaler.enlarge(pictureOf(line.width, line.height));
      const label = `x${line.scale} on ${device.name}`;
      t.match(made, { width: line.width * line.scale, height: line.height * line.scale, channels: 3 }, label);
      const off = bytesOf(valuesOf(line)).map((want, i) => Math.abs(want - made.data[i]));
      t.ok(Math.max(...off) <= 0.5 + 255 * line.atol, `${label}: rounded ${Math.max(...off)} at the most`);
      upscaler.release();
      t.equal(device.memory.live, 0, `${label} leaves nothing`);
    }
  t.end();
});

test('values that are not rounded', (t) => {
  const line = golden[0];
  for (const device of devices) {
    const network = rrdbnet(configOf(4));
    loadAndClose(network, openUpscalerFile(written(t, 4)).weights(), device, 'float32');
    const { width, height, data } = pictureOf(line.width, line.height);
    const y = noGrad(() =>
      scope(() => {
        const x = tensor(
          Float32Array.from(data, (byte) => byte / 255),
          [1, height, width, 3],
          { device },
        );
        return network(x).floats();
      }),
    );
    const apart = maxDifference(y, valuesOf(line));
    t.ok(apart <= line.atol, `${device.name}: ${apart} of ${line.atol}`);
    for (const parameter of namedParameters(network).values()) parameter.unload();
  }
  t.end();
});

test('files in each spelling hold the same network', (t) => {
  const device = openDevice('cpu');
  const picture = pictureOf(7, 5);
  const made = Object.keys(spellings).map((spelling) => {
    const source = openUpscalerFile(written(t, 4, spelling));
    t.same(source.config, configOf(4), spelling);
    const upscaler = openUpscaler(source, device);
    const large = upscaler.enlarge(picture);
    upscaler.release();
    return large;
  });
  for (const [i, each] of made.entries()) t.ok(sameBytes(each, made[0]), Object.keys(spellings)[i]);
  t.end();
});

test('tiles fit together', (t) => {
  const upscaler = openUpscaler(openUpscalerFile(written(t, 2)), openDevice('cpu'));
  const heard: number[][] = [];
  const wide = upscaler.enlarge(pictureOf(771, 11), { onTile: (...told) => heard.push(told) });
  t.same(heard, [
    [1, 3],
    [2, 3],
    [3, 3],
  ]);
  // The same columns where they lie far from any seam: 385 is one of the second tile's last.
  const columns = (from: Picture, first: number, count: number) =>
    Array.from({ length: from.height }, (_, y) =>
      from.data.subarray(3 * (y * from.width + first), 3 * (y * from.width + first + count)),
    ).flatMap((row) => [...row]);
  const full = pictureOf(771, 11);
  for (const seam of [260, 520]) {
    const around = cut(full, seam - 60, 120);
    const whole = upscaler.enlarge(around);
    const [got, want] = [columns(wide, 2 * seam - 40, 80), columns(whole, 120 - 40, 80)];
    const apart = Math.max(...got.map((value, i) => Math.abs(value - want[i])));
    t.ok(apart <= 1, `around column ${seam} they are ${apart} apart`);
  }
  upscaler.release();
  t.end();
});

test('a pattern enlarged is one', (t) => {
  const upscaler = openUpscaler(openUpscalerFile(written(t, 2)), openDevice('cpu'));
  // Beside itself on both sides, in one tile, it sees what a pattern sees, and farther than a margin.
  const picture = pictureOf(100, 20);
  const thrice = Uint8Array.from(
    { length: 3 * picture.data.length },
    (_, i) => picture.data[Math.floor(i / 900) * 300 + (i % 300)],
  );
  const wide = upscaler.enlarge({ ...picture, width: 300, data: thrice });
  const apart = (seamless?: 'x') => {
    const { data } = upscaler.enlarge(picture, { seamless });
    return Math.max(
      ...data.map((value, i) =>
        Math.abs(value - wide.data[3 * (Math.floor(i / 600) * 600 + 200) + (i % 600)]),
      ),
    );
  };
  t.ok(apart('x') <= 1, `${apart('x')}`);
  t.ok(apart() > 1, 'as it is not with edges');
  upscaler.release();
  t.end();
});

const cut = (from: Picture, left: number, width: number): Picture =>
  resize(from, from.width, from.height, 'lanczos', { left, top: 0, width, height: from.height });

test('enlarged until it is large enough', (t) => {
  const device = openDevice('cpu');
  const upscaler = openUpscaler(openUpscalerFile(written(t, 2)), device);
  const sides = (width: number, height: number) => {
    const made = enlargeTo(upscaler, pictureOf(8, 6), { width, height });
    return [made.width, made.height];
  };
  t.same(sides(8, 6), [16, 12], 'once at least');
  t.same(sides(9, 6), [16, 12]);
  t.same(sides(16, 13), [32, 24]);
  t.same(sides(400, 300), [64, 48], 'three times at most');
  upscaler.release();
  const same = openUpscaler(openUpscalerFile(written(t, 1)), device);
  const [once, asked] = [
    same.enlarge(pictureOf(8, 6)),
    enlargeTo(same, pictureOf(8, 6), { width: 9, height: 9 }),
  ];
  t.ok(sameBytes(asked, once), 'once, where the network leaves the size');
  same.release();
  t.end();
});

const sample = (...argv: string[]) =>
  sdxl(
    ...[
      'sample',
      '--model',
      join(goldenFolder, 'tiny-sdxl'),
      '--prompt',
      'a red fox',
      '--quiet',
      '--seed',
      '3',
    ],
    ...['--width', '64', '--height', '64', '--steps', '2', ...argv],
  );

test('the finished picture, enlarged by flags', async (t) => {
  const network = written(t, 2);
  const at = (name: string) => join(t.testdirName, name);
  const plain = await sample('--num-images', '2', '--output', at('plain.png'));
  t.equal(plain.status, 0, plain.err);
  const argv = ['--upscale-model', network, '--upscale-repeats', '2', '--num-images', '2'];
  const { status, out, err } = await sample(...argv, '--json', '--output', at('large.png'));
  t.equal(status, 0, err);
  t.match(JSON.parse(out), { width: 256, height: 256, files: [at('large-0.png'), at('large-1.png')] });
  const upscaler = openUpscaler(openUpscalerFile(network), openDevice('cpu'));
  const twice = upscaler.enlarge(upscaler.enlarge(await readPicture(at('plain-0.png'))));
  upscaler.release();
  t.ok(
    sameBytes(await readPicture(at('large-0.png')), twice),
    'what the network makes of the picture, twice',
  );
  const again = await sdxl('sample', '--from', at('large-0.png'), '--output', at('again.png'), '--quiet');
  t.equal(again.status, 0, again.err);
  t.ok(readFileSync(at('again-0.png')).equals(readFileSync(at('large-0.png'))), '--from draws it again');
});

test('a second pass over what a network has enlarged', async (t) => {
  const network = written(t, 2);
  const at = (name: string) => join(t.testdirName, name);
  const hires = ['--hires', '--hires-scale', '1.5', '--hires-denoising-strength', '0.5'];
  const { status, err } = await sample(...hires, '--hires-upscaler', network, '--output', at('hires.png'));
  t.equal(status, 0, err);
  t.match(readPngText(at('hires.png')).parameters, /Hires upscale: 1.5, Hires upscaler: x2, /);
  const other = await sample(...hires, '--hires-upscaler', 'Lanczos', '--output', at('lanczos.png'));
  t.equal(other.status, 0, other.err);
  const [one, two] = [await readPicture(at('hires.png')), await readPicture(at('lanczos.png'))];
  t.match(one, { width: 96, height: 96 });
  t.notOk(sameBytes(one, two), 'the network makes another picture of it');
  const again = await sdxl('sample', '--from', at('hires.png'), '--output', at('again.png'), '--quiet');
  t.equal(again.status, 0, again.err);
  t.ok(readFileSync(at('again.png')).equals(readFileSync(at('hires.png'))), '--from draws it again');
});

test('what is refused', async (t) => {
  const folder = t.testdir();
  const at = (name: string) => join(folder, name);
  const weights = weightsOf(configOf(4));
  writeFileSync(at('x4.pth'), 'PK');
  writeSafetensors(at('other.safetensors'), weights.slice(0, 2));
  writeSafetensors(at('less.safetensors'), weights.slice(0, -4));
  writeSafetensors(at('more.safetensors'), [
    ...weights,
    { ...weights[0], name: 'body.0.rdb1.conv1x1.weight' },
  ]);
  writeSafetensors(at('x4.safetensors'), weights);
  const large = encodeNumbers(new Float32Array(8 * 3 * 9).fill(3e38), 'float32');
  const huge = weights.map((each) => (each.name === 'conv_first.weight' ? { ...each, bytes: large } : each));
  writeSafetensors(at('huge.safetensors'), huge);
  await refusesEach(t, sample, [
    [['--upscale-repeats', '2'], /--upscale-repeats needs --upscale-model: what enlarges the picture/],
    [
      ['--upscale-model', at('none.safetensors')],
      /no upscaler at .*none\.safetensors; give the \.safetensors/,
    ],
    [['--upscale-model', folder], /no upscaler at /],
    [['--upscale-model', at('x4.pth')], /x4\.pth is a pickle, which can run code when read and is refused/],
    [['--upscale-model', at('other.safetensors')], /is not an ESRGAN for pictures in colour \(RRDBNet\)/],
    [['--hires', '--hires-upscaler', at('other.safetensors')], /is not an ESRGAN for pictures in colour/],
    [
      ['--upscale-model', at('more.safetensors')],
      /more\.safetensors is not an ESRGAN of the plain kind \(RRDBNet\): unexpected body\.0\.rdb1\.conv1x1\.weight; give/,
    ],
    [['--upscale-model', at('huge.safetensors')], /huge\.safetensors gives values that are not finite/],
    [
      ['--upscale-model', at('x4.safetensors'), '--upscale-repeats', '4', '--width', '256'],
      /would make a picture of 65536x16384/,
    ],
    [['--hires', '--hires-upscaler', 'Lanczoz'], /--hires-upscaler takes Latent, .*; did you mean "?Lanczos/],
  ]);
});

test('what a layer has read is freed before the next ones run', (t) => {
  const device = standInDevice();
  const side = 416;
  const model = rrdbnet({ num_feat: 64, num_block: 23, num_grow_ch: 32, doublings: 2, unshuffle: 1 });
  for (const p of namedParameters(model).values())
    p.tensor = unscoped(() => empty(p.memoryShape, { device }));
  const before = device.memory.live;
  noGrad(() => scope(() => void model(empty([1, side, side, 3], { device }))));
  const tile = (device.memory.peak - before) / (4 * 64 * side ** 2);
  // The second doubling: what it enlarges, sixteen times that in quarters, and in one.
  t.ok(tile < 4 + 16 + 16 + 4, `${tile} times the trunk's features`);
  t.end();
});
