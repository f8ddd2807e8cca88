// The VAE against diffusers (golden area vae): moments, samples of them, decoded pictures whole and in tiles, the output of
// every submodule, gradients.
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { add, sub } from '../../engine/ops/binary.ts';
import { mse } from '../../engine/ops/loss.ts';
import { concat } from '../../engine/ops/move.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { exp, scale, square } from '../../engine/ops/unary.ts';
import { standInDevice } from '../../engine/profile.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { empty, sizeOf as sizeOfShape, type Tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { sdxlVae } from '../../models/formats/presets.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { autoencoder, checkDecode } from '../../models/vae/autoencoder.ts';
import { decodeLatents, posteriorStd, samplePosterior, toHost } from '../../models/vae/latents.ts';
import { blendTiles } from '../../models/vae/tiles.ts';
import { type Moments, parseVaeConfig, type Vae, vae } from '../../models/vae/vae.ts';
import { type Assert, type GoldenCase, goldenArea, goldenFolder, permuted } from '../support/golden.ts';
import {
  checkActivations,
  checkGradients,
  compare,
  devices,
  image,
  scaleParameters,
} from '../support/models_golden.ts';

const area = goldenArea('vae');

/** Golden moments hold mean and log-variance side by side in the channels. */
const joined = ({ mean, logvar }: Moments): Tensor => concat([mean, logvar], 3);

function halves(name: string): { mean: Float32Array; logvar: Float32Array } {
  const [n, c, h, w] = area.shape(name);
  const split = permuted(area.floats(name), [n, 2, c / 2, h * w], [1, 0, 2, 3]);
  return { mean: split.slice(0, split.length / 2), logvar: split.slice(split.length / 2) };
}

/** mse(decode(mode(encode(picture))), target) + 1e-3 KL, where KL = ½ Σ (mean² + var - 1 - logvar) per image. */
function loss({ encode, decode }: Vae, picture: Tensor, target: Tensor): Tensor {
  const { mean, logvar } = encode(picture);
  const terms = sub(scale(add(square(mean), exp(logvar)), 1, -1), logvar);
  const images = picture.shape[0];
  const kl = scale(sum(terms.reshape(1, -1), 1), 0.5 / images);
  return add(mse(decode(mean), target), scale(kl, 1e-3));
}

function checkLoss(t: Assert, c: GoldenCase, model: Vae, device: Device): void {
  const [picture, target] = ['image', 'target'].map((name) =>
    image(area, c.inputs?.[name] as string, device),
  );
  checkGradients(t, area, c, model.module, { image: picture }, () => loss(model, picture, target));
}

function check(t: Assert, c: GoldenCase, model: Vae, device: Device): void {
  const { image: picture, z, moments } = c.inputs as Record<string, string | undefined>;
  const tiling = c.id.startsWith('tiled');
  const encoded = picture && model.encode(image(area, picture, device), { tiling });
  const decoded = z && model.decode(image(area, z, device), { tiling });
  if (encoded && c.expect.moments) compare(t, area, c, 'moments', joined(encoded));
  if (decoded && c.expect.image) compare(t, area, c, 'image', decoded);
  if (!c.expect.sample) return;
  const { mean, logvar } = moments
    ? halves(moments)
    : { mean: toHost((encoded as Moments).mean).data, logvar: toHost((encoded as Moments).logvar).data };
  const noise = c.inputs?.noise
    ? area.floats(c.inputs.noise)
    : (new TorchGenerator(c.seed as number).randn(mean.length) as Float32Array);
  if (c.expect.std) compare(t, area, c, 'std', posteriorStd(logvar));
  compare(t, area, c, 'sample', samplePosterior(mean, logvar, noise));
}

function checkParts(t: Assert, c: GoldenCase, run: () => void): void {
  const seen = checkActivations(t, area, c, run);
  const unseen = Object.keys(c.expect).filter((label) => !seen.has(label));
  t.ok(unseen.length === 0, `${c.id}: modules not seen: ${unseen}`);
}

