// What SDXL takes of a GPU's memory, by the allocator's own plan: the cuda device with all its plans and workspaces, on a GPU
// that counts memory alone and has no more than the card in question. On real ones the driver keeps some for itself.
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openFor } from '../../cli/sample/models.ts';
import type { SampleOptions } from '../../cli/sample/options.ts';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { namedParameters } from '../../engine/module.ts';
import { attention } from '../../engine/ops/attention.ts';
import { groupNorm } from '../../engine/ops/norm.ts';
import { standInCuda, standInDevice } from '../../engine/profile.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { empty } from '../../engine/tensor.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { presets } from '../../models/formats/presets.ts';
import { randomModel } from '../../models/formats/random_weights.ts';
import { type IPAdapterSource, ipAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import { decode, denoise, denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { complete, type Request } from '../../models/request.ts';
import { crossAttentions, unet } from '../../models/unet/unet.ts';
import type { Latents } from '../../models/vae/latents.ts';
import { DRIVERS_SHARE } from '../../train/fit.ts';
import { estimate } from '../../train/rehearsal.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { goldenFolder } from '../support/golden.ts';

const GIB = 2 ** 30;
/** By compute capability: what Ada and Hopper plan differs, and so may the workspaces. */
const cards = [
  { capability: [8, 9], multiprocessors: 24 },
  { capability: [9, 0], multiprocessors: 132 },
] as const;

// The golden tokenizers' ids lie within the real vocabulary.
const source = randomModel(presets['sdxl-base'], { seed: 0, tokenizers: join(goldenFolder, 'tiny-sdxl') });

/** A model with SSD-1B's UNet, which lacks the middle block's attention and blocks of the deepest level. */
const ssd1b = randomModel(
  {
    ...presets['sdxl-base'],
    unet: {
      ...presets['sdxl-base'].unet,
      transformer_layers_per_block: [0, 2, [4, 4]],
      reverse_transformer_layers_per_block: [[4, 4, 10], [2, 1, 1], 1],
      mid_block_type: 'UNetMidBlock2D',
    },
  },
  { seed: 0, tokenizers: join(goldenFolder, 'tiny-sdxl') },
);

/** A ControlNet as large as its UNet's half, such as controlnet-canny-sdxl-1.0. */
const controlnet: ModelSource = {
  ...source,
  config: () => source.config('unet'),
  load(_, net, device, dtype) {
    for (const p of namedParameters(net).values())
      p.tensor = unscoped(() => empty(p.memoryShape, { device, dtype }));
  },
};
/** A T2I-Adapter such as t2i-adapter-canny-sdxl-1.0. */
const adapter: ModelSource = {
  ...controlnet,
  config: () => ({ adapter_type: 'full_adapter_xl', downscale_factor: 16 }),
};
const folder = mkdtempSync(join(tmpdir(), 'sdxl-memory-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

/** An IP-Adapter as large as ip-adapter-plus_sdxl_vit-h, with ViT-H: a file of holes, as none of its numbers is read. */
function ipAdapterSource(): IPAdapterSource {
  const widths = crossAttentions(unet(presets['sdxl-base'].unet)).map(
    ({ children }) => children.to_q.children.weight.shape[0],
  );
  const resampler = { width: 1280, depth: 4, inner: 1280, feedForward: 5120 };
  const adapter = ipAdapter({ tokens: 16, cross_attention_dim: 2048, inputs: 1280, resampler, widths });
  let end = 0;
  const entries = [...namedParameters(adapter)].map(([name, { shape, size }]) => {
    const begin = end;
    end += 2 * size;
    return [name, { dtype: 'F16', shape, data_offsets: [begin, end] }];
  });
  const header = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
  const path = join(folder, 'ip-adapter.safetensors');
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  writeFileSync(path, Buffer.concat([length, header]));
  truncateSync(path, 8 + header.length + end);
  const config = {
    ...{ hidden_size: 1280, intermediate_size: 5120, num_hidden_layers: 32, num_attention_heads: 16 },
    ...{ hidden_act: 'gelu', image_size: 224, patch_size: 14, projection_dim: 1024 },
  };
  return { path, imageEncoder: { ...controlnet, config: () => config } };
}
const pictures: Picture[] = [{ width: 64, height: 64, channels: 3, data: new Uint8Array(3 * 64 * 64) }];
const [ip_adapter_image, adapter_image] = [pictures, pictures];

const control_image = [{ shape: [1, 3, 1024, 1024], data: new Float32Array(3 * 1024 * 1024) }];

/** Draws a picture of 1024x1024 with guidance in bfloat16; gives the most bytes of tensors. */
function draw(card: (typeof cards)[number], bytes: number, more: Partial<Request>, q8 = false): number {
  const device = standInCuda({ ...card, bytes: bytes - DRIVERS_SHARE });
  const nets = more.control_image ? [controlnet] : [];
  const ipAdapter = more.ip_adapter_image ? [ipAdapterSource()] : [];
  const pipeline = loadPipeline(source, {
    ...{ device, dtype: 'bfloat16', controlnet: nets, ipAdapter, q8 },
    adapter: more.adapter_image ? [adapter] : [],
  });
  const loop = denoise(pipeline, {
    prompt: ['a red fox in the snow'],
    ...{ height: 1024, width: 1024, num_inference_steps: 5, guidance_scale: 5, ...more },
    generators: [new TorchGenerator(1)],
  });
  let turn = loop.next();
  while (!turn.done) turn = loop.next();
  decode(pipeline, turn.value.latents, more);
  pipeline.release();
  return device.memory.peak;
}

test('a picture of 1024x1024 in bfloat16', (t) => {
  for (const card of cards) {
    const on = `sm_${card.capability.join('')}`;
    const serves = `${on}: all kept for the next picture, as by a server`;
    t.doesNotThrow(() => draw(card, 10 * GIB, {}), `${serves}, within 10 GiB`);
    t.doesNotThrow(() => draw(card, 8 * GIB, {}, true), `${serves}, in 8-bit integers within 8 GiB`);
    t.doesNotThrow(() => draw(card, 8 * GIB, { last: true }), `${on}: within 8 GiB`);
    t.doesNotThrow(
      () => draw(card, 10 * GIB, { last: true, control_image }),
      `${on}: under control within 10 GiB`,
    );
    t.doesNotThrow(
      () => draw(card, 8 * GIB, { last: true, adapter_image }),
      `${on}: under a T2I-Adapter within 8 GiB`,
    );
    t.doesNotThrow(
      () => draw(card, 10 * GIB, { last: true, ip_adapter_image }),
      `${on}: by a picture within 10 GiB`,
    );
    t.doesNotThrow(() => draw(card, 6 * GIB, { last: true }, true), `${on}: in 8-bit integers within 6 GiB`);
    t.doesNotThrow(
      () => draw(card, 8 * GIB, { last: true, control_image }, true),
      `${on}: in 8-bit integers under control within 8 GiB`,
    );
    t.throws(() => draw(card, 9 * GIB, { last: true, ip_adapter_image }), {
      message: /image_encoder 1\.\d\d GiB/,
    });
    t.throws(() => draw(card, 9 * GIB, { last: true, control_image }), { message: /controlnet 2\.\d\d GiB/ });
    t.throws(() => draw(card, 6 * GIB, {}), {
      name: 'MemoryError',
      message: /^out of memory: .* wanted while these hold it: unet \d\.\d\d GiB, text_encoder_2 \d/,
    });
  }
  t.end();
});

test('several pictures of sdxl sample, whose text encoders are gone before the UNet comes', async (t) => {
  for (const card of cards)
    for (const [bytes, q8] of [
      [8 * GIB, false],
      [5 * GIB, true],
    ] as const) {
      const device = standInCuda({ ...card, bytes: bytes - DRIVERS_SHARE });
      const options = { vaeDtype: 'auto', q8 } as SampleOptions;
      const timed = async <R>(_: string, fn: () => R) => fn();
      const place = { options, device, dtype: 'bfloat16', tell() {}, timed } as const;
      const asked = ['a red fox', 'a hare'].map((prompt, i) => ({
        ...complete({ ratio: 8, sampleSize: 1024 }, { prompt, num_inference_steps: 5 }),
        last: i === 1,
      }));
      const pipeline = await openFor(source, [{ options, requests: asked }], place);
      const drawn: Latents[] = [];
      for (const request of asked) drawn.push((await denoiseToEnd(pipeline, request)).latents);
      for (const latents of drawn) decode(pipeline, latents);
      pipeline.release();
      t.pass(
        `sm_${card.capability.join('')}: within ${bytes / GIB} GiB, ${(device.memory.peak / GIB).toFixed(2)}`,
      );
    }
});

/** What `sdxl plan` foretells of a run whose largest picture is of 1024x1024, within the cards' memory: bytes of each. */
function trainOn(
  gpus: number,
  card: (typeof cards)[number],
  bytes: number,
  input: RunInput,
): readonly number[] {
  const dataset = { path: 'pictures', resolution: 1024 };
  const run = resolveRun(
    { model: 'sdxl', output: 'out', dtype: 'bfloat16', dataset, ...input },
    'plan',
    'plan',
  );
  const read = () => Promise.reject(new Error('a plan reads no pixels'));
  const sample = { id: '0', key: 0, hash: '', captions: ['a red <fox>'], size: [1024, 1024] as const, read };
  const buckets = [512, 1024, 768].map((side) => [side, side] as const);
  const pictures = {
    samples: [sample, sample, sample],
    buckets,
    bucketOf: [0, 1, 2],
    hash: '',
    captionsHash: '',
    validationImages: [],
  };
  const ipAdapter =
    run.train.target === 'ip_adapter' ? { imageEncoder: ipAdapterSource().imageEncoder } : undefined;
  const distils = run.train.method === 'distillation';
  const own = distils
    ? { source: ssd1b, vaeSource: source, teacherSource: source }
    : { source, vaeSource: source };
  const materials = { run, ...own, ipAdapter, pictures, updatesPerEpoch: 1, total: 1 };
  const device = () => standInCuda({ ...card, bytes: bytes - DRIVERS_SHARE });
  return estimate(materials, Array.from({ length: gpus }, device)).bytes;
}

test('training at 1024x1024 in bfloat16, with gradient checkpointing', (t) => {
  const gradient_checkpointing = true;
  const train = (...args: [(typeof cards)[number], number, RunInput]) => trainOn(1, ...args)[0];
  const gib = (bytes: number) => `${(bytes / GIB).toFixed(1)} GiB`;
  for (const card of cards) {
    const on = `sm_${card.capability.join('')}`;
    const full = train(card, 80e9, { train: { gradient_checkpointing } });
    t.ok(full > 30 * GIB && full < 80e9, `${on}: all weights, AdamW with float32 masters, ${gib(full)}`);
    const rounding = { optimizer: { name: 'adafactor', stochastic_rounding: true } } as const;
    const least = train(card, 16e9, { train: { gradient_checkpointing }, ...rounding });
    t.ok(least < 16e9, `${on}: all weights, Adafactor that rounds at random, ${gib(least)}`);
    const fused = { gradient_checkpointing, fused_backward_pass: true };
    const leanest = train(card, 8 * GIB, { train: fused, ...rounding });
    t.ok(least - leanest > 4 * GIB, `${on}: whose gradients are never all there, ${gib(leanest)}`);
    const halves = { stochastic_rounding: true, moments_dtype: 'bfloat16' } as const;
    const adamw = train(card, 24 * GIB, { train: { gradient_checkpointing }, optimizer: halves });
    t.ok(adamw < full / 1.9, `${on}: all weights, AdamW all in bfloat16, ${gib(adamw)}`);
    const lora = train(card, 8e9, { train: { target: 'lora', gradient_checkpointing } });
    t.ok(lora > 5 * GIB && lora < 8e9, `${on}: LoRA, ${gib(lora)}`);
    for (const more of [
      { algo: 'loha' },
      { algo: 'lokr' },
      { algo: 'oft' },
      { use_dora: true },
      { network_dropout: 0.1 },
    ] as const) {
      const other = train(card, 8e9, { train: { target: 'lora', gradient_checkpointing }, lora: more });
      t.ok(Math.abs(other - lora) < 0.3 * GIB, `${on}: LoRA of ${JSON.stringify(more)}, ${gib(other)}`);
    }
    const least8 = train(card, 6e9, { train: { target: 'lora', gradient_checkpointing, q8: true } });
    t.ok(lora - least8 > 1.5 * GIB, `${on}: LoRA beside 8-bit integers, ${gib(least8)}`);
    const drawing = (width: number, height: number) =>
      train(card, 10e9, {
        train: { target: 'lora', gradient_checkpointing },
        previews: { prompts: ['a red fox', { prompt: 'a red fox', width, height }] },
      });
    const seen = drawing(1024, 1024);
    t.ok(seen > lora && seen < 10e9, `${on}: with previews, whose decoding takes more, ${gib(seen)}`);
    t.ok(drawing(1536, 1536) < 10e9, `${on}: of 1536x1536 too`);
    t.throws(() => drawing(2048, 2048), { message: /^out of memory/ });
    const told = train(card, 10e9, {
      train: { target: 'lora', gradient_checkpointing, text_encoders: true },
    });
    t.ok(told > lora + GIB, `${on}: LoRA of the text encoders too, ${gib(told)}`);
    const token = (bytes: number, q8: boolean) =>
      train(card, bytes, {
        train: { target: 'textual_inversion', gradient_checkpointing, q8 },
        textual_inversion: { placeholder_token: '<fox>', initializer_token: 'fox' },
      });
    const [vectors, vectors8] = [token(10e9, false), token(8e9, true)];
    t.ok(
      vectors > vectors8 && vectors < told,
      `${on}: a textual inversion, ${gib(vectors)}, ${gib(vectors8)}`,
    );
    const control = train(card, 32e9, { train: { target: 'controlnet', gradient_checkpointing } });
    t.ok(control > 24 * GIB && control < 32e9, `${on}: a ControlNet with AdamW, ${gib(control)}`);
    const frugal = train(card, 16e9, {
      train: { target: 'controlnet', gradient_checkpointing },
      ...rounding,
    });
    t.ok(frugal < 16e9, `${on}: a ControlNet with Adafactor that rounds at random, ${gib(frugal)}`);
    const lite = train(card, 8e9, {
      ...{ train: { target: 'controlnet', gradient_checkpointing }, controlnet: { network_dim: 64 } },
    });
    t.ok(lite > lora && lite < 8e9, `${on}: a ControlNet-LLLite with AdamW, ${gib(lite)}`);
    const adapter = train(card, 12e9, { train: { target: 't2i_adapter', gradient_checkpointing } });
    t.ok(adapter < 12e9, `${on}: a T2I-Adapter with AdamW, ${gib(adapter)}`);
    const byPictures = train(card, 12e9, {
      train: { target: 'ip_adapter', gradient_checkpointing },
      ...{ ip_adapter: { image_encoder_path: 'ViT-H' }, ...rounding },
    });
    t.ok(byPictures < 12e9, `${on}: an IP-Adapter with Adafactor that rounds at random, ${gib(byPictures)}`);
    t.throws(() => train(card, 24e9, { train: { gradient_checkpointing } }), {
      message: /optimizer \d+\.\d\d GiB/,
    });
  }
  t.end();
});

test('distillation of SSD-1B at 1024x1024, with a whole teacher on each GPU', (t) => {
  const train = { method: 'distillation', gradient_checkpointing: true } as const;
  const on = (gpus: number, bytes: number, more: RunInput) =>
    trainOn(gpus, cards[1], bytes, { train, distillation: { pretrained_teacher_model: 'sdxl' }, ...more });
  const gib = (bytes: readonly number[]) => bytes.map((each) => (each / GIB).toFixed(2)).join(', ');
  const adafactor = { name: 'adafactor' } as const;
  const [one] = on(1, 18e9 + DRIVERS_SHARE, { optimizer: adafactor });
  const least = on(1, 11e9, {
    train: { ...train, fused_backward_pass: true },
    optimizer: { ...adafactor, stochastic_rounding: true },
  });
  t.ok(
    one - least[0] > 7 * GIB,
    `Adafactor with float32 masters, ${gib([one])}, and all lean, ${gib(least)}`,
  );
  const two = on(2, 18e9, { optimizer: adafactor });
  // The teacher's 4.78 GiB, as much of the student's weights and gradients, and half of its masters.
  t.ok(Math.min(...two) > 12 * GIB && Math.max(...two) < one - 2 * GIB, `on two: ${gib(two)}`);
  t.end();
});

test('GPUs share what the optimizer keeps; the first alone has a VAE, for previews', (t) => {
  const on = (gpus: number, target: 'unet' | 'lora', bytes = 80e9, prompts: string[] = []) =>
    trainOn(gpus, cards[1], bytes, {
      train: { target, gradient_checkpointing: true },
      previews: { prompts },
    });
  const gib = (bytes: readonly number[]) => bytes.map((each) => (each / GIB).toFixed(2)).join(', ');
  const lora = on(3, 'lora');
  t.ok(
    lora[0] <= on(1, 'lora')[0] && Math.abs(lora[0] - lora[1]) < 0.1 * GIB,
    `LoRA on three: ${gib(lora)} GiB`,
  );
  const seen = on(3, 'lora', 80e9, ['a red fox']);
  t.ok(seen[0] > lora[0] + 0.14 * GIB && seen[1] === lora[1], `with previews: ${gib(seen)} GiB`);
  // The UNet's 4.78 GiB and less than a GiB at work.
  t.ok(lora[1] > 4.82 * GIB && lora[1] < 5.82 * GIB);
  const [[alone], two, four] = [1, 2, 4].map((gpus) => on(gpus, 'unet'));
  // Masters and two moments take 12 bytes for each of 2.57e9 weights, of which one GPU of two keeps half.
  const kept = 12 * 2_567_463_684;
  t.ok(
    Math.abs(alone - two[0] - kept / 2) < 0.03 * kept,
    `all weights: ${gib([alone])}, on two ${gib(two)} GiB`,
  );
  // The UNet's 4.78 GiB, as much again of gradients, its share, 256 MiB that arrive, and less than a GiB at work.
  const most = 2 * 4.78 * GIB + kept / 4 + 1.25 * GIB;
  t.ok(Math.max(...four.slice(1)) < most, `on four ${gib(four)} GiB`);
  t.doesNotThrow(() => on(4, 'unet', 20e9), 'four GPUs of 20 GB train all weights');
  t.end();
});

// So what the plans above launch at their real sizes is within every limit.
test('what a driver would not launch is refused', (t) => {
  const on = (capability: readonly [number, number], batch: number, channels: number) => () =>
    scope(() => {
      const device = standInCuda({ capability, multiprocessors: 24, bytes: 16 * GIB });
      const x = empty([batch, 1, 1, channels], { device });
      const affine = empty([channels], { device });
      groupNorm(x, affine, affine, { groups: 1, eps: 1e-5 });
    });
  t.doesNotThrow(on([8, 9], 65_535, 64));
  t.throws(on([8, 9], 65_536, 64), { message: /INVALID_VALUE.*a grid \[1,65536,1\]/ });
  t.doesNotThrow(on([8, 9], 1, 12_000));
  t.throws(on([8, 9], 1, 16_000), { message: /128000 bytes of shared memory/ });
  t.doesNotThrow(on([8, 0], 1, 16_000));
  const api = standInApi(anyHopper);
  const clusters = (blocks: number) => () =>
    api.cuLaunchKernel(1n, [blocks, 1, 1], [32, 1, 1], 0, 1n, new Uint8Array(), [], { cluster: 2 });
  t.doesNotThrow(clusters(4));
  t.throws(clusters(5), { message: /a grid \[5,1,1\] of 32 threads .*in clusters of 2/ });
  t.end();
});

test("a GPU's workspaces are counted: the VAE's attention goes by pieces of 256 MiB of scores", (t) => {
  const peak = (device: ReturnType<typeof standInDevice>) => {
    scope(() => {
      const x = empty([1, 16_384, 512], { device });
      attention(x, x, x, { heads: 1 });
    });
    return device.memory.peak;
  };
  const [cpu, cuda] = [standInDevice(), standInCuda()].map(peak);
  const workspace = (cuda - cpu) / 2 ** 20;
  // Beside them, the split sums of a product.
  t.ok(workspace >= 256 && workspace <= 1.5 * 256, `${workspace} MiB`);
  t.end();
});
