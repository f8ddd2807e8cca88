// LoCon: adapters whose larger convolutions have a rank and an alpha of their own, from the run file to a finished file in either
// spelling and back. The judge is W + alpha / rank B A, summed in float64 with each layer's own numbers.
import { join } from 'node:path';
import { test } from 'tap';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter, unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { addAdapters, parametersOf } from '../../models/adapters/adapters.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { toMemoryLayout } from '../../models/checkpoint/weights.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import type { RunInput } from '../../train/run/run.ts';
import { sdxl } from '../support/command_line.ts';
import { type GoldenCase, goldenArea, maxDifference } from '../support/golden.ts';
import { unetInputs } from '../support/models_golden.ts';
import { basic, device, folder, model, resumes, run } from '../support/small_runs.ts';

const lora = {
  ...{ rank: 3, alpha: 6, conv_rank: 2, conv_alpha: 1 },
  targets: ['to_q', 'conv1', 'conv_shortcut', 'downsamplers.0.conv'],
};
const large = /(conv1|samplers\.0\.conv)$/;
const sizesOf = (path: string): [rank: number, alpha: number] => (large.test(path) ? [2, 1] : [3, 6]);

const source = openModel(model);
const unetConfig = parseUNetConfig(source.config('unet'));

function openUNet(): UNet {
  const own = unet(unetConfig);
  source.load('unet', own, device, 'float32');
  return own;
}

const area = goldenArea('lora');
const inputs = area.cases.find((c) => c.call === 'unet forward after load_lora_weights') as GoldenCase;

function predict(own: UNet): Float32Array {
  const got = scope(() => {
    const { sample, timesteps, conditioning } = unetInputs(area, inputs, device);
    return noGrad(() => own(sample, timesteps, conditioning)).floats();
  });
  unload(own);
  return got;
}

/** A file's tensors, as a checkpoint lays them out, by name. */
function tensorsOf(path: string): Map<string, { shape: readonly number[]; values: Float32Array }> {
  const file = openSafetensors(path);
  const found = new Map(
    [...file.tensors.values()].map(({ name, shape }) => {
      return [name, { shape, values: new Float32Array(new Uint8Array(file.read(name)).buffer) }] as const;
    }),
  );
  file.close();
  return found;
}

/** The layers of a file in peft's keys, by their paths in the UNet. */
const layersOf = (path: string): string[] =>
  [...tensorsOf(path).keys()].flatMap((name) => /^unet\.(.*)\.lora_A\.weight$/.exec(name)?.[1] ?? []);

/** The model with the file's layers added in float64. */
function mergedByHand(path: string): UNet {
  const own = openUNet();
  const parameters = namedParameters(own);
  const tensors = tensorsOf(path);
  for (const layer of layersOf(path)) {
    const [a, b] = ['A', 'B'].map((part) => tensors.get(`unet.${layer}.lora_${part}.weight`)?.values ?? []);
    const [rank, alpha] = sizesOf(layer);
    const { shape, size, tensor } = parameters.get(`${layer}.weight`) as Parameter;
    const inner = size / shape[0];
    const gain = Float32Array.from({ length: size }, (_, i) => {
      const [o, k] = [Math.floor(i / inner), i % inner];
      let sum = 0;
      for (let r = 0; r < rank; r++) sum += b[o * rank + r] * a[r * inner + k];
      return (alpha / rank) * sum;
    });
    const bytes = new Uint8Array(gain.buffer);
    const placed =
      shape.length === 4 ? new Float32Array(toMemoryLayout(bytes, shape, 4).slice().buffer) : gain;
    tensor.set(tensor.floats().map((w, i) => w + placed[i]));
  }
  return own;
}

/** The model with a run's adapters on it, which have the numbers of the file. */
function adaptedBy(path: string): UNet {
  const own = openUNet();
  const tensors = tensorsOf(path);
  for (const [name, { shape, tensor }] of parametersOf(
    addAdapters(own, lora, (_, count) => new Float32Array(count)),
  )) {
    const { values } = tensors.get(`unet.${name}`) as { values: Float32Array };
    const bytes = encodeNumbers(values, 'float32');
    tensor.upload(shape.length === 4 ? toMemoryLayout(bytes, shape, 4) : bytes);
  }
  return own;
}

function mergedByFile(path: string): UNet {
  const own = openUNet();
  mergeLora({ unet: own, unetConfig }, path);
  return own;
}

const trained = (output: string, more: RunInput = {}): RunInput => ({
  ...basic(output),
  ...{ train: { target: 'lora' }, lora, ema: { decay: 0 }, optimizer: { lr: 0.05 }, steps: 2, ...more },
});

