// 8-bit floats: bytes and numbers by the format's own definition, linear layers over them on the CPU, and what they do to a UNet and a
// picture. GPUs have theirs in gpu_sampling.test.ts.
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { fromE4m3, toE4m3 } from '../../engine/ops/fp8.ts';
import { feedForwardToFp8 } from '../../models/unet/fp8.ts';
import { sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { layersInFp8, roundsToNearest } from '../support/fp8_layers.ts';
import { goldenArea, goldenFolder } from '../support/golden.ts';
import { unetError } from '../support/models_golden.ts';
import { relativeError } from '../support/op_cases.ts';

test('bytes of e4m3 are what the format says', (t) => {
  t.equal(fromE4m3(0x01), 2 ** -9, 'the smallest');
  t.equal(fromE4m3(0x08), 2 ** -6, 'the smallest normal');
  t.equal(fromE4m3(0x7e), 448, 'the largest');
  t.equal(fromE4m3(0xb8), -1);
  t.ok(Number.isNaN(fromE4m3(0x7f)));
  for (let code = 0; code < 256; code++) {
    if ((code & 0x7f) === 0x7f) continue;
    t.equal(toE4m3(fromE4m3(code)), code, `byte ${code}`);
  }
  t.end();
});

for (const device of [openDevice('reference'), openDevice('auto')]) {
  test(`numbers become the nearest bytes, ties even ones, on ${device.name}`, (t) => {
    roundsToNearest(t, device);
    t.end();
  });

  test(`linear layers in 8-bit floats on ${device.name}`, (t) => {
    layersInFp8(t, device);
    t.end();
  });
}

test('what 8-bit feed-forward layers cost the golden UNet, beside what bfloat16 does', (t) => {
  const area = goldenArea('unet');
  const cases = area.cases.filter((c) => c.expect.sample && !c.scale_parameters);
  t.ok(cases.length >= 3, `${cases.length} cases`);
  for (const c of cases) {
    const halves = unetError(area, c, 'bfloat16');
    const bytes = unetError(area, c, 'bfloat16', { loaded: feedForwardToFp8 });
    t.comment(`${c.id}: bfloat16 ${halves.toExponential(1)}, with fp8 ${bytes.toExponential(1)}`);
    t.ok(bytes > halves && bytes < 0.05, `${c.id}: ${bytes}, bfloat16 alone ${halves}`);
  }
  t.equal(openDevice('auto').memory.storages, 0, 'live tensors');
  t.end();
});

test('sdxl sample --fp8 draws another picture, a little', async (t) => {
  const folder = t.testdir();
  const latents: Float32Array[] = [];
  for (const more of [[], ['--fp8']]) {
    const path = join(folder, `${more.length}.safetensors`);
    const output = ['--save-latents', path, '--output', join(folder, 'out.png'), '--quiet'];
    const size = ['--width', '64', '--height', '64', '--steps', '2', '--seed', '1'];
    const model = ['--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a fox'];
    const { status, err } = await sdxl('sample', ...model, ...size, ...output, ...more);
    t.equal(status, 0, err);
    latents.push(savedLatents(path));
  }
  const distance = relativeError(latents[1], latents[0]);
  t.ok(distance > 1e-4 && distance < 0.1, `${distance}`);
});
