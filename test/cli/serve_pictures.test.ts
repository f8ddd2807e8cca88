// Pictures that a server makes of others without drawing: A1111's extras and sd-webui-controlnet's preprocessors, held to Pillow's and
// OpenCV's pixels (their SHA-256) of what those programs do.
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { test } from 'tap';
import { enlarged } from '../../cli/serve/enlarge.ts';
import type { Enlarging } from '../../cli/serve/messages.ts';
import { madeBy, preprocessed } from '../../cli/serve/preprocessors.ts';
import { readSent } from '../../cli/serve/sent_picture.ts';
import { namedParameters } from '../../engine/module.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import type { Picture } from '../../io/pixels.ts';
import { encodePng, pngText } from '../../io/png.ts';
import { resize } from '../../io/resize.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { rrdbnet } from '../../models/upscaler/rrdbnet.ts';
import { fox, pixels, serve, small } from '../support/served.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-pictures-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

/** np.array([(i * 37 + (i // 7) * 11) % 256 for i in range(3 * 20 * 12)], np.uint8).reshape(12, 20, 3) */
const seen: Picture = {
  ...{ width: 20, height: 12, channels: 3 },
  data: Uint8Array.from({ length: 3 * 20 * 12 }, (_, i) => i * 37 + Math.floor(i / 7) * 11),
};
const hashOf = ({ width, height, data }: Picture): string =>
  `${width}x${height} ${createHash('sha256').update(data).digest('hex').slice(0, 16)}`;

/** In place of a network: Image.resize by NEAREST. */
const doubling = {
  scale: 2,
  enlarge: (each: Picture) => resize(each, 2 * each.width, 2 * each.height, 'nearest'),
  release() {},
};

test("pictures are enlarged as by A1111's extras", (t) => {
  const to = (width: number, height: number, crop: boolean) => ({ width, height, crop });
  for (const [upscaler, size, hash, told] of [
    ['Lanczos', { by: 1.7 }, '32x16 70ce0b2174092c29', 'by: 1.7, Postprocess upscaler: Lanczos'],
    ['Nearest', { by: 1.7 }, '32x16 fb260320fe59c406', 'by: 1.7, Postprocess upscaler: Nearest'],
    ['Nearest', { by: 0.7 }, '8x8 4461763c5ef2d7ed', 'by: 0.7, Postprocess upscaler: Nearest'],
    ['Lanczos', to(50, 61, true), '50x61 4efd06e4b96306a8', 'to: 50x61, Postprocess crop to: 50x61, '],
    ['Nearest', to(50, 30, false), '48x24 fe67859604200d43', 'to: 50x30, Postprocess upscaler: Nearest'],
    ['x.safetensors', { by: 5 }, '96x56 66cae7649e4073a5', 'by: 5.0, Postprocess upscaler: x'],
    ['x.safetensors', { by: 1 }, '16x8 c9423db710416ed1', 'by: 1.0, Postprocess upscaler: x'],
  ] as [string, Enlarging['size'], string, string][]) {
    const enlarging: Enlarging = { upscalers: [upscaler, 'None'], visibility: 1, size };
    const network = upscaler.startsWith('x') ? doubling : undefined;
    const made = enlarged(
      seen,
      'image',
      enlarging,
      () => network,
      () => {},
    );
    t.equal(hashOf(made.picture), hash, `${upscaler} ${JSON.stringify(size)}`);
    t.ok(made.told.startsWith(`Postprocess upscale ${told}`), made.told);
  }
  const both: Enlarging = { upscalers: ['Lanczos', 'Nearest'], visibility: 0.3, size: { by: 2 } };
  const blended = enlarged(
    seen,
    'image',
    both,
    () => undefined,
    () => {},
  );
  t.equal(hashOf(blended.picture), '40x24 f7f24eb4fbfa51d5', 'two of them');
  t.match(blended.told, /Postprocess upscaler: Lanczos, Postprocess upscaler 2: Nearest$/);
  const none: Enlarging = { upscalers: ['None', 'Lanczos'], visibility: 1, size: { by: 2 } };
  t.equal(
    enlarged(
      seen,
      'image',
      none,
      () => undefined,
      () => {},
    ).picture,
    seen,
  );
  const far: Enlarging = { upscalers: ['x.safetensors'], visibility: 0, size: { by: 2 } };
  t.throws(
    () =>
      enlarged(
        seen,
        'image',
        far,
        () => ({ ...doubling, scale: 1000 }),
        () => {},
      ),
    /^image would be enlarged by way of 20000x12000 pixels; send a smaller one$/,
  );
  t.end();
});

