// `sdxl serve` on the tiny model: the pictures of `sdxl sample` by both of its languages, and what it refuses.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { writePng } from '../../io/image.ts';
import { maxDifference } from '../support/golden.ts';
import { drawers, eventually, fox, pixels, sampledTo, serve, small } from '../support/served.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

const sampled = (...flags: string[]) => sampledTo(join(folder, 'sampled.png'), ...flags);

/** For the tests that leave it as it was. */
const shared = serve(...small);

test('a server draws what sample draws', async (t) => {
  const server = await shared;
  const plain = await sampled(...small, '--prompt', 'a red fox', '--seed', '5');
  const { status, body } = await server.post('/v1/images/generations', { ...fox, n: 2, size: '64x64' });
  t.equal(status, 200);
  t.same(
    body.data.map(({ seed }: { seed: number }) => seed),
    [5, 6],
    'from the seeds that follow',
  );
  t.equal(maxDifference((await pixels(body.data[0].b64_json)).data, plain.picture.data), 0);

  const kept = join(folder, 'kept.png');
  writeFileSync(kept, Buffer.from(body.data[1].b64_json, 'base64'));
  const again = await sampled('--from', kept);
  t.equal(
    maxDifference((await pixels(body.data[1].b64_json)).data, again.picture.data),
    0,
    'and --from draws it again',
  );

  const a1111 = await server.post('/sdapi/v1/txt2img', {
    ...{
      prompt: 'a (red:1.3) fox',
      negative_prompt: 'rain',
      seed: 7,
      steps: 3,
      cfg_scale: 4,
      width: 72,
      height: 64,
    },
    ...{
      sampler_name: 'DPM++ 2M',
      scheduler: 'karras',
      batch_size: 2,
      n_iter: 1,
      restore_faces: false,
      styles: [],
    },
  });
  t.equal(a1111.status, 200, a1111.body.detail);
  const info = JSON.parse(a1111.body.info);
  t.same(info.all_seeds, [7, 8]);
  t.match(
    info.infotexts[0],
    /a \(red:1.3\) fox\nNegative prompt: rain\nSteps: 3, Sampler: DPM\+\+ 2M, Schedule type: Karras/,
  );
  const typed = await sampled(
    ...[
      '--prompt',
      'a (red:1.3) fox',
      '--negative-prompt',
      'rain',
      '--seed',
      '8',
      '--steps',
      '3',
      '--cfg-scale',
      '4',
    ],
    ...[
      '--width',
      '72',
      '--height',
      '64',
      '--scheduler',
      'DPM++ 2M Karras',
      '--timestep-spacing',
      'linspace',
    ],
    ...['--emphasis', 'original', '--max-token-length', '225'],
  );
  t.equal(maxDifference((await pixels(a1111.body.images[1])).data, typed.picture.data), 0);
  const text = await server.post('/sdapi/v1/png-info', { image: a1111.body.images[0] });
  t.equal(text.body.info, info.infotexts[0]);
  t.match(text.body.parameters, {
    ...{ Prompt: 'a (red:1.3) fox', 'Negative prompt': 'rain', Steps: '3', Sampler: 'DPM++ 2M' },
    ...{ 'Size-1': '72', 'Size-2': '64', 'Clip skip': '1' },
  });

  const automatic = await server.post('/sdapi/v1/txt2img', { ...fox, sampler_name: 'DPM++ 2M SDE' });
  t.match(
    JSON.parse(automatic.body.info).infotexts[0],
    /Schedule type: Exponential/,
    "the sampler's own schedule type",
  );
  const named = await server.post('/sdapi/v1/txt2img', {
    ...{ ...fox, sampler_name: 'Euler a', scheduler: 'align_your_steps' },
  });
  t.match(JSON.parse(named.body.info).infotexts[0], /Sampler: Euler a, Schedule type: Align Your Steps, /);
});

