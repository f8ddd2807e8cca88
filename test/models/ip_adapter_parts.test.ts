// IP-Adapters in parts: scales by block and masks, whose latents ip_adapter.test.ts holds to diffusers'. What diffusers says that scales come
// to, that layers of scale 0 are not run, what white and black masks are, also in 8 bits and under DeepCache, and what is refused.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { preprocessMask } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { presets } from '../../models/formats/presets.ts';
import { openIPAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import { layerScales, type Scale, type ScalesByBlock } from '../../models/ip_adapter/ip_adapter_scale.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { type Asked, complete } from '../../models/request.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenFolder, maxDifference } from '../support/golden.ts';
import { writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import { devices } from '../support/models_golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-ip-adapter-parts-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const encoder = writeEncoder(join(folder, 'image_encoder'));
const [plain, plus] = ['plain', 'plus'].map((name) =>
  openIPAdapter(writeIPAdapter(join(folder, `${name}.safetensors`), name), encoder),
);
const [device] = devices;
const pipelineOf = (ipAdapter = [plain], q8 = false) =>
  loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32', ipAdapter, q8 });
type Pipeline = ReturnType<typeof pipelineOf>;
const asked: Asked = {
  ...{ prompt: 'a red fox in the snow', width: 72, height: 64, num_inference_steps: 2 },
  ip_adapter_image: [picture(1, 117, 149)],
};
const drawn = async (pipeline: Pipeline, more: object): Promise<Float32Array> =>
  (await denoiseToEnd(pipeline, { ...asked, ...more, generators: [new TorchGenerator(1)] })).latents.data;

const grey = (level: number): Picture => ({
  ...{ width: 9, height: 8, channels: 3, data: new Uint8Array(9 * 8 * 3).fill(level) },
});
const [white, black] = [255, 0].map((level) => preprocessMask(grey(level), 72, 64));

test("scales come to what diffusers' _maybe_expand_lora_scales says", (t) => {
  const config = presets['sdxl-base'].unet;
  const come = (given: Scale | ScalesByBlock, masks?: number) =>
    Object.fromEntries(layerScales(config, given, { name: 'scale', masks }));
  const down = (...values: Scale[]) =>
    values.map((value, i) => [`down_blocks.${1 + Math.floor(i / 2)}.attentions.${i % 2}`, value]);
  const up = (...values: Scale[]) =>
    values.map((value, i) => [`up_blocks.${Math.floor(i / 3)}.attentions.${i % 3}`, value]);
  const want = (downs: Scale[], mid: Scale, ups: Scale[]) =>
    Object.fromEntries([...down(...downs), ['mid_block.attentions.0', mid], ...up(...ups)]);
  // The example of its docstring.
  t.same(
    come({ down: 2, mid: 3, up: { block_0: 4, block_1: [5, 6, 7] } }),
    want([2, 2, 2, 2], 3, [4, 4, 4, 5, 6, 7]),
  );
  t.same(come({ up: [0, 1, 2], mid: [0.5] }), { ...want([], 0.5, [0, 1, 2, 0, 1, 2]) });
  t.same(come({ down: { block_2: [0, 1] } }), Object.fromEntries(down(0, 0, 0, 1)));
  t.same(come({ mid: [[1, 2]] }, 2), Object.fromEntries([['mid_block.attentions.0', [1, 2]]]));
  t.same(come(0.3), want([0.3, 0.3, 0.3, 0.3], 0.3, Array(6).fill(0.3)));
  t.end();
});

test('what counts nothing is not run', async (t) => {
  const pipeline = pipelineOf([plain, plus]);
  const counts: number[][] = [];
  const net = pipeline.unet;
  const unet = Object.assign((...args: Parameters<typeof net>) => {
    counts.push(((args[2] as Conditioning).images ?? []).map((image) => image.size));
    return net(...args);
  }, net);
  const styles = { up: { block_0: [0, 1, 0] } };
  const ip_adapter_image = [picture(1, 117, 149), [picture(3, 56, 56), picture(4, 31, 40)]];
  for (const [more, want] of [
    // Two blocks in each transformer of the level.
    [{ ip_adapter_scale: [styles, { mid: 1 }] }, [2, 2]],
    [{ ip_adapter_scale: styles }, [2, 2]],
    [{ ip_adapter_scale: [1, { up: 0 }] }, [17]],
    [{ ip_adapter_scale: [styles, [0, 1]], ip_adapter_masks: [null, [white, white]] }, [2, 17]],
  ] as const) {
    counts.length = 0;
    await drawn({ ...pipeline, unet }, { ip_adapter_image, ...more, num_inference_steps: 1 });
    t.same(
      counts[0].filter((count) => count > 0),
      want,
      JSON.stringify(more.ip_adapter_scale),
    );
  }
  pipeline.release();
});

test('white masks and black ones', async (t) => {
  const before = device.memory.storages;
  for (const [q8, more] of [
    [false, {}],
    [true, { cache_interval: 2, num_inference_steps: 3 }],
  ] as const) {
    const pipeline = pipelineOf([plain], q8);
    const [whole, none] = [
      await drawn(pipeline, more),
      await drawn(pipeline, { ...more, ip_adapter_scale: 0 }),
    ];
    const masked = (mask: object) => drawn(pipeline, { ...more, ip_adapter_masks: [mask] });
    t.ok(maxDifference(await masked(white), whole) < 1e-5, 'a white one is none');
    t.equal(maxDifference(await masked(black), none), 0, 'a black one is no picture');
    t.ok(maxDifference(whole, none) > 0.05);
    const two = { ip_adapter_image: [[picture(1, 117, 149), picture(4, 31, 40)]] };
    const one = await drawn(pipeline, { ...more, ...two, ip_adapter_masks: [[white, black]] });
    t.ok(maxDifference(one, whole) < 1e-5, 'each picture has its own');
    pipeline.release();
  }
  t.equal(device.memory.storages, before, 'live tensors');
});

test('what is refused', async (t) => {
  const before = device.memory.storages;
  const pipeline = pipelineOf();
  const two = { ip_adapter_image: [[picture(1, 117, 149), picture(4, 31, 40)]] };
  for (const [more, message] of [
    [
      { ip_adapter_scale: { up: { block_2: 1 } } },
      /ip_adapter_scale\[0\] .* names up\.block_2, and this UNet attends to the prompt in down, down\.block_1, down\.block_2, mid, up, up\.block_0, up\.block_1; did you mean/,
    ],
    [{ ip_adapter_scale: { middle: 1 } }, /names middle, and this UNet attends/],
    [{ ip_adapter_scale: { mid: { block_0: 1 } } }, /names mid\.block_0, and this UNet/],
    [
      { ip_adapter_scale: { up: { block_0: [0, 1] } } },
      /of up\.block_0 has 2 scales for 3 transformers: give one, or one to each/,
    ],
    [{ ip_adapter_scale: { mid: [0, 1] } }, /of mid has 2 scales for 1 transformer: give one$/],
    [{ ip_adapter_scale: { up: { block_0: [0, '1', 0] } } }, /of up\.block_0 is "1": give a number/],
    [{ ip_adapter_scale: { up: null } }, /of up\.block_0 is null: give a number/],
    [{ ip_adapter_scale: { down: [] } }, /of down\.block_1 has 0 scales for 2 transformers/],
    [
      { ...two, ip_adapter_scale: [[0.5, 1]] },
      /has a number for each picture, which masks alone keep apart: give ip_adapter_masks \(--ip-adapter-mask\), or one/,
    ],
    [
      { ...two, ip_adapter_scale: [[0.5, 1, 2]], ip_adapter_masks: [[white, black]] },
      /has 3 numbers for 2 pictures: give one, or one to each/,
    ],
    [
      { ...two, ip_adapter_masks: [white] },
      /ip_adapter_masks\[0\] has 1 masks for 2 pictures: give one to each/,
    ],
    [
      { ip_adapter_masks: [white, white] },
      /ip_adapter_masks has 2 entries for 1 IP-Adapters: give one to each, perhaps a list/,
    ],
    [
      { ip_adapter_masks: [{ ...white, shape: [1, 72, 64] }] },
      /ip_adapter_masks\[0\] is 4608 numbers of shape \[1,72,64\], no mask of \[1, 1, h, w\]: take what preprocessMask/,
    ],
    [{ ip_adapter_masks: [{ ...white, shape: [1, 1, 7, 7] }] }, /of shape \[1,1,7,7\], no mask/],
  ] as const)
    await t.rejects(drawn(pipeline, more), { name: 'UserError', message });
  await t.rejects(
    drawn({ ...pipeline, ipAdapter: [] }, { ip_adapter_image: undefined, ip_adapter_masks: [white] }),
    {
      message: /ip_adapter_masks has 1 entries for 0 IP-Adapters/,
    },
  );
  const sizes = { ratio: 8, sampleSize: 8 };
  for (const [more, message] of [
    [
      { ip_adapter_scale: '1' },
      /^ip_adapter_scale is "1": give a number, or numbers by block such as { up: { block_0: \[0, 1, 0\] } }, or a list/,
    ],
    [{ ip_adapter_scale: [['1']] }, /^ip_adapter_scale is \[\["1"\]\]: give a number/],
    [
      { ip_adapter_masks: white },
      /^ip_adapter_masks is .*: give a list of { data, shape } as preprocessMask gives it/,
    ],
    [{ ip_adapter_masks: [grey(255)] }, /^ip_adapter_masks is .*: give a list/],
  ] as const)
    t.throws(() => complete(sizes, { ...asked, ...more } as unknown as Asked), {
      name: 'UserError',
      message,
    });
  // A distilled UNet without a middle block counts it for nothing.
  const config = { ...pipeline.unetConfig, mid_block_type: null };
  t.notOk(layerScales(config, { up: 1 }, { name: 'scale' }).has('mid_block.attentions.0'));
  t.throws(() => layerScales(config, { mid: 1 }, { name: 'scale' }), {
    message: /scale names mid, and this UNet/,
  });
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});