test("pictures are preprocessed as by sd-webui-controlnet's", (t) => {
  for (const [module, threshold_a, hash] of [
    ['none', -1, hashOf(seen)],
    ['canny', 0, '20x12 24d2ee01c256ef70'], // 0 is outside of its range
    ['Canny', null, '20x12 24d2ee01c256ef70'],
    ['invert (from white bg & black line)', 5, '20x12 d8f9b4191f4e86a8'],
    ['threshold', 60, '20x12 a809140002719349'],
    ['tile_resample', undefined, hashOf(seen)],
    ['tile_resample', 1.37, '14x8 d0a6d7034de6f92d'],
    ['tile_resample', '2', '10x6 27d850da9c6e6dfd'],
    ['tile_resample', 5, '4x2 20b5b427897e2755'],
  ] as const) {
    const made = madeBy(module, { threshold_a, threshold_b: -1 }, 'a unit');
    t.equal(hashOf(preprocessed(seen, made)), hash, `${module} ${threshold_a}`);
  }
  const line = { ...seen, width: 240, height: 1 };
  const shrunk = preprocessed(line, madeBy('tile_resample', { threshold_a: 8, threshold_b: 0 }, ''));
  t.same([shrunk.width, shrunk.height], [30, 1], 'no side is nothing');
  t.end();
});

/** A network with weights of no meaning. */
function writeNetwork(path: string): string {
  const network = rrdbnet({ num_feat: 4, num_block: 1, num_grow_ch: 4, doublings: 2, unshuffle: 1 });
  const tensors = [...namedParameters(network)].map(([name, { shape }]) => {
    const values = Float32Array.from({ length: sizeOf(shape) }, (_, i) => Math.sin(i) / 8);
    return { name, shape, dtype: 'float32' as const, bytes: encodeNumbers(values, 'float32') };
  });
  writeSafetensors(path, tensors);
  return path;
}

