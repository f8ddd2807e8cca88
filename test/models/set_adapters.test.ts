// Adapters that take the place of others in a loaded pipeline: every weight is, to the bit, that of a pipeline loaded with them, and what
// goes wrong on the way leaves one that can be set again.
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import type { LoadOptions } from '../../models/load_options.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { goldenFolder, goldenLora } from '../support/golden.ts';
import { writeAdapter } from '../support/tiny_adapter.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-set-adapters-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const device = openDevice('auto');

const both = writeAdapter(at('both.safetensors'));
const other = writeAdapter(at('other.safetensors'), { conv: 'down_blocks_0_resnets_0_conv2' });
const onlyUNet = writeAdapter(at('unet.safetensors'), { parts: ['unet'] });
const onlyTexts = writeAdapter(at('texts.safetensors'), { parts: ['texts'] });
const style = goldenLora('lora/scaled_kohya.safetensors');

const load = (lora: readonly AdapterFile[], options: Partial<LoadOptions> = {}, from = source): Pipeline =>
  loadPipeline(from, { device, dtype: 'bfloat16', ...options, lora });

/** Every weight that is loaded, end to end: a digest of the bits. */
function weightsOf({ unet, text, vae }: Pipeline): string {
  const modules: AnyModule[] = [unet, ...text.encoders.map(({ encoder }) => encoder), vae.module];
  const loaded = modules.flatMap((each) => [...namedParameters(each).values()]).filter((p) => p.loaded);
  const digest = createHash('sha256');
  for (const p of loaded) digest.update(scope(() => (p.fp8?.bytes ?? p.tensor).floats()));
  return digest.digest('hex');
}

test('one set after another is as loaded with each', (t) => {
  const sets: AdapterFile[][] = [
    [{ path: both, scale: 0.5 }],
    [{ path: other }, { path: style, scale: -0.7 }],
    [],
    [
      { path: both, scale: 2 },
      { path: both, scale: -1 },
    ],
    [{ path: other, scale: 0.3, textEncoderScale: 0 }],
    [],
  ];
  const ways: [string, Partial<LoadOptions>][] = [
    ['bfloat16', {}],
    ['float32', { dtype: 'float32' as FloatDType }],
    ['8-bit integers', { q8: true }],
    ['the UNet alone', { only: ['unet', 'vae'] }],
    ['the text encoders alone', { only: ['text_encoder', 'text_encoder_2'] }],
    ['8-bit floats', { only: ['unet'], fp8: true }],
  ];
  for (const [name, options] of ways) {
    const before = device.memory.storages;
    const made = (lora: readonly AdapterFile[]): string => {
      const fresh = load(lora, options);
      const weights = weightsOf(fresh);
      fresh.release();
      return weights;
    };
    const pipeline = load(sets[1], options);
    const held = device.memory.storages;
    for (const [i, lora] of sets.slice(0, name === 'bfloat16' ? undefined : 3).entries()) {
      const { memory } = device;
      memory.peak = memory.live;
      pipeline.setAdapters(lora);
      t.ok(memory.peak - memory.live < memory.live / 10, 'a tensor at a time');
      t.equal(weightsOf(pipeline), made(lora), `${name}, set ${i}`);
      t.equal(device.memory.storages, held, 'live tensors');
    }
    pipeline.release();
    t.equal(device.memory.storages, before, 'live tensors');
  }
  t.end();
});

test("the text encoders' scale is theirs alone", (t) => {
  const weights = (...lora: AdapterFile[]): string => {
    const pipeline = load(lora);
    const found = weightsOf(pipeline);
    pipeline.release();
    return found;
  };
  t.equal(
    weights({ path: both, scale: 0.8, textEncoderScale: 0.3 }),
    weights({ path: onlyUNet, scale: 0.8 }, { path: onlyTexts, scale: 0.3 }),
  );
  t.throws(() => weights({ path: both, textEncoderScale: Number.NaN }), /the scale of .* is NaN/);
  t.end();
});

test('a file that has changed is read again, and one that has not is not', (t) => {
  const opened: string[] = [];
  const watched: ModelSource = {
    ...source,
    weights(component) {
      opened.push(component);
      return source.weights(component);
    },
  };
  const path = writeAdapter(at('changing.safetensors'), { size: 0.5 });
  const pipeline = load([{ path }], {}, watched);
  pipeline.setAdapters([{ path }]);
  t.same(opened, []);
  writeAdapter(path, { size: 2 });
  pipeline.setAdapters([{ path }]);
  const fresh = load([{ path }]);
  t.equal(weightsOf(pipeline), weightsOf(fresh));
  rmSync(path);
  pipeline.setAdapters([{ path }]);
  t.equal(weightsOf(pipeline), weightsOf(fresh), 'nor is one that is gone');
  for (const each of [pipeline, fresh]) each.release();
  t.end();
});

test('mistakes and failures leave a pipeline that can be set again', (t) => {
  const before = device.memory.storages;
  let fails = false;
  const failing: ModelSource = {
    ...source,
    weights(component) {
      const weights = source.weights(component);
      const bytes: typeof weights.bytes = (name, room) => {
        if (fails && name.startsWith('up_blocks.1')) throw new UserError('the disk failed');
        return weights.bytes(name, room);
      };
      return { ...weights, inFile: undefined, bytes };
    },
  };
  const pipeline = load([{ path: both }], {}, failing);
  const asLoaded = weightsOf(pipeline);
  const held = device.memory.storages;
  const broken = at('broken.safetensors');
  writeFileSync(broken, 'no file of tensors');
  t.throws(() => pipeline.setAdapters([{ path: other }, { path: broken }]), /broken.safetensors/);
  t.throws(() => pipeline.setAdapters([{ path: at('none.safetensors') }]), /does not exist/);
  t.equal(weightsOf(pipeline), asLoaded, 'a file that cannot be read changes nothing');

  fails = true;
  t.throws(() => pipeline.setAdapters([{ path: style }]), new UserError('the disk failed'));
  t.ok(device.memory.storages < held, 'what was to be changed is not loaded');
  fails = false;
  pipeline.setAdapters([{ path: other }]);
  const fresh = load([{ path: other }]);
  t.equal(weightsOf(pipeline), weightsOf(fresh), 'and comes with the next that succeeds');
  fresh.release();
  t.equal(device.memory.storages, held, 'live tensors');

  pipeline.release();
  t.throws(() => pipeline.setAdapters([]), /released by now: load the pipeline again/);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});
