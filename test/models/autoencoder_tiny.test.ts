// The tiny autoencoder against diffusers' AutoencoderTiny (golden/autoencoder_tiny.jsonl): encoded, decoded, in tiles, as the VAE of
// three pipelines; the files that it comes in; and where it is refused.
import { mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { parameterCount, unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { preprocess, preprocessMask } from '../../io/image.ts';
import { readJsonObject } from '../../io/json.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { type ModelSource, openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { openVaeFile } from '../../models/formats/singlefile.ts';
import { inspect } from '../../models/inspect.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Request } from '../../models/request.ts';
import { autoencoder } from '../../models/vae/autoencoder.ts';
import type { AutoencoderTiny } from '../../models/vae/autoencoder_tiny.ts';
import { decodeLatents, toDevice, toHost } from '../../models/vae/latents.ts';
import { sdxl } from '../support/command_line.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { tinyWeights, wave, writeTiny } from '../support/tiny_autoencoder.ts';

/** Every `stride`-th number in torch's order, float32 in base64. */
interface Golden {
  what: string;
  stride: number;
  values: string;
  latents: string;
  pixels: string;
  /** How far diffusers' own result in these types is from float64's, relative, root mean square. */
  float32: number;
  bfloat16: number;
}

const cases = goldenLines<Golden>('autoencoder_tiny');
const golden = (what: string) => cases.find((each) => each.what === what) as Golden;

function unpacked(text: string): Float32Array {
  const bytes = Buffer.from(text, 'base64');
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

const every = (stride: number, values: Float32Array): Float32Array =>
  values.filter((_, i) => i % stride === 0);

const apart = (got: Float32Array, want: Float32Array): number => {
  const square = (values: Float32Array) => values.reduce((sum, x) => sum + x * x, 0);
  return got.length === want.length ? Math.sqrt(square(got.map((x, i) => x - want[i])) / square(want)) : 9;
};

const model = join(goldenFolder, 'tiny-sdxl');
const folderOf = (t: Test): string => t.testdir();

function load(source: ModelSource, device: Device, dtype: FloatDType): AutoencoderTiny {
  const coder = autoencoder(source.config('vae'));
  source.load('vae', coder.module, device, dtype);
  return coder as AutoencoderTiny;
}

/** What a loaded one makes of the golden input of that name. */
function results(coder: AutoencoderTiny, what: string, device: Device, dtype: FloatDType): Float32Array {
  const tiling = what.startsWith('tiled');
  const side = tiling ? 60 : 0;
  const given = (shape: readonly number[], step: number, scale: number) =>
    toDevice({ shape, data: wave(shape, step).map((x) => scale * x) }, device, dtype);
  return noGrad(() =>
    scope(() => {
      const y = what.endsWith('encode')
        ? coder.encode(given(side ? [1, 3, 8 * side, 8 * side] : [2, 3, 32, 24], 5, 1), { tiling }).latents
        : coder.decode(given(side ? [1, 4, side, side] : [1, 4, 6, 5], 3, 4), { tiling });
      return toHost(y).data;
    }),
  );
}

for (const device of devices)
  test(`encoded and decoded as diffusers does, on ${device.name}`, (t) => {
    const source = openComponent(writeTiny(folderOf(t)));
    const before = device.memory.storages;
    for (const dtype of ['float32', 'bfloat16'] as const) {
      const coder = load(source, device, dtype);
      for (const what of ['encode', 'decode']) {
        const { stride, values, ...far } = golden(what);
        const off = apart(every(stride, results(coder, what, device, dtype)), unpacked(values));
        const most = dtype === 'float32' ? 10 * far.float32 : 1.25 * far.bfloat16;
        t.ok(off <= most, `${what} in ${dtype}: off by ${off}, may be ${most}`);
      }
      unload(coder.module);
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

test('in tiles, joined as diffusers does', (t) => {
  const [device] = devices;
  const coder = load(openComponent(writeTiny(folderOf(t))), device, 'float32');
  for (const what of ['tiled_encode', 'tiled_decode']) {
    const { stride, values } = golden(what);
    const off = apart(every(stride, results(coder, what, device, 'float32')), unpacked(values));
    t.ok(off < 1e-5, `${what}: off by ${off}`); // whole, it is off by 0.008 and more
  }
  unload(coder.module);
  t.end();
});

const gradient: Picture = {
  ...{ width: 64, height: 64, channels: 3 },
  data: Uint8Array.from({ length: 64 * 64 * 3 }, (_, i) => {
    const [x, y, c] = [Math.floor(i / 3) % 64, Math.floor(i / 192), i % 3];
    return 5 * x + 3 * y + 50 * c;
  }),
};
const leftHalf: Mask = {
  ...{ width: 64, height: 64, channels: 1 },
  data: Uint8Array.from({ length: 64 * 64 }, (_, i) => (i % 64 < 32 ? 255 : 0)),
};

test('as the VAE of text to image, image to image and inpainting', async (t) => {
  const device = openDevice('auto');
  const vaeSource = openComponent(writeTiny(folderOf(t)));
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32', vaeSource });
  const image = preprocess(gradient);
  const mask = preprocessMask(leftHalf);
  const calls: Record<string, Partial<Request>> = {
    text_to_image: {},
    image_to_image: { image, strength: 0.6 },
    inpaint: { image, mask, strength: 0.8 },
  };
  for (const [what, more] of Object.entries(calls)) {
    const { latents } = await denoiseToEnd(pipeline, {
      ...{ prompt: ['a red fox'], width: 64, height: 64, num_inference_steps: 4, guidance_scale: 3 },
      generators: [new TorchGenerator(7)],
      ...more,
    });
    const want = golden(what);
    allClose(t, `${what}: latents`, latents.data, unpacked(want.latents), { atol: 1e-3, rtol: 1e-4 });
    const shown = decodeLatents(pipeline.vae, latents).data.map((x) => Math.min(1, Math.max(0, x / 2 + 0.5)));
    const pixels = every(want.stride, shown);
    allClose(t, `${what}: pixels`, pixels, unpacked(want.pixels), { atol: 1e-3, rtol: 0 });
  }
  pipeline.release();
  t.end();
});

test("taesdxl's sizes, and what its config may say", (t) => {
  const { module, config } = autoencoder({ _class_name: 'AutoencoderTiny' });
  t.equal(parameterCount(module), 2_445_063, "as diffusers' AutoencoderTiny()");
  t.match(config, { scaling_factor: 1, latent_channels: 4, force_upcast: false });
  for (const [change, message] of [
    [{ act_fn: 'gelu' }, /"act_fn" is "gelu", not "relu"; use another, such as madebyollin\/taesdxl/],
    [{ shift_factor: 0.1 }, /"shift_factor" is 0.1, not 0/],
    [{ scaling_factor: 0 }, /"scaling_factor" is 0, not a number above 0; use another/],
    [{ latent_channels: '4' }, /"latent_channels" is "4", not a whole number of at least 1/],
    [{ num_encoder_blocks: 3 }, /"num_encoder_blocks" is 3, not a list of whole numbers/],
    [{ num_decoder_blocks: [3, 3, 1] }, /its levels have 4, 3, 4, 4 entries/],
    [{ encoder_block_out_channels: [64, 64, 64, 32] }, /the widths 64, 64, 64, 32, 64/],
  ] as const)
    t.throws(() => autoencoder({ _class_name: 'AutoencoderTiny', ...change }), {
      name: 'UserError',
      message,
    });
  t.end();
});

/** The weights as TAESD's author publishes them, in two files. */
function writeHalves(folder: string): { encoder: string; decoder: string } {
  const paths = { encoder: '', decoder: '' };
  for (const [half, clamps] of [
    ['encoder', 0],
    ['decoder', 1],
  ] as const) {
    const entries = tinyWeights().flatMap((entry) => {
      const [, layer, rest] = new RegExp(`^${half}\\.layers\\.(\\d+)(.+)$`).exec(entry.name) ?? [];
      return layer === undefined ? [] : [{ ...entry, name: `${Number(layer) + clamps}${rest}` }];
    });
    paths[half] = join(folder, `taesdxl_${half}.safetensors`);
    writeSafetensors(paths[half], entries);
  }
  return paths;
}

test('in one file, and in two halves', (t) => {
  const folder = folderOf(t);
  const whole = join(writeTiny(folder), 'diffusion_pytorch_model.safetensors');
  const { encoder, decoder } = writeHalves(folder);
  const [device] = devices;
  const made = [openComponent(folder), ...[whole, encoder, decoder].map(openVaeFile)].map((source) => {
    const coder = load(source, device, 'float32');
    const numbers = [
      ...results(coder, 'encode', device, 'float32'),
      ...results(coder, 'decode', device, 'float32'),
    ];
    unload(coder.module);
    return numbers;
  });
  for (const numbers of made) t.equal(maxDifference(numbers, made[0]), 0, 'the same autoencoder');
  t.match(inspect(folder), { kind: 'diffusers component: AutoencoderTiny', problems: [] });
  t.match(inspect(whole), { kind: 'tiny autoencoder in one file', problems: [] });
  t.match(inspect(decoder), { kind: 'decoder of a tiny autoencoder', problems: [] });

  rmSync(encoder);
  const lonely =
    /taesdxl_decoder.safetensors holds only the decoder of a tiny autoencoder: put its encoder beside it/;
  t.throws(() => openVaeFile(decoder), { name: 'UserError', message: lonely });
  t.match(inspect(decoder).problems, [lonely]);
  const odd = join(folder, 'tiny.safetensors');
  writeFileSync(odd, readFileSync(decoder));
  t.throws(() => openVaeFile(odd), { message: /tiny.safetensors holds only the decoder/ });
  // Of other sizes than the published one, and no config beside it to say so.
  rmSync(join(folder, 'config.json'));
  t.match(inspect(whole).problems, [/misshapen decoder|misshapen encoder|missing/]);
  t.end();
});

test('sdxl sample draws by one, in tiles too, and tells what it cannot', async (t) => {
  const folder = folderOf(t);
  const tiny = writeTiny(join(folder, 'tiny'));
  const output = join(folder, 'out.png');
  const asked = ['sample', '--model', model, '--prompt', 'a fox', '--steps', '2', '--seed', '1', '--quiet'];
  const size = ['--width', '64', '--height', '64', '--output', output];
  t.match(await sdxl(...asked, ...size, '--vae', tiny), { status: 0, err: '' });
  const drawn = readFileSync(output);
  t.match(await sdxl(...asked, ...size), { status: 0 });
  t.notOk(drawn.equals(readFileSync(output)), "not the model's own VAE");
  t.match(await sdxl(...asked, ...size, '--vae', tiny, '--vae-tiling'), { status: 0 });
  const wide = writeTiny(join(folder, 'wide'), { latent_channels: 16 });
  t.match(await sdxl(...asked, ...size, '--vae', wide), {
    status: 2,
    err: /the UNet of .* takes latents of 4 channels and the VAE gives 16; use the VAE that the model was made for/,
  });
  const unet = join(model, 'unet');
  t.match(await sdxl(...asked, ...size, '--vae', unet), {
    err: /holds a UNet2DConditionModel, not SDXL's VAE \(AutoencoderKL or AutoencoderTiny\)/,
  });
  t.end();
});

test('a model that has one is exported as a folder, and not as one file', async (t) => {
  const folder = folderOf(t);
  const whole = join(folder, 'model');
  mkdirSync(whole);
  for (const name of readdirSync(model).filter((each) => !['vae', 'model_index.json'].includes(each)))
    symlinkSync(join(model, name), join(whole, name));
  writeTiny(join(whole, 'vae'));
  const index = { ...readJsonObject(join(model, 'model_index.json')), vae: ['diffusers', 'AutoencoderTiny'] };
  writeFileSync(join(whole, 'model_index.json'), JSON.stringify(index));
  const out = join(folder, 'exported');
  t.match(await sdxl('export', whole, out, '--json'), { status: 0, out: /"forward":\["unet","vae",/ });
  const coder = inspect(out).components.find(({ name }) => name === 'vae');
  t.match(coder, { class: 'AutoencoderTiny', problems: [] });
  t.match(await sdxl('export', whole, join(folder, 'one.safetensors'), '--format', 'single-file'), {
    status: 2,
    err: /has a tiny autoencoder \(AutoencoderTiny\), which no single file has; export a folder/,
  });
  t.end();
});