test('a server draws over pictures', async (t) => {
  const server = await shared;
  const [image, mask] = [join(folder, 'image.png'), join(folder, 'mask.png')];
  const ramp = (size: number) => Uint8Array.from({ length: size }, (_, i) => (i * 37) % 256);
  writePng(image, { width: 64, height: 64, channels: 3, data: ramp(3 * 64 * 64) });
  const painted = Uint8Array.from({ length: 64 * 64 }, (_, i) => (i % 64 < 32 ? 255 : 0));
  writePng(mask, { width: 64, height: 64, channels: 1, data: painted });
  const inBase64 = (path: string) => readFileSync(path).toString('base64');
  const { default: sharp } = await import('sharp');
  /** The picture with an alpha channel, by another program's encoder. */
  const asAlpha = async (alpha: Uint8Array): Promise<string> => {
    const raw = { width: 64, height: 64, channels: 1 } as const;
    const png = await sharp(image).joinChannel(Buffer.from(alpha), { raw }).png().toBuffer();
    return png.toString('base64');
  };
  const said = [...small, '--prompt', 'a red fox', '--seed', '5', '--image', image];

  const over = await server.post('/sdapi/v1/img2img', {
    ...{ inpainting_fill: 0, image_cfg_scale: 1.5, mask: '' }, // as clients send without a mask, to any model
    ...{ ...fox, init_images: [`data:image/png;base64,${inBase64(image)}`] },
  });
  const wanted = await sampled(...said, '--strength', '0.75');
  t.equal(
    maxDifference((await pixels(over.body.images[0])).data, wanted.picture.data),
    0,
    "A1111's strength",
  );
  t.notOk('init_images' in over.body.parameters, 'what was sent is not sent back');

  const inPart = await server.post('/sdapi/v1/img2img', {
    ...{ ...fox, init_images: [inBase64(image)], mask: inBase64(mask), denoising_strength: 0.5 },
    ...{ inpaint_full_res: false, inpainting_fill: 2, inpainting_mask_invert: 1, mask_blur: 3 },
  });
  const under = ['--masked-content', 'latent-noise', '--invert-mask', '--mask-blur', '3'];
  const softened = await sampled(...said, '--mask', mask, '--strength', '0.5', ...under);
  t.equal(inPart.status, 200, inPart.body.detail);
  t.equal(maxDifference((await pixels(inPart.body.images[0])).data, softened.picture.data), 0, 'in a part');
  t.match(JSON.parse(inPart.body.info).infotexts[0], /Mask blur: 3, Masked content: latent noise/);
  const masked = await sampled(...said, '--mask', mask, '--strength', '1');
  const onlyMasked = await server.post('/sdapi/v1/img2img', {
    ...{
      ...fox,
      init_images: [inBase64(image)],
      mask: await asAlpha(painted),
      inpaint_full_res_padding: 8,
    },
  });
  const usual = ['--mask-blur', '4', '--masked-content', 'fill', '--strength', '0.75'];
  const cropped = await sampled(...said, '--mask', mask, ...usual, '--padding-mask-crop', '8');
  t.equal(
    maxDifference((await pixels(onlyMasked.body.images[0])).data, cropped.picture.data),
    0,
    'only masked, with what A1111 has by itself, by a mask that is an alpha channel',
  );
  const blank = await sharp({ create: { width: 64, height: 64, channels: 3, background: 'white' } })
    .png()
    .toBuffer();
  const [clear, white] = await Promise.all(
    [await asAlpha(new Uint8Array(64 * 64)), blank.toString('base64')].map((init) =>
      server.post('/sdapi/v1/img2img', { ...fox, init_images: [init] }),
    ),
  );
  const [got, want] = [await pixels(clear.body.images[0]), await pixels(white.body.images[0])];
  t.equal(maxDifference(got.data, want.data), 0, 'what is transparent is white');

  const [broad, middle] = [join(folder, 'broad.png'), join(folder, 'middle.png')];
  const noise = ramp(3 * 80 * 48);
  writePng(broad, { width: 80, height: 48, channels: 3, data: noise });
  const inner = noise.filter((_, i) => Math.floor(i / 3) % 80 >= 16 && Math.floor(i / 3) % 80 < 64);
  writePng(middle, { width: 48, height: 48, channels: 3, data: inner });
  const fit = { init_images: [inBase64(broad)], resize_mode: 1 };
  const cut = await server.post('/sdapi/v1/img2img', { ...fox, ...fit });
  const wide = await sampled(
    ...small,
    ...['--prompt', 'a red fox', '--seed', '5', '--strength', '0.75', '--image', middle],
  );
  t.equal(maxDifference((await pixels(cut.body.images[0])).data, wide.picture.data), 0, 'cut to the shape');

  // OpenAI's mask is transparent where to paint.
  const transparent = Buffer.from(await asAlpha(painted.map((grey) => 255 - grey)), 'base64');
  const form = new FormData();
  form.set('image', new Blob([readFileSync(image)]), 'image.png');
  form.set('mask', new Blob([transparent]), 'mask.png');
  for (const [key, value] of Object.entries({ ...fox, strength: 1 })) form.set(key, String(value));
  const edit = async () =>
    // biome-ignore lint/suspicious/noExplicitAny: what a route answers is read key by key
    (await (await fetch(`${server.url}/v1/images/edits`, { method: 'POST', body: form })).json()) as any;
  const { data } = await edit();
  t.equal(
    maxDifference((await pixels(data[0].b64_json)).data, masked.picture.data),
    0,
    "an edit in OpenAI's words",
  );
  form.delete('mask');
  form.delete('strength');
  const whole = (await edit()).data[0].b64_json;
  t.equal(maxDifference((await pixels(whole)).data, wanted.picture.data), 0, 'without a mask, as strong');
  form.append('image[]', new Blob([readFileSync(image)]), 'other.png');
  t.match((await edit()).detail, /^image has 2 pictures, and the model edits one.*; send that one alone$/);
});

