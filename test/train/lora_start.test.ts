// Adapters that begin as a LoRA file left off: the UNet with them is diffusers' with the file loaded (golden area lora), and a run
// goes on from another's.
import { copyFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { unload } from '../../engine/module.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { addAdapters, parametersOf } from '../../models/adapters/adapters.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { locateAdapter } from '../../models/lora/lora_file.ts';
import { startFromLora } from '../../models/lora/lora_start.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { type Assert, type GoldenCase, goldenArea, goldenLora } from '../support/golden.ts';
import { compareSample, devices } from '../support/models_golden.ts';
import { basic, folder, model, run } from '../support/small_runs.ts';

const area = goldenArea('lora');
const kohya = ['to_q', 'to_k', 'to_v', 'to_out.0', 'ff.net.0.proj', 'ff.net.2', 'proj_in', 'proj_out'];
const LAYERS = 136;

/** The tiny UNet with adapters on it, and their parameters as a run names them. */
function adapted(device: Device, { rank = 4, alpha = 8, targets = kohya } = {}) {
  const source = openModel(model);
  const unetConfig = parseUNetConfig(source.config('unet'));
  const own = unet(unetConfig);
  source.load('unet', own, device, 'float32');
  const drawn = parametersOf(
    addAdapters(own, { rank, alpha, targets }, (_, count) => new Float32Array(count).fill(0.75)),
  );
  const parameters = new Map([...drawn].map(([key, parameter]) => [`unet.${key}`, parameter] as const));
  const start = (path: string) => startFromLora({ unet: own, unetConfig }, path, parameters, { rank, alpha });
  return { own, parameters, start };
}

function check(t: Assert, c: GoldenCase, device: Device): void {
  const { own, start } = adapted(device);
  t.ok(start(goldenLora((c.files as string[])[0])) === LAYERS, `${c.id}: all its layers`);
  compareSample(t, area, c, own, device);
  unload(own);
}

/** Of one file, loaded whole. */
const isWhole = ({ settings, files }: GoldenCase): boolean =>
  (files as string[]).length === 1 && ((settings as { scale: number | null }).scale ?? 1) === 1;

for (const device of devices) {
  test(`adapters begin as diffusers has a LoRA on ${device.name}`, (t) => {
    const before = device.memory.storages;
    const cases = area.cases.filter((c) => c.call === 'unet forward after load_lora_weights' && isWhole(c));
    t.ok(cases.length >= 3, `${cases.length} files`);
    for (const c of cases) check(t, c, device);
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

test('what adapters cannot begin with is refused in a sentence, before anything is changed', (t) => {
  const [device] = devices;
  const plain = goldenLora('lora/plain_diffusers.safetensors');
  const file = openSafetensors(plain);
  const entries = [...file.tensors.values()].map((info) => ({ ...info, bytes: file.read(info.name) }));
  const stretched = join(folder, 'stretched.safetensors');
  const [first] = entries;
  const module = first.name.replace('.lora.down.weight', '');
  const magnitude = { name: `${module}.lora_magnitude_vector.weight`, dtype: 'float32' } as const;
  const rows = 24;
  writeSafetensors(stretched, [
    ...entries,
    { ...magnitude, shape: [rows], bytes: new Uint8Array(new Float32Array(rows).fill(1).buffer) },
  ]);
  file.close();
  for (const [options, path, sentence] of [
    [{ rank: 8 }, plain, /^LoRA .* has rank 4, and the run 8; set lora\.rank to that$/],
    [{ targets: ['to_q'] }, plain, /names are of layers that the run puts no adapter on: .*lora\.targets/],
    [{}, stretched, /^LoRA .*: 1 of its names are of a DoRA: .*attn1\.to_k; set lora\.use_dora$/],
    [{}, join(folder, 'absent.safetensors'), /absent\.safetensors/],
  ] as const) {
    const { own, parameters, start } = adapted(device, {
      ...options,
      targets: [...(options.targets ?? kohya)],
    });
    t.throws(() => start(path), { name: 'UserError', message: sentence });
    const [a] = parameters.values();
    t.ok(
      a.tensor.floats().every((x) => x === a.tensor.floats()[0]),
      'as it was',
    );
    unload(own);
  }
  t.throws(() => resolveRun({ ...basic('refused'), lora: { network_weights: plain } }, 'test', 'run.ts'), {
    message: /^test: "lora\.network_weights" is of adapters, and "train\.target" is "unet"; leave it out/,
  });
  t.end();
});

test("a run goes on with another's LoRA, and resumes without the file", async (t) => {
  const lora = { rank: 2, alpha: 4, targets: ['to_q', 'conv1'] };
  const input = (output: string, more: RunInput): RunInput => ({
    ...basic(output),
    train: { target: 'lora' },
    ema: { decay: 0 },
    ...more,
  });
  const begun = await run(input('begun', { lora, steps: 2 }));
  const name = 'pytorch_lora_weights.safetensors';
  const weights = join(folder, 'left-off.safetensors');
  copyFileSync(join(begun.folder, name), weights);
  const on = input('went-on', {
    lora: { ...lora, alpha: 8, network_weights: weights },
    optimizer: { lr: 0 },
    steps: 2,
  });
  const stopped = await run(on, { until: 1 });
  rmSync(weights);
  const ended = await run(on, { checkpoint: stopped.folder });
  await t.resolves(
    run({ ...on, output: join(folder, 'elsewhere') }, { checkpoint: stopped.folder }),
    'into another folder too',
  );
  const [from, to] = [begun, ended].map((outcome) => openSafetensors(join(outcome.folder, name)));
  t.same([...to.tensors.keys()].sort(), [...from.tensors.keys()].sort());
  for (const key of from.tensors.keys()) {
    const [a, b] = [from, to].map((each) => new Float32Array(new Uint8Array(each.read(key)).buffer));
    const factor = key.includes('lora_B') ? 0.5 : 1;
    t.ok(
      a.every((x, i) => b[i] === x * factor),
      key,
    );
  }
  t.ok(from.tensors.size > 20);
  from.close();
  to.close();
});

test('where a LoRA lies', async (t) => {
  const root = t.testdir({
    empty: { 'model.safetensors': '' },
    run: { 'pytorch_lora_weights.safetensors': '' },
    'peft.safetensors': { 'adapter_model.safetensors': '' },
    checkpoint: { lora: { 'pytorch_lora_weights.safetensors': '' } },
    whole: { final: { 'pytorch_lora_weights.safetensors': '' } },
    'a.safetensors': '',
    'a.bin': '',
  });
  const at = (name: string) => locateAdapter(join(root, name)).slice(root.length + 1);
  t.equal(at('run'), join('run', 'pytorch_lora_weights.safetensors'));
  t.equal(at('peft.safetensors'), join('peft.safetensors', 'adapter_model.safetensors'));
  t.equal(at('checkpoint'), join('checkpoint', 'lora', 'pytorch_lora_weights.safetensors'));
  for (const file of ['a.safetensors', 'a.bin']) t.equal(at(file), file, 'a file is told by what opens it');
  const one = /one of pytorch_lora_weights\.safetensors, adapter_model\.safetensors, lora.pytorch/;
  t.throws(() => at('empty'), { name: 'UserError', message: /empty holds no LoRA: a folder must have one/ });
  t.throws(() => at('empty'), { message: one });
  t.throws(() => at('whole'), { message: /whole is the folder of a run; give what it has made, .*final$/ });
  t.throws(() => at('absent'), { name: 'UserError', message: /^no LoRA at .*absent; give a \.safetensors/ });
  t.throws(() => at('absent'), { message: one });
});