test('a run whose convolutions have their own rank and alpha', async (t) => {
  const { output: _, ...input } = trained('');
  await resumes(t, 'locon', { ...input, steps: 3, ema: { decay: 0.9 } });
  const { folder: made } = await run(trained('locon'));
  const path = join(made, 'pytorch_lora_weights.safetensors');
  const layers = layersOf(path);
  const larger = layers.filter((layer) => large.test(layer));
  t.ok(larger.length > 5 && layers.length > larger.length + 5, `${larger.length} of ${layers.length}`);
  t.ok(layers.includes('down_blocks.1.resnets.0.conv_shortcut'), 'a 1x1 convolution');
  const tensors = tensorsOf(path);
  for (const layer of layers)
    t.equal(tensors.get(`unet.${layer}.lora_A.weight`)?.shape[0], sizesOf(layer)[0], layer);

  const file = openSafetensors(path);
  const config = JSON.parse(file.metadata.lora_adapter_metadata) as Record<string, unknown>;
  file.close();
  const patterns = (value: number) => Object.fromEntries(larger.map((layer) => [layer, value]));
  t.strictSame(config, {
    ...{ 'unet.peft_type': 'LORA', 'unet.r': 3, 'unet.lora_alpha': 6 },
    ...{ 'unet.rank_pattern': patterns(2), 'unet.alpha_pattern': patterns(1) },
    'unet.target_modules': lora.targets,
  });

  const kohya = join(folder, 'locon-kohya.safetensors');
  const exported = await sdxl('export', made, kohya, '--format', 'lora-kohya', '--configs', model);
  t.equal(exported.status, 0, exported.err);
  for (const layer of layers) {
    const alpha = tensorsOf(kohya).get(`lora_unet_${layer.replaceAll('.', '_')}.alpha`)?.values;
    t.strictSame([...(alpha ?? [])], [sizesOf(layer)[1]], `${layer}: alpha`);
  }
  t.match((await sdxl('inspect', path)).out, /rank 2, 3; layers/);

  const want = predict(mergedByHand(path));
  t.ok(maxDifference(want, predict(openUNet())) > 0.01, 'the adapters matter');
  for (const [what, own] of [
    ['live adapters', adaptedBy(path)],
    ['merged', mergedByFile(path)],
    ["merged from kohya's spelling", mergedByFile(kohya)],
  ] as const) {
    const apart = maxDifference(predict(own), want);
    t.ok(apart < 5e-5, `${what} differ by ${apart}`);
  }

  const on = (output: string, sizes: object) =>
    run(
      trained(output, {
        ...{ steps: 1, optimizer: { lr: 0 } },
        lora: { ...lora, ...sizes, network_weights: kohya },
      }),
    );
  const begun = tensorsOf(
    join((await on('locon-on', { alpha: 3, conv_alpha: 4 })).folder, 'pytorch_lora_weights.safetensors'),
  );
  for (const layer of layers) {
    const name = `unet.${layer}.lora_B.weight`;
    const factor = large.test(layer) ? 1 / 4 : 2;
    const values = begun.get(name)?.values;
    t.ok(
      tensors.get(name)?.values.every((x, i) => values?.[i] === x * factor),
      `${name} begins as it was`,
    );
  }
  for (const [sizes, sentence] of [
    [{ conv_rank: 0 }, /has rank 2, and the run 3; set lora\.conv_rank to that$/],
    [{ rank: 2 }, /has rank 3, and the run 2; set lora\.rank to that$/],
  ] as const)
    await t.rejects(on('locon-refused', sizes), { name: 'UserError', message: sentence });
});

test('what is left out is as for other layers', (t) => {
  const shapes = (sizes: object) => {
    const own = openUNet();
    const added = parametersOf(
      addAdapters(own, { rank: 3, alpha: 6, targets: ['conv1'], ...sizes }, (_, n) => new Float32Array(n)),
    );
    const [[, a]] = added;
    unload(own);
    return a.shape[0];
  };
  t.equal(shapes({}), 3);
  t.equal(shapes({ conv_rank: 0, conv_alpha: 1 }), 3);
  t.equal(shapes({ conv_rank: 5 }), 5);
  t.end();
});

test('a rank for convolutions where none is adapted', async (t) => {
  const only = (more: object): RunInput => ({ lora: { targets: ['to_q', 'conv_shortcut'], ...more } });
  for (const sizes of [{ conv_rank: 4 }, { conv_alpha: 4 }])
    await t.rejects(run(trained('locon-none', only(sizes))), {
      name: 'UserError',
      message: /^lora\.conv_rank and lora\.conv_alpha are of convolutions larger than 1x1, and lora\.targets/,
    });
});
