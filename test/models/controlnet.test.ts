// ControlNets against diffusers (golden area controlnet): their own residuals, the UNet's output with them, and whole calls of
// the three pipelines; and what is refused.
import { mkdtempSync, renameSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { parameterCount, unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { preprocess, preprocessControl, preprocessMask } from '../../io/image.ts';
import { openComponent, openComponentFile, openModel } from '../../models/checkpoint/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../../models/control/controlnet.ts';
import { ofOneKind } from '../../models/control/controlnet_kinds.ts';
import { presets } from '../../models/formats/presets.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Request } from '../../models/request.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { toDevice } from '../../models/vae/latents.ts';
import { area, configOf, disc, numbers, picture, writeControlNet } from '../support/controlnet_golden.ts';
import { type Assert, type GoldenCase, goldenFolder, maxDifference } from '../support/golden.ts';
import { compare, devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-controlnet-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
for (const name of ['full', 'mid', 'small', 'bare']) writeControlNet(join(folder, name), name);
const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const controlSource = (name: string) => openComponent(join(folder, name));

const models = area.cases.filter(({ controlnet: name }) => name !== undefined);
const calls = area.cases.filter(({ pipeline }) => pipeline !== undefined);

/** The residuals and the UNet's output, at inputs that follow from the case's name. */
function checkModel(t: Assert, c: GoldenCase, device: Device): void {
  const name = c.controlnet as string;
  const [n, h, w] = c.size as number[];
  const net = controlnet(parseControlNetConfig(configOf(name), name));
  controlSource(name).load('controlnet', net, device, 'float32');
  const model = unet(parseUNetConfig(source.config('unet')));
  source.load('unet', model, device, 'float32');
  noGrad(() =>
    scope(() => {
      const made = (key: string, ...shape: number[]) =>
        tensor(numbers(`${name}.${key}`, shape), shape, { device });
      const shape = [n, 4, h, w];
      const sample = toDevice({ shape, data: numbers(`${name}.sample`, shape) }, device, 'float32');
      const times = tensor(c.timesteps as number[], [n], { device });
      const conditioning = {
        context: made('encoder_hidden_states', n, 77, 80),
        textEmbeds: made('text_embeds', n, 40),
        timeIds: tensor(Array(n).fill(c.time_ids).flat(), [n, 6], { device }),
      };
      const control = toDevice(preprocessControl(picture(1, 8 * w, 8 * h)), device, 'float32');
      const residuals = net({ sample, times, conditioning }, control);
      const down = residuals.slice(0, -1);
      down.forEach((x, i) => void compare(t, area, c, `down.${i}`, x));
      compare(t, area, c, 'mid', residuals[down.length]);
      t.ok(!c.expect[`down.${down.length}`], `${c.id}: ${down.length} residuals`);
      const y = model(sample, times, conditioning, {
        down_block_additional_residuals: down,
        mid_block_additional_residual: residuals[down.length],
      });
      compare(t, area, c, 'unet', y);
    }),
  );
  for (const each of [net, model]) unload(each);
}

for (const device of devices) {
  test(`residuals on ${device.name}`, (t) => {
    const before = device.memory.storages;
    for (const c of models) checkModel(t, c, device);
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

const pipelineOf = (names: readonly string[], device: Device) =>
  loadPipeline(source, { device, dtype: 'float32', controlnet: names.map(controlSource) });

interface Settings extends Omit<Partial<Request>, 'image' | 'mask' | 'scheduler'> {
  image?: [number, number, number];
  mask?: boolean;
  scheduler?: string;
}

function requestOf(c: GoldenCase): Request {
  const { image, mask, scheduler, ...settings } = c.settings as Settings;
  const text = (key: 'prompt' | 'negative_prompt') => [String(settings[key])];
  return {
    ...(settings as Request),
    ...{ prompt: text('prompt'), negative_prompt: text('negative_prompt') },
    control_image: (c.control_images as [number, number, number][]).map((of) =>
      preprocessControl(picture(...of), settings.width, settings.height),
    ),
    image: image && preprocess(picture(...image)),
    mask: mask ? preprocessMask(disc()) : undefined,
    scheduler: scheduler ? { name: scheduler } : undefined,
    generators: [new TorchGenerator(c.seed as number)],
  };
}

for (const device of devices) {
  const some = device.name === 'reference' ? ['no_guidance_mid'] : calls.map(({ id }) => id);
  test(`whole calls on ${device.name}`, { timeout: 300_000 }, async (t) => {
    const before = device.memory.storages;
    for (const c of nonEmpty(calls.filter(({ id }) => some.includes(id)))) {
      const pipeline = pipelineOf(c.controlnets as string[], device);
      const { latents } = await denoiseToEnd(pipeline, requestOf(c));
      compare(t, area, c, 'latents', latents.data);
      pipeline.release();
    }
    t.equal(device.memory.storages, before, 'live tensors');
  });
}

test('a ControlNet is not run in the steps that it has no part in', async (t) => {
  const device = openDevice('cpu'); // which records no steps, so that a run is a call
  const pipeline = pipelineOf(['full'], device);
  const c = calls.find(({ id }) => id === 'window') as GoldenCase;
  const [net] = pipeline.controlnet.map(ofOneKind);
  let runs = 0;
  const run = (...args: Parameters<typeof net>) => {
    runs++;
    return net(...args);
  };
  const counted = Object.assign(run, net);
  const drawn = async (more: Partial<Request>) => {
    runs = 0;
    const request = { ...requestOf(c), ...more };
    const { latents } = await denoiseToEnd({ ...pipeline, controlnet: [counted] }, request);
    return latents.data;
  };
  const windowed = await drawn({});
  t.equal(runs, 3, 'of eight steps those that lie wholly in 0.2 to 0.7');
  const whole = await drawn({ control_guidance_start: 0, control_guidance_end: 1 });
  t.equal(runs, 8);
  t.ok(maxDifference(windowed, whole) > 0.1);
  const other = await drawn({ control_image: [preprocessControl(picture(2, 64, 64))] });
  const byPicture = maxDifference(windowed, other);
  t.ok(byPicture > 0.01, `the picture matters: ${byPicture}`);
  const free = await drawn({ controlnet_conditioning_scale: 0 });
  const { latents } = await denoiseToEnd(
    { ...pipeline, controlnet: [] },
    { ...requestOf(c), control_image: undefined },
  );
  t.equal(maxDifference(free, latents.data), 0, 'with a scale of 0 nothing is left of it');
  pipeline.release();
});

test('a GPU records a step for each set of ControlNets that are on, and lets it go when the next comes', async (t) => {
  const counts = { recorded: 0, replayed: 0, held: 0, most: 0 };
  const api = standInApi(anyHopper);
  const device = cudaDevice({
    ...api,
    cuStreamBeginCapture(...args) {
      counts.recorded++;
      counts.most = Math.max(counts.most, ++counts.held);
      return api.cuStreamBeginCapture(...args);
    },
    cuGraphLaunch(...args) {
      counts.replayed++;
      return api.cuGraphLaunch(...args);
    },
    cuGraphExecDestroy(...args) {
      counts.held--;
      return api.cuGraphExecDestroy(...args);
    },
  });
  const pipeline = pipelineOf(['small', 'bare'], device);
  const image = preprocessControl(picture(1, 64, 64));
  await denoiseToEnd(pipeline, {
    ...requestOf(calls[0]),
    ...{ control_image: [image, image], num_inference_steps: 16 },
    ...{ control_guidance_start: [0.25, 0.5], control_guidance_end: [0.75, 1] },
  });
  // Four steps each of none, the first, both and the second, of which the second is recorded and two replay it.
  t.same(counts, { recorded: 4, replayed: 8, held: 0, most: 1 });
  pipeline.release();
  t.equal(device.memory.live, 0);
});

test("the published ControlNets' configs, and what is refused", (t) => {
  const base = presets['sdxl-base'].unet;
  const of = (name: string): Record<string, unknown> => {
    const { block_out_channels, attention_head_dim, cross_attention_dim } = base;
    const { addition_time_embed_dim, projection_class_embeddings_input_dim } = base;
    return {
      ...configOf(name),
      ...{ block_out_channels, attention_head_dim, cross_attention_dim, addition_time_embed_dim },
      ...{ projection_class_embeddings_input_dim, norm_num_groups: 32 },
      conditioning_embedding_out_channels: [16, 32, 96, 256],
    };
  };
  const full = { ...of('full'), transformer_layers_per_block: [1, 2, 10] };
  for (const [json, parameters] of [
    [full, 1_251_014_160],
    [of('mid'), 270_942_480],
    [of('small'), 160_111_120],
    [of('bare'), 125_690_640],
  ] as const)
    t.equal(parameterCount(controlnet(parseControlNetConfig(json, 'x'))), parameters);

  for (const [fields, says] of [
    [
      { global_pool_conditions: true },
      /f\.json: "global_pool_conditions" is true, not false; is this a ControlNet/,
    ],
    [{ controlnet_conditioning_channel_order: 'bgr' }, /"controlnet_conditioning_channel_order" is "bgr"/],
    [{ mid_block_type: 'UNetMidBlock2DSimpleCrossAttn' }, /not UNetMidBlock2DCrossAttn or UNetMidBlock2D;/],
    [
      { conditioning_embedding_out_channels: [] },
      /"conditioning_embedding_out_channels" is \[\], not a list of/,
    ],
    [{ addition_embed_type: null }, /"addition_embed_type" is null/],
    [{ cross_attention_dim: undefined }, /"cross_attention_dim" is undefined, not a whole number/],
  ] as const)
    t.throws(() => parseControlNetConfig({ ...full, ...fields }, 'f.json'), { message: says });
  t.end();
});

test('weights and requests that do not fit', async (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const open = (control: ReturnType<typeof openComponent>) => () =>
    loadPipeline(source, { device, dtype: 'float32', controlnet: [control] });
  const skip = 'controlnet_down_blocks.4.weight';
  writeControlNet(join(folder, 'torn'), 'small', skip);
  t.throws(open(controlSource('torn')), {
    name: 'UserError',
    message: new RegExp(`torn does not fit its config: missing ${skip}`),
  });
  const other = (more: object) => {
    const own = controlSource('full');
    return { ...own, config: () => ({ ...own.config('controlnet'), ...more }) };
  };
  t.throws(open(other({ mid_block_type: 'UNetMidBlock2D' })), {
    message: /unexpected mid_block\.attentions\.0\.norm\.bias/,
  });
  t.throws(open(other({ block_out_channels: [16, 24, 48] })), {
    message: /full has "block_out_channels" \[16,24,48\] and the UNet \[16,24,32\]: take one that was made/,
  });
  t.throws(open(other({ conditioning_embedding_out_channels: [4, 8, 12] })), {
    message: /takes 4 pixels to a latent and the VAE 8/,
  });

  const single = join(folder, 'full', 'diffusion_pytorch_model.safetensors');
  t.doesNotThrow(() => open(openComponentFile(single))().release(), 'one file, its config beside it');
  renameSync(join(folder, 'torn', 'config.json'), join(folder, 'torn', 'other.json'));
  t.throws(() => openComponentFile(join(folder, 'torn', 'diffusion_pytorch_model.safetensors')), {
    message: /holds weights only: put the config\.json that belongs to it into/,
  });

  const pipeline = pipelineOf(['small', 'mid'], device);
  const image = preprocessControl(picture(1, 64, 64));
  const request = { ...requestOf(calls[0]), control_image: [image, image] };
  for (const [more, says] of [
    [{ control_image: [image] }, /control_image has 1 pictures for 2 ControlNets/],
    [
      { control_image: [image, preprocessControl(picture(1, 72, 64))] },
      /is \[1,3,64,72\], not \[1,3,64,64\]/,
    ],
    [{ controlnet_conditioning_scale: [1] }, /controlnet_conditioning_scale has 1 numbers for 2/],
    [
      { control_guidance_start: 0.5, control_guidance_end: [1, 0.5] },
      /start is 0\.5 and control_guidance_end 0\.5/,
    ],
    [{ control_guidance_end: 1.5 }, /control_guidance_end 1\.5: give parts of the way/],
    [{ control_guidance_start: Number.NaN }, /control_guidance_start is NaN/],
  ] as const)
    await t.rejects(denoiseToEnd(pipeline, { ...request, ...more }), { name: 'UserError', message: says });
  await t.rejects(denoiseToEnd({ ...pipeline, controlnet: [] }, request), {
    message: /2 pictures for 0 Control/,
  });
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});
