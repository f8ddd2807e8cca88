// Models in GGUF, as stable-diffusion.cpp and ComfyUI-GGUF write them: each loads as a safetensors file does that holds the numbers which
// the other one's stand for.
import { cpSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { encodeNumbers } from '../../io/dtype.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { openWeightsFile } from '../../models/checkpoint/weights_file.ts';
import { openSingleFile, openVaeFile } from '../../models/formats/singlefile.ts';
import { withUNet } from '../../models/locate/locate_unet.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents } from '../support/contents.ts';
import { writeControlNet } from '../support/controlnet_golden.ts';
import { type GgufTensor, type GgufValue, ggufBytes, q8_0 } from '../support/gguf_writer.ts';
import { goldenFolder, goldenLora, goldenSingleFile } from '../support/golden.ts';
import {
  asGguf,
  at,
  device,
  fileOf,
  golden,
  inQ8,
  isQuantised,
  loaded,
  model,
  ofQ8,
  parts,
  plainFile,
  sameModel,
  sizeOf,
  unetPrefix,
  type Weight,
  type Weights,
  weightsOf,
  whole,
} from '../support/weights_helpers.ts';

const goldenRefiner = weightsOf(goldenSingleFile('tiny-sdxl-refiner'));

test('a whole model in GGUF, as stable-diffusion.cpp keeps its names', (t) => {
  const before = device.memory.storages;
  const plain = whole(goldenSingleFile('tiny-sdxl'));
  sameModel(t, whole(fileOf('f16.gguf', asGguf(golden, 'F16'))), plain);
  const q8 = whole(fileOf('q8.gguf', asGguf(golden, 'Q8_0')));
  const dequantised = whole(plainFile('q8.safetensors', inQ8(golden)));
  for (const dtype of ['float32', 'bfloat16', 'float16'] as const)
    sameModel(t, q8, dequantised, parts, dtype);
  const [ours, exact] = [q8, plain].map((source) => loaded(source, 'unet', 'float32'));
  t.ok(
    [...exact].some(([name, bits]) => ours.get(name) !== bits),
    'other numbers than float16 holds',
  );
  // A VAE that convert was given beside the model's own.
  const given = new Map(golden);
  for (const [name, { shape, values }] of golden)
    if (name.startsWith('first_stage_model.'))
      given.set(name.replace('first_stage_model', 'vae'), {
        shape,
        values: values.map((value) => -value),
      });
  const turned = whole(fileOf('given.gguf', asGguf(given, 'F16')));
  const own = new Map([...given].filter(([name]) => !name.startsWith('first_stage_model.')));
  const renamed = [...own].map(([name, weight]): [string, Weight] => [
    name.replace(/^vae/, 'first_stage_model'),
    weight,
  ]);
  sameModel(t, turned, whole(plainFile('turned.safetensors', new Map(renamed))));
  t.equal(openVaeFile(at('given.gguf')).has('vae'), true);
  t.equal(device.memory.storages, before, 'nothing is left on the device');
  t.end();
});

/** The names that stable-diffusion.cpp gives, and the 1x1 convolutions that it makes of linear layers. */
function renamed(weights: Weights, fused: boolean, refiner = false): Weights {
  const second = refiner ? 'cond_stage_model.transformer.' : 'cond_stage_model.1.transformer.';
  const openClip = refiner ? 'conditioner.embedders.0.model.' : 'conditioner.embedders.1.model.';
  const words: [RegExp, string][] = [
    [/^transformer\.resblocks\.(\d+)\./, 'text_model.encoder.layers.$1.'],
    [/ln_([12])\./, 'layer_norm$1.'],
    [/attn\.out_proj/, 'self_attn.out_proj'],
    [/mlp\.c_fc/, 'mlp.fc1'],
    [/mlp\.c_proj/, 'mlp.fc2'],
    [/attn\.in_proj_(weight|bias)/, 'self_attn.in_proj.$1'],
    [/^ln_final/, 'text_model.final_layer_norm'],
    [/^positional_embedding/, 'text_model.embeddings.position_embedding.weight'],
    [/^token_embedding/, 'text_model.embeddings.token_embedding'],
    [/^text_projection/, 'text_model.text_projection'],
  ];
  const found: Weights = new Map();
  for (const [name, weight] of weights) {
    const { shape, values } = weight;
    if (name.startsWith(openClip)) {
      const key =
        second + words.reduce((text, [from, to]) => text.replace(from, to), name.slice(openClip.length));
      const third = sizeOf(shape) / 3;
      if (fused || !key.includes('in_proj')) found.set(key, weight);
      else
        ['q', 'k', 'v'].forEach((letter, i) => {
          const part = {
            shape: [shape[0] / 3, ...shape.slice(1)],
            values: values.slice(i * third, (i + 1) * third),
          };
          found.set(key.replace('in_proj', `${letter}_proj`), part);
        });
    } else if (name.startsWith('conditioner.embedders.0.'))
      found.set(name.replace('conditioner.embedders.0.', 'cond_stage_model.'), weight);
    else if (/diffusion_model.*proj_(in|out)\.weight$/.test(name))
      found.set(name, { shape: [...shape, 1, 1], values });
    else found.set(name, weight);
  }
  return found;
}

test("stable-diffusion.cpp's own names, of base and refiner", (t) => {
  const plain = whole(goldenSingleFile('tiny-sdxl'));
  const refinerModel = join(goldenFolder, 'tiny-sdxl-refiner');
  for (const fused of [false, true]) {
    sameModel(t, whole(fileOf('renamed.gguf', asGguf(renamed(golden, fused), 'F16'))), plain);
    const file = fileOf('refiner.gguf', asGguf(renamed(goldenRefiner, fused, true), 'F16'));
    const refiner = openSingleFile(file, { configs: refinerModel });
    t.same(parts.filter(refiner.has), ['unet', 'vae', 'text_encoder_2']);
    const own = openSingleFile(goldenSingleFile('tiny-sdxl-refiner'), { configs: refinerModel });
    sameModel(t, refiner, own, ['unet', 'text_encoder_2']);
  }
  t.end();
});

const unetAlone: Weights = new Map(
  [...golden].flatMap(([name, weight]): [string, Weight][] =>
    name.startsWith(unetPrefix) ? [[name.slice(unetPrefix.length), weight]] : [],
  ),
);

/** As ComfyUI-GGUF's convert.py and llama-quantize leave a UNet: in rows of 256, with the shapes in the metadata. */
function comfyBytes(architecture = 'sdxl'): Buffer {
  const metadata: Record<string, GgufValue> = { 'general.architecture': architecture };
  const tensors = [...unetAlone].map(([name, { shape, values }]): GgufTensor => {
    if (shape.length === 1 || values.length % 256 !== 0)
      return { name, shape, type: 0, bytes: encodeNumbers(values, 'float32') };
    metadata[`comfy.gguf.orig_shape.${name}`] = shape;
    return { name, shape: [values.length / 256, 256], type: 8, bytes: q8_0(values) };
  });
  return ggufBytes(tensors, metadata);
}

test("a UNet alone, as ComfyUI-GGUF's", async (t) => {
  const diffusers = openModel(model);
  const path = fileOf('unet.gguf', comfyBytes());
  const want = new Map(
    [...golden].map(([name, weight]): [string, Weight] => [
      name,
      name.startsWith(unetPrefix) && weight.shape.length > 1 && weight.values.length % 256 === 0
        ? { ...weight, values: ofQ8(q8_0(weight.values)) }
        : weight,
    ]),
  );
  t.ok([...unetAlone.values()].some(({ shape, values }) => shape.length === 4 && values.length % 256 === 0));
  const dequantised = whole(plainFile('comfy.safetensors', want));
  sameModel(t, await withUNet(diffusers, path), dequantised);
  sameModel(t, await withUNet(diffusers, at('comfy.safetensors')), dequantised, ['unet']);
  // Under diffusers' keys, in a file without a config and in a folder.
  const stored = join(model, 'unet', 'diffusion_pytorch_model.safetensors');
  const keyed = fileOf('diffusers.gguf', asGguf(weightsOf(stored), 'F16'));
  for (const place of [keyed, stored, join(model, 'unet'), model])
    sameModel(t, await withUNet(diffusers, place), diffusers, ['unet']);
  await t.rejects(
    withUNet(diffusers, fileOf('flux.gguf', ggufBytes([], { 'general.architecture': 'flux' }))),
    {
      message: /flux\.gguf is not SDXL's UNet in one file, but a model of the kind "flux"; give such a file/,
    },
  );
  await t.rejects(withUNet(diffusers, join(model, 'vae')), /holds a AutoencoderKL, not SDXL's UNet/);
  await t.rejects(withUNet(diffusers, at('absent.gguf')), /no UNet at .*absent\.gguf; give a UNet's \.gguf/);
  await t.rejects(withUNet(diffusers, at('.')), /has no config\.json of a UNet/);
});

const draw = async (name: string, ...argv: string[]) => {
  const lent = argv.some((word, i) => word !== model && ['--model', '--vae'].includes(argv[i - 1]));
  const asked = ['--prompt', 'a fox', '--steps', '2', '--seed', '1', '--quiet'];
  const said = await sdxl(
    'sample',
    ...asked,
    ...(lent ? ['--configs', model] : []),
    '--output',
    at(`${name}.png`),
    '--save-latents',
    at(name),
    ...argv,
  );
  return { ...said, latents: said.status === 0 ? contents(at(name)) : undefined };
};

test('the program draws from them, with --q8 too, inspects and exports them', async (t) => {
  fileOf('q8.gguf', asGguf(golden, 'Q8_0', { 'general.architecture': 'sdxl' }));
  plainFile('q8.safetensors', inQ8(golden));
  for (const q8 of [[], ['--q8']]) {
    const want = await draw('want', '--model', at('q8.safetensors'), ...q8);
    const got = await draw('got', '--model', at('q8.gguf'), ...q8);
    t.equal(got.status, 0, got.err);
    t.same(got.latents, want.latents);
  }
  const unet = fileOf('unet.gguf', comfyBytes());
  const want = await draw('want', '--model', model, '--unet', at('comfy.safetensors'));
  for (const argv of [['--unet', unet], [`--diffusion-model=${unet}`]]) {
    const got = await draw('got', '--model', model, ...argv);
    t.equal(got.status, 0, got.err);
    t.same(got.latents, want.latents, 'a UNet alone');
  }
  t.notSame(want.latents, (await draw('own', '--model', model)).latents, 'which is another');
  const again = await draw('again', '--from', at('got.png'));
  t.same(again.latents, want.latents, 'the picture names it');
  const vae = await draw('vae', '--model', model, '--vae', at('q8.gguf'));
  t.equal(vae.status, 0, vae.err);
  t.match((await sdxl('inspect', at('q8.gguf'))).out, /SDXL base\n.*unet .* F16 Q8_0|Q8_0 F16/);
  t.match(
    (await sdxl('inspect', unet)).out,
    /UNet in one file, original keys\n.*\n {2}general\.architecture: sdxl/,
  );
  const out = at('exported');
  const exported = await sdxl('export', at('q8.gguf'), out, '--configs', model, '--quiet');
  t.equal(exported.status, 0, exported.err);
  sameModel(t, openModel(out), whole(at('q8.safetensors')));
  const joined = at('joined.safetensors');
  const join_ = await sdxl(
    'export',
    model,
    joined,
    '--format',
    'single-file',
    '--unet',
    unet,
    '--dtype',
    'float32',
    '--quiet',
  );
  t.equal(join_.status, 0, join_.err);
  sameModel(t, whole(joined), whole(at('comfy.safetensors')));
});

/** A safetensors file's tensors in float32, as GGUF: a number alone is a row of one there. */
function ggufOf(path: string): Buffer {
  const tensors = [...weightsOf(path)].map(([name, { shape, values }]) => ({
    ...{ name, shape: shape.length === 0 ? [1] : shape, type: 0 },
    bytes: encodeNumbers(values, 'float32'),
  }));
  return ggufBytes(tensors);
}

test('adapters and ControlNets in GGUF, as stable-diffusion.cpp converts them', async (t) => {
  const lora = goldenLora('lora/scaled_kohya.safetensors');
  const inGguf = fileOf('lora.gguf', ggufOf(lora));
  const [want, got] = [
    await draw('want', '--model', model, '--lora', `${lora}:0.7`),
    await draw('got', '--model', model, '--lora', `${inGguf}:0.7`),
  ];
  t.equal(got.status, 0, got.err);
  t.same(got.latents, want.latents);
  t.notSame(got.latents, (await draw('own', '--model', model)).latents);
  const [plain, ours] = ['plain', 'ours'].map((name) => at(`${name}-kohya.safetensors`));
  for (const [from, out] of [
    [lora, plain],
    [inGguf, ours],
  ]) {
    const format = ['--format', 'lora-kohya', '--configs', model, '--dtype', 'float32', '--quiet'];
    const { status, err } = await sdxl('export', from, out, ...format);
    t.equal(status, 0, err);
  }
  t.same(contents(ours), contents(plain));

  const net = writeControlNet(at('net'), 'full');
  const file = join(net, 'net.gguf');
  writeFileSync(file, ggufOf(join(net, 'diffusion_pytorch_model.safetensors')));
  const followed = (path: string) =>
    draw('control', '--model', model, '--controlnet', path, '--control-image', at('got.png'));
  const [folder, alone] = [await followed(net), await followed(file)];
  t.equal(alone.status, 0, alone.err);
  t.same(alone.latents, folder.latents);
});

test('what the program says to files that are not what was asked for', async (t) => {
  const unet = fileOf('unet.gguf', comfyBytes());
  const odd = ggufBytes(
    [...golden].map(([name, { shape, values }]) => ({
      ...{ name, shape, type: isQuantised(name, { shape, values }) ? 20 : 1 },
      bytes: encodeNumbers(values, 'float16'),
    })),
  );
  const type = /tensor ".*" of .*odd\.gguf has type IQ4_NL: convert it to one of F32, F16, Q4_0/;
  const bytes = asGguf(golden, 'F16');
  await refusesEach(t, (...argv) => draw('refused', ...argv), [
    [['--model', fileOf('odd.gguf', odd)], type],
    [
      ['--model', unet],
      /unet\.gguf holds a UNet alone: give a whole model as --model, and this beside it as --unet/,
    ],
    [
      ['--model', fileOf('cut.gguf', bytes.subarray(0, bytes.length / 2))],
      /past the end of the file: it is truncated/,
    ],
    [['--model', fileOf('renamed.safetensors', bytes), '--unet', at('flux.gguf')], /kind "flux"/],
    [['--lora', unet], /unet\.gguf: \d+ of its names match no weight of this model/],
    [['--controlnet', at('flux.gguf'), '--control-image', at('got.png')], /flux\.gguf/],
  ]);
  await refusesEach(t, (path) => sdxl('inspect', path), [
    [[at('odd.gguf')], /odd\.gguf: .*has tensors of type IQ4_NL: convert it/],
    [[at('cut.gguf')], /truncated/],
  ]);
  cpSync(unet, at('disguised.safetensors'));
  t.equal(
    openWeightsFile(at('disguised.safetensors')).metadata['general.architecture'],
    'sdxl',
    'told by what it is',
  );
});