test('a server makes pictures of those that it is sent', async (t) => {
  const server = await serve(...small, '--upscale-model', writeNetwork(join(folder, '4x-Toy.safetensors')));
  const inBase64 = (picture: Picture, text = {}) => Buffer.from(encodePng(picture, text)).toString('base64');
  const image = inBase64(seen, { parameters: 'a fox\nSteps: 2', other: 'x' });
  const single = (body: object) => server.post('/sdapi/v1/extra-single-image', { image, ...body });
  const large = await single({ upscaler_1: 'lanczos', upscaling_resize: 1.7, gfpgan_visibility: 0 });
  t.equal(large.status, 200, large.body.detail);
  t.equal(hashOf(await pixels(large.body.image)), '32x16 70ce0b2174092c29');
  t.equal(large.body.html_info, '<p>Postprocess upscale by: 1.7, Postprocess upscaler: Lanczos</p>');
  t.same(
    { ...pngText(Buffer.from(large.body.image, 'base64'), '') },
    { parameters: 'a fox\nSteps: 2', postprocessing: large.body.html_info.slice(3, -4) },
  );
  const kept = await single({});
  t.equal(hashOf(await pixels(kept.body.image)), hashOf(seen), 'by no upscaler');
  const names = (await server.get('/sdapi/v1/upscalers')).body.map(({ name }: { name: string }) => name);
  t.same(names, ['None', 'Lanczos', 'Nearest', '4x-Toy']);
  const toy = await single({
    upscaler_1: '4x-Toy',
    resize_mode: 1,
    upscaling_resize_w: 48,
    upscaling_resize_h: 24,
  });
  t.equal((await pixels(toy.body.image)).width, 48, toy.body.detail);
  t.notSame(
    toy.body.image,
    (await single({ upscaler_1: 'Lanczos', resize_mode: 1, upscaling_resize_w: 48, upscaling_resize_h: 24 }))
      .body.image,
  );
  const hires = { enable_hr: true, hr_scale: 1.5, hr_upscaler: '4x-Toy', denoising_strength: 0.5, steps: 1 };
  const drawn = await server.post('/sdapi/v1/txt2img', { ...fox, ...hires });
  t.equal(drawn.status, 200, drawn.body.detail);
  t.match(JSON.parse(drawn.body.info).infotexts[0], /Hires upscaler: 4x-Toy/);

  const imageList = [
    { data: image, name: 'a.png' },
    { data: inBase64({ ...seen, width: 12, height: 20 }), name: 'b' },
  ];
  const batch = { imageList, upscaler_1: 'Nearest', upscaling_resize: 2 };
  const [several, ...edges] = await Promise.all([
    server.post('/sdapi/v1/extra-batch-images', batch),
    ...Array.from({ length: 3 }, () =>
      server.post('/controlnet/detect', {
        controlnet_module: 'canny',
        controlnet_input_images: [image, image],
      }),
    ),
  ]);
  const sides = await Promise.all(several.body.images.map((each: string) => pixels(each)));
  t.same(
    sides.map(({ width, height }) => [width, height]),
    [
      [40, 24],
      [24, 40],
    ],
  );
  for (const { body } of edges) {
    t.match(body, { info: 'Success', images: { length: 2 } });
    for (const each of body.images) t.equal(hashOf(await pixels(each)), '20x12 24d2ee01c256ef70');
  }
  const { module_list, module_detail } = (await server.get('/controlnet/module_list')).body;
  t.same(module_list, ['none', 'canny', 'invert', 'threshold', 'tile_resample']);
  t.match(module_detail.tile_resample.sliders, [{ name: 'Down Sampling Rate', value: 1, min: 1, max: 8 }]);

  const extras = '/sdapi/v1/extra-single-image';
  for (const [path, body, sentence] of [
    [extras, {}, /^image takes a picture's file in base64/],
    [extras, { image: '####' }, /^image takes a picture's file in base64/],
    [extras, { image: 'AAAA' }, /^image cannot be read as a picture/],
    [extras, { image: { data: image } }, /^image takes a picture's file/],
    [extras, { image, gfpgan_visibility: 0.5 }, /^gfpgan_visibility 0.5 is not there/],
    [extras, { image, codeformer_visibility: 1 }, /^codeformer_visibility 1 is not there/],
    [extras, { image, upscaler_1: 'R-ESRGAN 4x+' }, /^upscaler_1 takes None, Lanczos, Nearest, 4x-Toy/],
    [extras, { image, upscaler_2: 3 }, /^upscaler_2 takes a text/],
    [extras, { image, upscaler_1: 'Lanczos', upscaling_resize: 'NaN' }, /^upscaling_resize takes a number/],
    [extras, { image, upscaler_1: 'Lanczos', upscaling_resize: 1e300 }, /^upscaling_resize takes a number/],
    [
      extras,
      { image, upscaler_1: 'Lanczos', upscaling_resize: 400 },
      /^image would be 8000x4800 pixels, and 4096/,
    ],
    [extras, { image, upscaler_1: 'Lanczos', upscaling_resize: 0 }, /^image would be 0x0 pixels/],
    [extras, { image, resize_mode: 2 }, /^resize_mode 2 is not there/],
    [extras, { image, resize_mode: 1, upscaling_resize_w: 0.5 }, /^upscaling_resize_w takes a whole number/],
    [extras, { image, upscaling_crop: 'yes' }, /^upscaling_crop takes true or false/],
    [
      extras,
      { image, extras_upscaler_2_visibility: -1 },
      /^extras_upscaler_2_visibility takes a number from 0 to 1/,
    ],
    ['/sdapi/v1/extra-batch-images', { imageList: {} }, /^imageList takes a list of 1 to 16/],
    ['/sdapi/v1/extra-batch-images', { imageList: ['x'] }, /^picture 0 of imageList takes a picture's file/],
    ['/controlnet/detect', {}, /^controlnet_input_images takes a list of 1 to 16/],
    ['/controlnet/detect', { controlnet_input_images: [3] }, /^picture 0 of controlnet_input_images takes/],
    [
      '/controlnet/detect',
      { controlnet_module: 'inpaint_only', controlnet_input_images: [image] },
      /^controlnet_module has the module "inpaint_only", and there are canny, invert, threshold, tile_resample alone/,
    ],
    [
      '/controlnet/detect',
      { controlnet_module: 'canny', controlnet_threshold_a: {}, controlnet_input_images: [image] },
      /^controlnet_module's threshold_a takes a number/,
    ],
  ] as const) {
    const { status, body: answer } = await server.post(path, body);
    t.equal(status, 400, `${path} ${JSON.stringify(body).slice(0, 80)}`);
    t.match(answer.detail, sentence);
  }
  t.equal((await server.get('/healthz')).body.status, 'ok');
  t.equal(await server.end(), 143);
});

test("a mask of opacities is cut at 128 as A1111's, where any is below 255", async (t) => {
  const levels = async (...alphas: number[]) => {
    const data = Buffer.from(alphas.flatMap((alpha) => [10, 20, 30, alpha]));
    const file = await sharp(data, { raw: { width: alphas.length, height: 1, channels: 4 } })
      .png()
      .toBuffer();
    return [...(await readSent(file, 'mask', { by: 'alpha' })).data].filter((_, i) => i % 3 === 0);
  };
  t.same(await levels(0, 128, 129, 255), [0, 0, 255, 255]);
  t.same(await levels(254, 255), [255, 255]);
  t.same(await levels(255, 255), [10, 10], 'and is a picture otherwise');
});
