// IP-Adapters against transformers and diffusers (golden/ip_adapter.jsonl): preprocessing, the vision encoder, tokens and whole calls; what
// scale, ControlNets and the number of pictures change; and what is refused.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, parameterCount, unload } from '../../engine/module.ts';
import { concat } from '../../engine/ops/move.ts';
import { scale } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { preprocess, preprocessClip, preprocessControl, preprocessMask } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadAndClose, sourceOf } from '../../models/checkpoint/weights.ts';
import { ofOneKind } from '../../models/control/controlnet_kinds.ts';
import { presets } from '../../models/formats/presets.ts';
import { parseVisionConfig, visionEncoder } from '../../models/ip_adapter/clip_vision.ts';
import {
  attentionWidths,
  ipAdapter,
  openIPAdapter,
  parseIPAdapter,
} from '../../models/ip_adapter/ip_adapter.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Request } from '../../models/request.ts';
import { unet } from '../../models/unet/unet.ts';
import { toDevice } from '../../models/vae/latents.ts';
import { disc, picture, writeControlNet } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, maxDifference } from '../support/golden.ts';
import {
  configs,
  encoderConfig,
  golden,
  masksOf,
  picturesOf,
  writeEncoder,
  writeIPAdapter,
} from '../support/ip_adapter_golden.ts';
import { devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-ip-adapter-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const encoderFolder = writeEncoder(at('image_encoder'));
for (const name of ['plain', 'plus']) writeIPAdapter(at(`${name}.safetensors`), name);
const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const opened = (name: string) => openIPAdapter(at(`${name}.safetensors`), encoderFolder);
const pipelineOf = (names: readonly string[], device: Device, dtype: FloatDType = 'float32') =>
  loadPipeline(source, { device, dtype, ipAdapter: names.map(opened) });

const weightsOf = (name: string) => {
  const path = at(`${name}.safetensors`);
  return sourceOf(path, [openSafetensors(path)]);
};

const calls = golden.filter(({ call }) => call !== undefined);
const callOf = (id: string) => calls.find(({ call }) => call === id) as (typeof golden)[number];
const exact = { rtol: 0 };

test('pictures as CLIPImageProcessor makes them, to the bit', (t) => {
  for (const { picture: of, size, stride, values } of nonEmpty(
    golden.filter((each) => each.size !== undefined),
  )) {
    const { data, shape } = preprocessClip(picture(...of), size as number);
    t.same(shape, [1, 3, size, size]);
    const some = Float32Array.from({ length: values.length }, (_, i) => data[i * stride]);
    t.ok(
      Buffer.from(some.buffer).equals(Buffer.from(values.buffer, values.byteOffset, values.byteLength)),
      `${of}`,
    );
    t.equal(values.length, Math.ceil(data.length / stride));
  }
  t.end();
});

for (const device of devices) {
  test(`the vision encoder and tokens on ${device.name}`, (t) => {
    const before = device.memory.storages;
    const encoder = visionEncoder(parseVisionConfig(encoderConfig));
    openComponent(encoderFolder).load('image_encoder', encoder, device, 'float32');
    const pixelsOf = (of: (typeof golden)[number]['picture']) =>
      toDevice(preprocessClip(picture(...of), 56), device, 'float32');
    noGrad(() =>
      scope(() => {
        for (const { picture: of, of: what, values, atol } of nonEmpty(
          golden.filter((each) => each.encoder),
        )) {
          const got = encoder(pixelsOf(of), what as 'penultimate' | 'image_embeds');
          allClose(t, `${what}`, got.floats(), values, { atol, ...exact });
        }
        for (const { adapter: name = '', picture: of, values, atol } of nonEmpty(
          golden.filter((each) => each.adapter),
        )) {
          const adapter = ipAdapter(configs[name]);
          loadAndClose(adapter, weightsOf(name), device, 'float32');
          const [x, zeros] = [pixelsOf(of), scale(pixelsOf(of), 0)];
          const embeds = () => encoder(x, 'image_embeds');
          const states =
            name === 'plain'
              ? concat([scale(embeds(), 0), embeds()], 0)
              : encoder(concat([zeros, x], 0), 'penultimate');
          const got = adapter.children.image_proj(states).floats();
          allClose(t, `tokens of ${name}`, got, values, { atol, ...exact });
          unload(adapter);
        }
      }),
    );
    unload(encoder);
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

/** The request of a golden call. */
function requestOf({ call, adapters, settings, seed }: (typeof golden)[number]): Request {
  const isMasked = call === 'inpaint' || call === 'masks_of_two';
  const over = call === 'img2img' || isMasked;
  const { width = 64, height = 64 } = settings;
  const masks = adapters.map(([, , , of]) => masksOf(of)?.map((mask) => preprocessMask(mask, width, height)));
  return {
    ...{ prompt: ['a red fox in the snow'], negative_prompt: ['rain'] },
    ...{ num_inference_steps: 4, guidance_scale: 5, ...settings, width, height },
    image: over ? preprocess(picture(4, 64, 64)) : undefined,
    mask: isMasked ? preprocessMask(disc()) : undefined,
    generators: [new TorchGenerator(seed)],
    ip_adapter_image: adapters.map(([, of]) => picturesOf(of)),
    ip_adapter_scale: adapters.map(([, , factor]) => factor),
    ip_adapter_masks: masks.some((each) => each) ? masks : undefined,
  };
}

for (const device of devices) {
  const some = device.name === 'reference' ? ['no_guidance'] : calls.map(({ call }) => call);
  test(`whole calls on ${device.name}`, { timeout: 300_000 }, async (t) => {
    const before = device.memory.storages;
    for (const c of nonEmpty(calls.filter(({ call }) => some.includes(call)))) {
      const pipeline = pipelineOf(
        c.adapters.map(([name]) => name),
        device,
      );
      const { latents } = await denoiseToEnd(pipeline, requestOf(c));
      allClose(t, `${c.call}`, latents.data, c.values, { atol: c.atol, ...exact });
      pipeline.release();
    }
    t.equal(device.memory.storages, before, 'live tensors');
  });
}

test('in bfloat16, near float32', async (t) => {
  const [device] = devices;
  for (const id of ['plain', 'plus']) {
    const c = callOf(id);
    const pipeline = pipelineOf([id], device, 'bfloat16');
    const { latents } = await denoiseToEnd(pipeline, requestOf(c));
    const square = (values: Float32Array) => values.reduce((sum, x) => sum + x * x, 0);
    const off = Math.sqrt(square(latents.data.map((x, i) => x - c.values[i])) / square(c.values));
    t.ok(off < 0.05, `${id}: ${(100 * off).toFixed(1)} % of the latents' root mean square`);
    pipeline.release();
  }
});

test('what has a part in a picture', async (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  writeControlNet(at('small'), 'small');
  const { plain, plus } = { plain: callOf('plain'), plus: callOf('plus') };
  const pipeline = loadPipeline(source, {
    ...{ device, dtype: 'float32', ipAdapter: [opened('plain'), opened('plus')] },
    controlnet: [openComponent(at('small'))],
  });
  const control_image = [preprocessControl(picture(1, 64, 64))];
  const ip_adapter_image = [plain, plus].map(({ adapters: [[, of]] }) => picturesOf(of));
  const request = {
    ...{ ...requestOf(plain), num_inference_steps: 2, num_images_per_prompt: 1 },
    ...{ ip_adapter_image, ip_adapter_scale: undefined },
  };
  const drawn = async (more: Partial<Request>, parts: Partial<typeof pipeline> = {}) => {
    const { latents } = await denoiseToEnd(
      { ...pipeline, ...parts },
      { ...request, control_image, ...more, generators: [new TorchGenerator(1)] },
    );
    return latents.data;
  };
  const none = { ip_adapter_image: undefined, ip_adapter_scale: undefined };
  const without = await drawn(none, { ipAdapter: [] });
  t.equal(maxDifference(await drawn({ ip_adapter_scale: 0 }), without), 0, 'a scale of 0 is none');
  t.equal(maxDifference(await drawn({ ip_adapter_scale: [0, 0] }), without), 0);
  const [one] = pipeline.ipAdapter;
  const alone = await drawn({ ip_adapter_image: [ip_adapter_image[0]] }, { ipAdapter: [one] });
  t.equal(maxDifference(await drawn({ ip_adapter_scale: [1, 0] }), alone), 0, 'the other alone');
  t.ok(maxDifference(alone, without) > 0.05, 'it does draw by the picture');
  const other = await drawn({ ip_adapter_image: [picture(9, 80, 60)] }, { ipAdapter: [one] });
  t.ok(maxDifference(alone, other) > 0.01, 'and by which');
  const [first] = ip_adapter_image;
  const twice = await drawn({ ip_adapter_image: [[first, first] as Picture[]] }, { ipAdapter: [one] });
  t.ok(maxDifference(twice, alone) < 1e-4, 'one picture twice is that picture');
  const two = await drawn({ num_images_per_prompt: 2 });
  t.equal(two.length, 2 * alone.length);
  t.ok(maxDifference(two.subarray(0, alone.length), await drawn({})) < 1e-4, 'pictures share the tokens');

  const [net] = pipeline.controlnet.map(ofOneKind);
  const seen: unknown[] = [];
  const watched = Object.assign((...args: Parameters<typeof net>) => {
    seen.push(net(...args).map((x) => x.floats()));
    return net(...args);
  }, net);
  const residuals = async (more: Partial<Request>) => {
    seen.length = 0;
    await drawn({ ...more, num_inference_steps: 1 }, { controlnet: [watched] });
    return seen[0];
  };
  t.same(await residuals({}), await residuals({ ip_adapter_scale: 0 }), 'a ControlNet sees the prompt alone');

  await drawn({ last: true });
  for (const { encoder, module } of pipeline.ipAdapter)
    for (const each of [encoder, module])
      t.ok(
        [...namedParameters(each).values()].every(({ loaded }) => !loaded),
        'freed before the first step',
      );
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('adapters share an encoder', (t) => {
  const pipeline = pipelineOf(['plain', 'plus'], devices[0]);
  const [first, second] = pipeline.ipAdapter;
  t.equal(first.encoder, second.encoder);
  pipeline.release();
  t.end();
});

test('what is refused', async (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const loading = (file: string, encoder = encoderFolder, model = source) =>
    loadPipeline(model, { device, dtype: 'float32', ipAdapter: [openIPAdapter(file, encoder)] });
  const written = (name: string, of: string, more: Parameters<typeof writeIPAdapter>[2]) =>
    writeIPAdapter(at(`${name}.safetensors`), of, more);
  const { widths } = configs.plain;
  const narrow = writeEncoder(at('narrow'), { ...encoderConfig, projection_dim: 24 });
  const small = writeEncoder(at('thin'), { ...encoderConfig, hidden_size: 24 });
  const refiner = openModel(join(goldenFolder, 'tiny-sdxl-refiner'));
  const [plain, plus] = [at('plain.safetensors'), at('plus.safetensors')];
  const bad: [() => unknown, RegExp][] = [
    [
      () => loading(plain, narrow),
      /plain\.safetensors reads 40 numbers of an image encoder and .*narrow gives 24: take/,
    ],
    [
      () => loading(plus, small),
      /plus\.safetensors reads 48 numbers of an image encoder and .*thin gives 24: take/,
    ],
    [
      () => loading(written('short', 'plain', { widths: widths.slice(2) })),
      /short.* keys and values for 15 layers and the UNet 17 that attend to the prompt: take one/,
    ],
    [
      () => loading(written('other', 'plain', { widths: widths.toReversed() })),
      /other.* has ip_adapter\.1 of width 32 for a layer of the UNet of 24: take one/,
    ],
    [
      () => loading(written('wide', 'plus', { cross_attention_dim: 96 })),
      /wide.* makes tokens of width 96 and the UNet attends to 80: take one/,
    ],
    [
      () => loading(plain, encoderFolder, refiner),
      /tiny-sdxl-refiner is a refiner, for which there are no IP-Ad/,
    ],
    [
      () => loading(plain.replace('safetensors', 'bin')),
      /plain\.bin is a pickle, .*; give .*plain\.safetensors/,
    ],
    [
      () => loading(join(encoderFolder, 'model.safetensors')),
      /model\.safetensors is no IP-Adapter, as it has/,
    ],
    [() => loading(at('absent.safetensors')), /absent\.safetensors does not exist/],
    [() => loading(plain, join(goldenFolder, 'tiny-sdxl')), /has no image_encoder\/config\.json/],
  ];
  for (const [load, message] of bad) t.throws(load, { name: 'UserError', message });

  // Every tensor has the same shape.
  const shaped = (shape: number[], ...names: string[]) => ({
    ...{ where: 'x', names, floats: () => new Float32Array(), bytes: () => new Uint8Array(), close() {} },
    info: (name: string) =>
      names.includes(name) ? { dtype: 'float16' as const, storedAs: 'F16', bytes: 0, shape } : undefined,
  });
  const named = (...names: string[]) => shaped([80, 80], ...names);
  const pair = 'ip_adapter.1.to_k_ip.weight';
  t.throws(() => parseIPAdapter(named(pair, 'image_proj.proj.0.weight', 'image_proj.norm.weight')), {
    message: /x is an IP-Adapter of faces \(FaceID or full-face\), which sdxl does not run/,
  });
  t.throws(() => parseIPAdapter(named(pair)), { message: /x has no tensor image_proj\.norm\.weight/ });
  t.throws(() => parseIPAdapter(named(pair, 'ip_adapter.2.to_k_ip.weight')), {
    message: /has no tensor ip_adapter\.3/,
  });

  const all = (projection: string[]) => [pair, ...projection.map((key) => `image_proj.${key}`)];
  const plainNames = all(['norm.weight', 'proj.weight']);
  const plusNames = all([
    'latents',
    'proj_in.weight',
    'proj_out.weight',
    'layers.0.0.to_q.weight',
    'layers.0.1.1.weight',
  ]);
  for (const [shape, names] of [
    [[80], plainNames],
    [[0, 80], plainNames],
    [[64, 64], plusNames],
    [[80, 80, 80], plusNames],
  ] as const)
    t.throws(() => parseIPAdapter(shaped([...shape], ...names)), {
      message: /x: the shapes of its tensors make no IP-Ad/,
    });
  t.doesNotThrow(() => parseIPAdapter(shaped([64, 64, 64], ...plusNames)));

  const pipeline = pipelineOf(['plain'], device);
  const request = requestOf(callOf('plain'));
  for (const [more, says] of [
    [{ ip_adapter_image: undefined }, /ip_adapter_image has 0 pictures for 1 IP-Adapters: give one to each/],
    [{ ip_adapter_image: [[]] }, /ip_adapter_image\[0\] is a list of no pictures: give one or more/],
    [{ ip_adapter_scale: [1, 2] }, /ip_adapter_scale has 2 scales for 1 IP-Adapters/],
  ] as const)
    await t.rejects(denoiseToEnd(pipeline, { ...request, ...more }), { name: 'UserError', message: says });
  await t.rejects(denoiseToEnd({ ...pipeline, ipAdapter: [] }, request), {
    message: /1 pictures for 0 IP-Ad/,
  });
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test("the published files' sizes", (t) => {
  const base = presets['sdxl-base'].unet;
  const widths = attentionWidths(unet(base));
  t.equal(widths.length, 70);
  const shared = { cross_attention_dim: 2048, widths };
  // ip-adapter_sdxl and ip-adapter-plus_sdxl_vit-h of h94/IP-Adapter: 703 and 848 MB in float16. ViT-H: 2.53 GB in float32.
  t.equal(parameterCount(ipAdapter({ ...shared, tokens: 4, inputs: 1280 })), 351_285_248);
  const resampler = { width: 1280, depth: 4, inner: 1280, feedForward: 5120 };
  t.equal(parameterCount(ipAdapter({ ...shared, tokens: 16, inputs: 1280, resampler })), 423_748_864);
  const h = { hidden_size: 1280, intermediate_size: 5120, num_hidden_layers: 32, num_attention_heads: 16 };
  const config = { ...h, image_size: 224, patch_size: 14, projection_dim: 1024, hidden_act: 'gelu' };
  t.equal(parameterCount(visionEncoder(parseVisionConfig(config))), 632_076_800);
  for (const [fields, says] of [
    [{ hidden_act: 'silu' }, /image encoder config\.json: hidden_act "silu" is not supported/],
    [{ num_channels: 1 }, /"num_channels" is 1, not 3/],
    [{ hidden_size: undefined }, /"hidden_size" is missing or not a number/],
  ] as const)
    t.throws(() => parseVisionConfig({ ...config, ...fields }), { message: says });
  t.end();
});
