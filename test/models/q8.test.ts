// Weights in 8-bit integers: blocks by Q8_0's own definition on every device, what they cost the golden UNet beside bfloat16,
// adapters that are merged before they are rounded, and `sdxl sample --q8`.
import { join } from 'node:path';
import { test } from 'tap';
import { shippedModel } from '../../cli/model.ts';
import { cudaDevice, openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { fromQ8, toQ8 } from '../../engine/ops/q8.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { locateModel } from '../../models/locate/locate.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { keepInQ8 } from '../../models/unet/q8.ts';
import { sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { goldenArea, goldenFolder } from '../support/golden.ts';
import { unetError } from '../support/models_golden.ts';
import { relativeError, values } from '../support/op_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const cpu = openDevice('auto');
const devices = [openDevice('reference'), cpu, cudaDevice(openVirtualGpu())];
const source = openModel(join(goldenFolder, 'tiny-sdxl'));

/** A block whose scale is 2 and whose quotients are told: halves round to even. */
const telling = [254, 1, 3, -1, -3, 5, 0, -254, 253, ...Array.from({ length: 23 }, (_, i) => 2 * i)];
const quotients = [127, 0, 2, 0, -2, 2, 0, -127, 126, ...Array.from({ length: 23 }, (_, i) => i)];

test('blocks are rounded as Q8_0 says, on every device', (t) => {
  const small = values(32, 1).map((x) => x / 1e4);
  const x = Float32Array.from([...telling, ...new Array(32).fill(0), ...small]);
  for (const device of devices) {
    scope(() => {
      const { bytes, scale } = toQ8(tensor(x, [3, 32], { device }));
      const [first, zero, last] = scale.floats();
      t.same([first, zero], [2, 0], `${device.name}: scales`);
      t.equal(last, Math.fround(Math.fround(Math.max(...small.map(Math.abs))) / 127));
      const got = [...bytes.floats()];
      t.same(
        got.slice(0, 32),
        quotients.map((q) => q + 128),
        `${device.name}: bytes`,
      );
      t.same(got.slice(32, 64), new Array(32).fill(128), `${device.name}: zeros`);
      const back = fromQ8({ bytes, scale }).floats();
      t.same(
        [...back.slice(0, 32)],
        quotients.map((q) => 2 * q),
        `${device.name}: back`,
      );
      for (const [i, value] of small.entries())
        if (Math.abs(back[64 + i] - value) > 0.5001 * last)
          t.fail(`${device.name}: ${value} is ${back[64 + i]}`);
    });
    const lost = scope(() => fromQ8(toQ8(tensor(x.with(3, Number.NaN), [3, 32], { device }))).floats());
    t.ok(
      lost.slice(0, 32).every(Number.isNaN) && lost[40] === 0,
      `${device.name}: NaN takes its block along`,
    );
    t.equal(device.memory.storages, 0, 'live tensors');
  }
  t.throws(() => scope(() => toQ8(tensor(x.subarray(0, 33), [33], { device: cpu }))), /blocks of 32/);
  t.end();
});

test('what 8-bit integers cost the golden UNet, beside what bfloat16 does', (t) => {
  const area = goldenArea('unet');
  const cases = area.cases.filter((c) => c.expect.sample && !c.scale_parameters);
  t.ok(cases.length >= 3, `${cases.length} cases`);
  for (const c of cases) {
    const [plain, halves] = (['float32', 'bfloat16'] as const).map((dtype) => unetError(area, c, dtype));
    const bytes = unetError(area, c, 'float32', { made: keepInQ8 });
    t.comment(`${c.id}: bfloat16 ${halves.toExponential(1)}, in q8 ${bytes.toExponential(1)}`);
    t.ok(bytes > 10 * plain && bytes < halves, `${c.id}: ${bytes}, bfloat16 ${halves}`);
  }
  t.equal(cpu.memory.storages, 0, 'live tensors');
  t.end();
});

/** An adapter of rank 2 for one layer. */
function loraFile(path: string, layer: string, [outputs, inputs]: readonly number[], factor: number): string {
  const part = (name: string, shape: readonly number[]) => {
    const data = Float32Array.from(values(shape[0] * shape[1], name.length), (x) => x * factor);
    return {
      name: `unet.${layer}.${name}.weight`,
      dtype: 'float32' as const,
      shape,
      bytes: new Uint8Array(data.buffer),
    };
  };
  writeSafetensors(path, [part('lora_A', [2, inputs]), part('lora_B', [outputs, 2])]);
  return path;
}

test('adapters are merged before weights are rounded', (t) => {
  const layer = 'down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2';
  // A difference of a seventh of a block's step: rounding again loses most of it. Rounding once takes 0 of it on average, and
  // by chance 0.04 over these 2304 numbers.
  const path = loraFile(join(t.testdir(), 'faint.safetensors'), layer, [24, 96], 1 / 110);
  const weight = (q8: boolean, how: 'none' | 'loaded with' | 'merged after') => {
    const lora = how === 'loaded with' ? [{ path, scale: 2 }] : [];
    const pipeline = loadPipeline(source, { device: cpu, dtype: 'float32', q8, lora });
    if (how === 'merged after') mergeLora(pipeline, path, 2);
    const parameter = namedParameters(pipeline.unet).get(`${layer}.weight`);
    const floats = noGrad(() => scope(() => parameter?.tensor.floats())) as Float32Array;
    pipeline.release();
    return floats;
  };
  const [plain, exact] = [weight(false, 'none'), weight(false, 'merged after')];
  t.same(weight(false, 'loaded with'), exact, 'the same weights whenever it is merged');
  /** What rounding takes away of the adapter's change, as a share of it. */
  const lost = (got: Float32Array) => {
    const wanted = exact.map((x, i) => x - plain[i]);
    const overlap = (a: Float32Array) => a.reduce((sum, x, i) => sum + x * wanted[i], 0);
    return 1 - overlap(got.map((x, i) => x - plain[i])) / overlap(wanted);
  };
  const [before, after] = [lost(weight(true, 'loaded with')), lost(weight(true, 'merged after'))];
  t.ok(Math.abs(before) < 0.1, `merged before: ${before}`);
  t.ok(after > 0.5, `merged after: ${after}`);
  t.equal(cpu.memory.storages, 0, 'live tensors');
  t.end();
});

test('an adapter that does not fit is refused before weights are read', (t) => {
  const path = loraFile(join(t.testdir(), 'other.safetensors'), 'no.such.layer', [24, 24], 1);
  const load = () => t.fail('weights were read');
  const lora = [{ path, scale: 1 }];
  t.throws(
    () => loadPipeline({ ...source, load }, { device: cpu, dtype: 'float32', lora }),
    /no\.such\.layer/,
  );
  t.end();
});

test('sdxl sample --q8 draws nearly the same picture', async (t) => {
  const folder = t.testdir();
  const latents: Float32Array[] = [];
  for (const [i, more] of [[], ['--q8'], ['--q8', '--fp8']].entries()) {
    const path = join(folder, `${i}.safetensors`);
    const size = ['--width', '64', '--height', '64', '--steps', '2', '--seed', '1', '--quiet'];
    const output = ['--save-latents', path, '--output', join(folder, 'out.png'), '--prompt', 'red heart'];
    const { status, err } = await sdxl('sample', ...size, ...output, ...more);
    t.equal(status, 0, err);
    latents.push(savedLatents(path));
  }
  const [q8, both] = [1, 2].map((i) => relativeError(latents[i], latents[0]));
  t.ok(q8 > 1e-4 && q8 < 0.01, `${q8}`);
  t.ok(both > q8 && both < 0.1, `with --fp8 ${both}`);
});

test('a UNet in 8 bits takes a byte a number and a scale for each 32', async (t) => {
  const emoji = await locateModel(shippedModel);
  const pipeline = loadPipeline(emoji, { device: cpu, dtype: 'float32', q8: true });
  for (const { encoder } of pipeline.text.encoders) unload(encoder);
  unload(pipeline.vae.module);
  const parameters = [...namedParameters(pipeline.unet).values()];
  const bytes = parameters.map(({ inQ8, size }) => (inQ8 ? size + 4 * (size / 32) : 4 * size));
  t.ok(parameters.filter(({ inQ8 }) => inQ8).length > 100);
  const wanted = bytes.reduce((a, b) => a + b, 0);
  // The pool's sizes are an eighth of a power of two apart.
  t.ok(
    cpu.memory.live >= wanted && cpu.memory.live <= 1.125 * wanted,
    `${cpu.memory.live} bytes for ${wanted}`,
  );
  pipeline.release();
});