for (const device of devices) {
  test(`vae on ${device.name}`, (t) => {
    const source = openModel(join(goldenFolder, 'tiny-sdxl'));
    const before = device.memory.storages;
    for (const c of area.cases) {
      const model = vae(parseVaeConfig(source.config('vae')));
      source.load('vae', model.module, device, 'float32');
      scaleParameters(model.module, c);
      scope(() => {
        if (c.id === 'gradients') checkLoss(t, c, model, device);
        else if (c.id === 'activations') noGrad(() => checkParts(t, c, () => check(t, c, model, device)));
        else noGrad(() => check(t, c, model, device));
      });
      unload(model.module);
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

test('what cannot be decoded whole is refused by a sentence, and nothing else is', (t) => {
  const device = standInDevice();
  const tiny = autoencoder({ _class_name: 'AutoencoderTiny' });
  for (const [coder, fits, more, most] of [
    [autoencoder(sdxlVae), [2896, 2896], [2904, 2896], 8.3],
    [tiny, [8184, 4096], [8192, 4096], 33.5],
  ] as const) {
    for (const p of namedParameters(coder.module).values())
      p.tensor = unscoped(() => empty(p.memoryShape, { device, dtype: 'bfloat16' }));
    const sizeOf = ([width, height]: readonly [number, number]) => ({ width, height });
    const whole = ([width, height]: readonly [number, number]) =>
      noGrad(() =>
        scope(() => void coder.decode(empty([1, height / 8, width / 8, 4], { device, dtype: 'bfloat16' }))),
      );
    checkDecode(coder, sizeOf(fits));
    t.doesNotThrow(() => whole(fits), `${fits}`);
    t.throws(
      () => whole(more),
      { name: 'ShapeError', message: /more than 2\^31 - 1 elements/ },
      `${more} is beyond what tensors hold`,
    );
    const refused = {
      name: 'UserError',
      message: `${more[0]}x${more[1]} pixels are more than the VAE can decode whole (${most} megapixels): give a smaller --width and --height, or decode in tiles with --vae-tiling (vae_tiling in a program)`,
    };
    t.throws(() => checkDecode(coder, sizeOf(more)), refused);
    checkDecode(coder, sizeOf(more), true);
    const shape = [1, 4, more[1] / 8, more[0] / 8];
    const latents = { shape, data: new Float32Array(sizeOfShape(shape)) };
    t.throws(() => decodeLatents(coder, latents), refused, 'decoding says so too');
    unload(coder.module);
  }
  t.end();
});

test('what a layer has read is freed before the next ones run', (t) => {
  const device = standInDevice();
  const dtype = 'bfloat16';
  const full = 2 * 128 * 1024 * 1024;
  for (const { name, coder, decoded, encoded } of [
    // Twice the last level's input and the half as wide result of its first convolution; so with the first level's.
    { name: 'the VAE', coder: autoencoder(sdxlVae), decoded: 2 + 2 + 1, encoded: 1 + 1 + 1 },
    // A block's input, what two layers made of it, and a third's result before its ReLU and after.
    { name: 'the tiny one', coder: autoencoder({ _class_name: 'AutoencoderTiny' }), decoded: 2, encoded: 2 },
  ]) {
    for (const p of namedParameters(coder.module).values())
      p.tensor = unscoped(() => empty(p.memoryShape, { device, dtype }));
    /** The most that coding takes beside what is there, by the size of 128 channels of 1024x1024. */
    const most = (shape: number[], fn: (x: Tensor) => void): number =>
      noGrad(() =>
        scope(() => {
          const x = empty(shape, { device, dtype });
          const before = device.memory.live;
          device.memory.peak = before;
          scope(() => fn(x));
          return (device.memory.peak - before) / full;
        }),
      );
    const decoding = most([1, 128, 128, 4], (z) => void coder.decode(z));
    t.ok(decoding < decoded + 0.1, `${name}, decoding: ${decoding}`);
    const encoding = most([1, 1024, 1024, 3], (x) => void coder.encode(x));
    t.ok(encoding < encoded + 0.1, `${name}, encoding: ${encoding}`);
    unload(coder.module);
  }
  t.end();
});

test('a tile that is shorter than the blend fades over all of itself, as diffusers (blend_v)', (t) => {
  const tile = (...data: number[]) => ({ shape: [1, data.length, 1, 1], data: Float32Array.from(data) });
  t.same([...blendTiles([[tile(1, 2)], [tile(10, 20)]], 4, 2).data], [1, 2, 1, (2 + 20) / 2]);
  t.same(
    [...blendTiles([[tile(1, 2, 3)], [tile(10)]], 2, 3).data],
    [1, 2, 3, 3],
    'the last row of the one above',
  );
  t.end();
});

test('log-variances are clamped to [-30, 20]', (t) => {
  const std = posteriorStd(Float32Array.of(-100, -30, 20, 100));
  t.same(
    [...std],
    [-15, -15, 10, 10].map((half) => Math.fround(Math.exp(half))),
  );
  t.end();
});