test('a request that cannot be drawn is told why, in one sentence', async (t) => {
  const server = await shared;
  const { default: sharp } = await import('sharp');
  const huge = await sharp({ create: { width: 8192, height: 4096, channels: 3, background: 'red' } })
    .png()
    .toBuffer();
  const [white, black] = await Promise.all(
    ['white', 'black'].map(async (background) => {
      const png = await sharp({ create: { width: 64, height: 64, channels: 3, background } })
        .png()
        .toBuffer();
      return png.toString('base64');
    }),
  );
  const hostile = { toString: 1 }; // no text can be made of it
  const cases: [string, Record<string, unknown>, RegExp][] = [
    ['/v1/images/generations', {}, /prompt is not there/],
    ['/v1/images/generations', { prompt: 3 }, /prompt takes a text, not 3/],
    ['/v1/images/generations', { prompt: 'x', n: 17 }, /n takes a whole number from 1 to 16/],
    ['/v1/images/generations', { prompt: 'x', size: '100x64' }, /not divisible by 8/],
    ['/v1/images/generations', { prompt: 'x', size: '8192x64' }, /longest side is 4096/],
    ['/v1/images/generations', { prompt: 'x', size: 'big' }, /WIDTHxHEIGHT/],
    [
      '/v1/images/generations',
      { prompt: 'x', response_format: 'png' },
      /response_format takes b64_json, url/,
    ],
    ['/v1/images/generations', { prompt: 'x', output_format: 'gif' }, /png, jpeg, webp/],
    ['/v1/images/generations', { prompt: 'x', scheduler: 'eular' }, /unknown scheduler "eular".*euler/],
    [
      '/v1/images/generations',
      { prompt: 'x', background: 'transparent' },
      /background "transparent" is not there/,
    ],
    ['/sdapi/v1/txt2img', { prompt: 'x', steps: '9'.repeat(1e6) }, /^steps takes .{488}\.\.\.$/],
    ['/sdapi/v1/txt2img', { prompt: 'x'.repeat(10_001) }, /prompt has 10001 letters, and 10000 is the most/],
    ['/sdapi/v1/txt2img', { prompt: 'x', steps: 'many' }, /steps takes a whole number/],
    ['/sdapi/v1/txt2img', { prompt: 'x', steps: 1000 }, /steps takes a whole number from 1 to 150/],
    ['/sdapi/v1/txt2img', { prompt: 'x', width: 5000 }, /width takes a number.* to 4096/],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', subseed_strength: 2 },
      /subseed_strength takes a number from 0 to 1/,
    ],
    ['/sdapi/v1/txt2img', { prompt: 'x', width: 65 }, /width 65 is not divisible by 8/],
    ['/sdapi/v1/txt2img', { prompt: 'x', batch_size: 8, n_iter: 8 }, /is 64, and 16 is the most/],
    ['/sdapi/v1/txt2img', { prompt: 'x', restore_faces: true }, /restore_faces true is not there/],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x <lora:style:1>' },
      /takes no <lora:style:1> here: .* --lora-model-dir/,
    ],
    ['/sdapi/v1/txt2img', { prompt: 'x', sampler_name: 'Euler b' }, /unknown scheduler/],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', sampler_name: 'Euler', scheduler: 'spiral' },
      /scheduler takes Automatic/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', override_settings: { sd_model_checkpoint: 'other' } },
      /tiny-sdxl alone/,
    ],
    ['/sdapi/v1/txt2img', { prompt: 'x', enable_hr: true, hr_scale: 80 }, /hr_scale takes/],
    ['/sdapi/v1/txt2img', { prompt: 'x', enable_hr: 'false' }, /enable_hr takes true or false, not "false"/],
    ['/sdapi/v1/txt2img', { prompt: 'x', send_images: 'no' }, /send_images takes true or false/],
    ['/sdapi/v1/txt2img', { prompt: 'x', override_settings: 'sd_vae' }, /override_settings takes an object/],
    [
      '/sdapi/v1/img2img',
      { init_images: ['AAAA'], mask: 'AAAA', inpaint_full_res: 'false' },
      /inpaint_full_res takes true or false/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', enable_hr: true, hr_prompt: '<lora:a:1>' },
      /hr_prompt takes no <lora:a:1>: the LoRAs of prompt count in both passes/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', sampler_name: 'Euler', enable_hr: true, hr_sampler_name: 'Euler b' },
      /unknown scheduler "Euler b/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', sampler_name: 'Euler', enable_hr: true, hr_scheduler: 'spiral' },
      /hr_scheduler takes Automatic/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', enable_hr: true, hr_sampler_name: 7 },
      /hr_sampler_name takes a text/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', enable_hr: true, hr_scheduler: 'karras' },
      /hr_scheduler "Karras" .* give its sampler_name/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', enable_hr: true, hr_resize_x: 1e6, hr_resize_y: 1e6 },
      /1000000x1000000, which is more .* give smaller sides/,
    ],
    ['/sdapi/v1/img2img', { prompt: 'x' }, /init_images takes a list/],
    ['/sdapi/v1/img2img', { prompt: 'x', init_images: ['?'] }, /file in base64/],
    ['/sdapi/v1/img2img', { prompt: 'x', init_images: ['AAAA'] }, /init_images cannot be read as a picture/],
    ['/sdapi/v1/img2img', { prompt: 'x', init_images: [huge.toString('base64')] }, /pixel limit/],
    [
      '/sdapi/v1/img2img',
      { prompt: 'x', init_images: ['/etc/passwd'] },
      /cannot be read as a picture|base64/,
    ],
    [
      '/sdapi/v1/img2img',
      { prompt: 'x', init_images: [white], mask: black, width: 64, height: 64 },
      /^mask is all black: make white/,
    ],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', steps: 8, enable_hr: true, denoising_strength: 0.1, sampler_name: 'LCM' },
      /^at denoising_strength 0.1 the 8 hr_second_pass_steps are of/,
    ],
    ['/sdapi/v1/options', { sd_vae: 'other.safetensors' }, /decodes by the VAE that it was started with/],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', scheduler: 'karras' },
      /scheduler "Karras" .* give its sampler_name/,
    ],
    ['/v1/images/generations', { prompt: 'x', size: hostile }, /size takes WIDTHxHEIGHT .* not \{/],
    ['/v1/images/generations', { prompt: 'x', output_format: hostile }, /output_format takes png/],
    ['/sdapi/v1/txt2img', { prompt: 'x', enable_hr: true, hr_prompt: hostile }, /hr_prompt takes a text/],
    [
      '/sdapi/v1/txt2img',
      { prompt: 'x', seed_resize_from_w: hostile, seed_resize_from_h: 64 },
      /seed_resize_from_w takes a number/,
    ],
    ['/sdapi/v1/options', { sd_model_checkpoint: 'other' }, /tiny-sdxl alone/],
    ['/sdapi/v1/png-info', { image: 'AAAA' }, /not a PNG/],
  ];
  for (const [path, body, sentence] of cases) {
    const { status, body: answer } = await server.post(path, body);
    t.equal(status, 400, `${path} ${JSON.stringify(body).slice(0, 80)}: ${answer.detail}`);
    t.match(answer.detail, sentence);
    t.equal(answer.detail.split('\n').length, 1);
  }
  const lenient = await server.post('/sdapi/v1/txt2img', {
    ...{
      ...fox,
      hr_scale: 2,
      hr_sampler_name: 'Euler',
      hr_prompt: 'a fox',
      denoising_strength: 0.7,
      flavour: 1,
    },
    ...{ script_name: 'None', refiner_checkpoint: 'None', refiner_switch_at: 0.8 },
    alwayson_scripts: { ADetailer: { args: [false] }, Sampler: { args: [] } },
  });
  t.equal(lenient.status, 200, 'what would only count for a second pass, and a key of another program');
  t.match(server.said(), /"flavour" of a request says nothing/);
  t.equal((await server.get('/healthz')).body.status, 'ok');
});

test('a service manager ends it', async (t) => {
  t.equal(await (await shared).end(), 143);
  await eventually(async () => drawers().length === 0);
});
