// Weights on their way from a file into a model: whatever type they are stored in, the numbers and the layout that the host
// would make of them, and no memory left beside them.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { module, namedParameters, parameter, unload } from '../../engine/module.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { bytesPerElement, decodeFloats, encodeNumbers, type FloatDType } from '../../io/dtype.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { openComponent, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { loadAndClose, sourceOf, toMemoryLayout } from '../../models/checkpoint/weights.ts';
import { asItsWeightsTell } from '../../models/control/controlnet_union.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { openTinyFile } from '../../models/formats/taesd_file.ts';
import { goldenSingleFile } from '../support/golden.ts';
import { filesOpen } from '../support/io_helpers.ts';
import { values } from '../support/op_cases.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-load-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const types: readonly FloatDType[] = ['float32', 'bfloat16', 'float16'];

const net = module(
  {
    table: parameter([7, 5]),
    bias: parameter([3]),
    conv: parameter([4, 3, 3, 2], 'conv'),
    pointwise: parameter([4, 3, 1, 1], 'conv'),
  },
  () => undefined,
);
const parameters = namedParameters(net);

for (const name of ['cpu', 'reference']) {
  const device = openDevice(name);
  test(`every type into every type, on ${name}`, (t) => {
    const before = device.memory.storages;
    for (const stored of types) {
      const file = join(folder, `${stored}.safetensors`);
      const entries = [...parameters].map(([key, { shape }], i) => ({
        ...{ name: key, dtype: stored, shape },
        bytes: encodeNumbers(Float32Array.from(values(sizeOf(shape), i)), stored),
      }));
      writeSafetensors(file, entries);
      for (const dtype of types) {
        loadAndClose(net, sourceOf(file, [openSafetensors(file)]), device, dtype);
        for (const { name: key, bytes } of entries) {
          const p = parameters.get(key);
          const cast = encodeNumbers(decodeFloats(bytes, stored), dtype);
          const want = p?.layout === 'conv' ? toMemoryLayout(cast, p.shape, bytesPerElement[dtype]) : cast;
          t.same([...(p?.tensor.bytes() ?? [])], [...want], `${key}, ${stored} as ${dtype}`);
          t.same(p?.tensor.shape, p?.memoryShape);
        }
        t.equal(device.memory.storages, before + 4, 'nothing but the weights');
        t.equal(device.memory.held, device.memory.live, 'and nothing kept for later');
        unload(net);
      }
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

  test(`what is not finite, on ${name}`, (t) => {
    const file = join(folder, 'flaws.safetensors');
    const load = (flaw: number) => {
      const entries = [...parameters].map(([key, { shape }]) => {
        const numbers = new Float32Array(sizeOf(shape)).fill(1);
        if (key === 'bias') numbers[1] = flaw;
        return { name: key, dtype: 'float32' as const, shape, bytes: encodeNumbers(numbers, 'float32') };
      });
      writeSafetensors(file, entries);
      loadAndClose(net, sourceOf(file, [openSafetensors(file)]), device, 'float32');
    };
    for (const flaw of [Number.NaN, Infinity, -Infinity])
      t.throws(() => load(flaw), /tensor bias holds NaN or infinity/, String(flaw));
    load(1e30);
    t.equal(
      parameters.get('bias')?.tensor.floats()[1],
      Math.fround(1e30),
      'a number whose square is infinite',
    );
    unload(net);
    t.end();
  });
}

test('what cannot be opened leaves no file open', (t) => {
  const at = (name: string) => join(folder, name);
  const good = (name: string) =>
    writeSafetensors(at(name), [
      { name: '0.weight', dtype: 'float32', shape: [1], bytes: new Uint8Array(4) },
    ]);
  mkdirSync(at('shards'));
  good('shards/x-00001-of-00002.safetensors');
  good('taesdxl_encoder.safetensors');
  mkdirSync(at('union'));
  good('union/diffusion_pytorch_model.safetensors');
  for (const name of ['shards/x-00002-of-00002.safetensors', 'taesdxl_decoder.safetensors'])
    writeFileSync(at(name), 'damaged');
  const single = goldenSingleFile('tiny-sdxl');
  const before = filesOpen();
  for (const [open, message] of [
    [() => openWeights(at('shards')), /00002-of-00002/],
    [() => openTinyFile(at('taesdxl_encoder.safetensors'), 'encoder').weights('vae'), /taesdxl_decoder/],
    [() => asItsWeightsTell(openComponent(at('union'))), /has no controlnet\/config\.json/],
    [() => openSingleFile(single), /its UNet begins with 16 channels, SDXL's with 320; name a diffusers/],
    [() => openSingleFile(single, { configs: at('nowhere') }), /no model at .*nowhere/],
    [() => openSingleFile(at('taesdxl_encoder.safetensors')), /is not an SDXL checkpoint in one file/],
  ] as const)
    t.throws(open, { name: 'UserError', message });
  t.equal(filesOpen(), before);
  t.end();
});
