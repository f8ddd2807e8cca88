// What units of sd-webui-controlnet have a server follow: ControlNets, unions, T2I-Adapters and IP-Adapters, each as `sdxl sample` does.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { fitted } from '../../cli/serve/sent_picture.ts';
import { canny } from '../../io/canny.ts';
import { writePng } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { picture, writeControlNet, writeControlNetUnion } from '../support/controlnet_golden.ts';
import { maxDifference } from '../support/golden.ts';
import { writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import { fox, pixels, sampledTo, serve, small } from '../support/served.ts';
import { writeT2IAdapter } from '../support/t2i_adapter_golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string) => join(folder, name);

const [full, little] = ['full', 'small'].map((name) => writeControlNet(at(name), name));
const union = writeControlNetUnion(at('union'), 'union');
const edges = writeT2IAdapter(at('edges'), 'edges');
const other = writeT2IAdapter(at('other'), 'edges');
writeEncoder(at('image_encoder'));
const plain = writeIPAdapter(at('plain.safetensors'), 'plain');
const started = serve(
  ...[...small, '--controlnet', full, '--controlnet', little, '--controlnet', union],
  ...['--adapter', edges, '--adapter', other, '--ip-adapter', plain],
);

const file = at('seen.png');
const seen = picture(1, 64, 64);
writePng(file, seen);
const inverted = at('inverted.png');
writePng(inverted, { ...seen, data: seen.data.map((level) => 255 - level) });
const broad = picture(2, 20, 8);
writePng(at('wide.png'), broad);
writePng(at('cropped.png'), fitted(broad, 'crop', { width: 64, height: 64 })); // as it is by itself
const wide = readFileSync(at('wide.png')).toString('base64');
const image = readFileSync(file).toString('base64');
const units = (...args: Record<string, unknown>[]) => ({ alwayson_scripts: { ControlNet: { args } } });

/** A picture that is transparent; what it is on white is white.png. */
async function clear(): Promise<string> {
  writePng(at('white.png'), { ...seen, data: new Uint8Array(seen.data.length).fill(255) });
  const { default: sharp } = await import('sharp');
  const raw = { width: 64, height: 64, channels: 1 } as const;
  const png = sharp(file)
    .joinChannel(Buffer.alloc(64 * 64), { raw })
    .png();
  return (await png.toBuffer()).toString('base64');
}

/** What `sdxl sample` draws, with A1111's habits. */
async function sampled(...flags: string[]) {
  const habits = ['--emphasis', 'original', '--max-token-length', '225'];
  const asked = [...small, '--prompt', fox.prompt, '--seed', `${fox.seed}`];
  return (await sampledTo(at('sampled.png'), ...asked, ...habits, ...flags)).picture;
}

test('what a unit names is followed, as by sample', async (t) => {
  const server = await started;
  const { model_list: names } = (await server.get('/controlnet/model_list')).body;
  t.same(names, ['full', 'small', 'union', 'edges', 'other', 'plain']);
  const cases: [what: string, args: Record<string, unknown>[], flags: string[]][] = [
    [
      'two ControlNets, and one that is not enabled',
      [
        {
          ...{ model: 'small [1234abcd]', module: 'none', image, weight: 0.6, guidance_end: 0.5 },
          ...{ pixel_perfect: true, effective_region_mask: null, advanced_weighting: null },
        },
        { enabled: false, model: 'absent', image },
        { model: 'full', image: null, input_image: image, weight: 0.3, control_mode: 'Balanced' },
      ],
      [
        ...['--controlnet', `${little}:0.6`, '--control-image', file, '--controlnet', `${full}:0.3`],
        ...['--control-image', file, '--control-guidance-start', '0', '--control-guidance-start', '0'],
        ...['--control-guidance-end', '0.5', '--control-guidance-end', '1'],
      ],
    ],
    [
      'a union twice, in the words of either, beside another',
      [
        { model: 'union', image, union_control_type: 'Hard Edge' },
        { model: 'small', image, weight: 0.5, union_control_type: 'Depth' },
        { model: 'union', image, union_control_type: 'depth' },
      ],
      [
        ...['--controlnet', union, '--control-image', file, '--control-mode', 'canny'],
        ...['--controlnet', `${little}:0.5`, '--control-image', file],
        ...['--controlnet', union, '--control-image', file, '--control-mode', 'depth'],
      ],
    ],
    [
      "a T2I-Adapter along a picture's edges",
      [{ model: 'edges', module: 'canny', threshold_a: 60, image, weight: 0.8, guidance_end: 0.5 }],
      [
        ...['--adapter', `${edges}:0.8`, '--adapter-image', file, '--canny', '60,200'],
        ...['--adapter-conditioning-factor', '0.5'],
      ],
    ],
    [
      'one that is more important, beside one that is not',
      [
        { model: 'full', image, control_mode: 'ControlNet is more important', hr_option: 'Both' },
        { model: 'small', image, control_mode: ['Balanced'], resize_mode: 'Resize and Fill' }, // as webuiapi sends
        { model: 'small', image: wide, control_mode: 1 },
      ],
      [
        ...[full, little].flatMap((net) => ['--controlnet', net, '--control-image', file]),
        ...['--controlnet', little, '--control-image', at('cropped.png')],
        ...['more_control', 'balanced', 'more_prompt'].flatMap((name) => ['--control-balance', name]),
      ],
    ],
    [
      'what is transparent, on white',
      [{ model: 'small', image: await clear() }],
      ['--controlnet', little, '--control-image', at('white.png')],
    ],
    [
      'what is drawn in black on white',
      [{ model: 'small', image, module: 'invert (from white bg & black line)' }],
      ['--controlnet', little, '--control-image', inverted],
    ],
    [
      'an IP-Adapter beside a T2I-Adapter and a ControlNet',
      [
        { model: 'plain', module: 'ip-adapter-auto', image, weight: 0.7 },
        { model: 'other', image },
        { model: 'small', image },
      ],
      [
        ...['--ip-adapter', `${plain}:0.7`, '--ip-adapter-image', file, '--adapter', other],
        ...['--adapter-image', file, '--controlnet', little, '--control-image', file],
      ],
    ],
  ];
  const free = await sampled();
  for (const [what, args, flags] of cases) {
    const { status, body } = await server.post('/sdapi/v1/txt2img', { ...fox, ...units(...args) });
    t.equal(status, 200, body.detail);
    const wanted = await sampled(...flags);
    t.equal(maxDifference((await pixels(body.images[0])).data, wanted.data), 0, what);
    t.ok(maxDifference(wanted.data, free.data) > 0, `${what}: not what is drawn without`);
  }
  const { body } = await server.post('/sdapi/v1/txt2img', fox);
  t.equal(
    maxDifference((await pixels(body.images[0])).data, free.data),
    0,
    'and a request without units none',
  );
});

test('a unit without a picture follows the one that is drawn over, as that is cut', async (t) => {
  const server = await started;
  const edged = at('edged.png');
  writePng(edged, fitted(canny(broad, [100, 200]), 'crop', { width: 64, height: 64 }));
  for (const [unit, flags] of [
    [
      { model: 'small', resize_mode: 'Resize and Fill' },
      ['--controlnet', little, '--control-image', at('cropped.png')],
    ],
    [{ model: 'small', module: 'canny', image: null }, ['--controlnet', little, '--control-image', edged]],
    [{ model: 'edges', input_image: '' }, ['--adapter', edges, '--adapter-image', at('cropped.png')]],
    [{ model: 'plain' }, ['--ip-adapter', plain, '--ip-adapter-image', at('wide.png')]],
  ] as [Record<string, unknown>, string[]][]) {
    const over = { init_images: [wide], resize_mode: 1, denoising_strength: 0.6 };
    const { status, body } = await server.post('/sdapi/v1/img2img', {
      ...fox,
      ...over,
      ...units({ weight: 1, ...unit }),
    });
    t.equal(status, 200, body.detail);
    const [kind, file, ...rest] = flags;
    const wanted = await sampled(
      '--image',
      at('cropped.png'),
      '--strength',
      '0.6',
      kind,
      `${file}:1`,
      ...rest,
    );
    t.equal(maxDifference((await pixels(body.images[0])).data, wanted.data), 0, JSON.stringify(unit));
  }
  const inPart = { init_images: [image], mask: image, inpaint_full_res_padding: 4, denoising_strength: 0.6 };
  const { body } = await server.post('/sdapi/v1/img2img', {
    ...fox,
    ...inPart,
    ...units({ model: 'small' }),
  });
  const part = ['--mask', file, '--mask-blur', '4', '--masked-content', 'fill', '--padding-mask-crop', '4'];
  const followed = ['--controlnet', `${little}:1`, '--control-image', file];
  const wanted = await sampled('--image', file, '--strength', '0.6', ...part, ...followed);
  t.equal(maxDifference((await pixels(body.images[0])).data, wanted.data), 0, 'in a part');
  const unseen = await server.post('/sdapi/v1/img2img', { ...fox, ...inPart, ...units({ model: 'plain' }) });
  t.match(unseen.body.detail, /an IP-Adapter sees no part of init_images that inpaint_full_res draws/);
});

test('pictures of other shapes are cut or filled up about their middle', (t) => {
  const rows = (of: Picture, left: number, width: number) =>
    Array.from({ length: of.height }, (_, y) => [
      ...of.data.slice(3 * (y * of.width + left), 3 * (y * of.width + left + width)),
    ]);
  const size = { width: 64, height: 64 };
  const cut = fitted(broad, 'crop', size);
  t.same([cut.width, cut.height], [8, 8]);
  t.same(rows(cut, 0, 8), rows(broad, 6, 8));
  const filled = fitted(broad, 'fill', size);
  t.same([filled.width, filled.height], [20, 20]);
  t.same(rows(filled, 0, 20).slice(6, 14), rows(broad, 0, 20));
  // numpy: np.median(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]), axis=0).astype(np.uint8)
  const colour = [125, 134, 144];
  t.same(rows(filled, 0, 20)[5], Array(20).fill(colour).flat());
  t.equal(fitted(broad, 'crop', { ...size, paddingMaskCrop: 4 }), broad);
  t.equal(fitted(broad, 'fill', { width: 80, height: 32 }), broad, 'one of the shape stays as it is');
  t.equal(fitted(broad, undefined, size), broad);
  const line = picture(1, 4096, 1);
  t.throws(
    () => fitted(line, 'fill', { width: 8, height: 4096 }),
    /is 4096x1, which resize_mode "Resize and Fill"/,
  );
  t.end();
});

test('a unit that cannot be followed is told of', async (t) => {
  const server = await started;
  const hostile = { toString: 1 }; // no text can be made of it
  for (const [body, sentence] of [
    [units({ image }), /names null, and this server has full, small, union/],
    [units({ model: 'canny', image }), /names "canny", and this server has full/],
    [
      units({ model: 'full', module: 'depth_midas', image }),
      /module "depth_midas", and there are canny, invert, threshold, tile_resample alone/,
    ],
    [
      units({ model: 'full', module: 'ip-adapter-auto', image }),
      /there are canny, invert, threshold, tile_resample alone/,
    ],
    [
      units({ model: 'plain', module: 'ip-adapter_face_id', image }),
      /there are canny, invert, threshold, tile_resample alone/,
    ],
    [
      units({ model: 'full', resize_mode: 'Stretch', image }),
      /resize_mode takes Just Resize, Crop and Resize/,
    ],
    [
      units({ enabled: false }, { model: 'full', image: 'AAAA' }),
      /^the image of ControlNet unit 1 cannot be read as a picture/,
    ],
    [units({ model: 'full', enabled: 'false', image }), /unit's enabled takes true or false, not "false"/],
    [units({ model: 'full', control_mode: 3, image }), /control_mode takes Balanced, My prompt is more/],
    [
      units({ model: 'edges', control_mode: 1, image }),
      /T2I-Adapters and IP-Adapters are followed by "Balanced"/,
    ],
    [units({ model: 'full', hr_option: 'High res only', image }), /hr_option "High res only" is not there/],
    [units({ model: 'full' }), /image takes a picture's file/],
    [units({ model: 'full', image, weight: -1 }), /weight takes a number from 0/],
    [units({ model: 'full', image, guidance_start: 0.8, guidance_end: 0.2 }), /nothing would be followed/],
    [units({ model: 'full', image, effective_region_mask: image }), /effective_region_mask .* is not there/],
    [
      units({ model: 'union', image }),
      /union is a ControlNet union: say what its picture is by union_control/,
    ],
    [
      units({ model: 'union', image, union_control_type: 'Edges' }),
      /union_control_type takes OpenPose, Depth/,
    ],
    [
      units(
        { model: 'union', image, union_control_type: 'Depth' },
        { model: 'union', image, union_control_type: 'Depth', control_mode: 1 },
      ),
      /give each the same control_balance \(control_mode\)$/,
    ],
    [units({ model: 'union', image, union_control_type: 'tile' }), /control_mode 6 for a ControlNet union/],
    [
      units({ model: 'edges', image, guidance_start: 0.5 }),
      /T2I-Adapters are followed from the first step on/,
    ],
    [units({ model: 'edges', image, guidance_end: 0.5 }, { model: 'other', image }), /the same guidance_end/],
    [units({ model: 'plain', image, guidance_end: 0.5 }), /an IP-Adapter is followed in all steps/],
    [units(...Array(11).fill({ model: 'full', image })), /11 ControlNet units are followed, and 10/],
    [{ alwayson_scripts: { adetailer: { args: [true] } } }, /there is no script "adetailer"/],
    [{ alwayson_scripts: { adetailer: {} } }, /there is no script "adetailer"/],
    [{ alwayson_scripts: [] }, /takes an object/],
    [
      { alwayson_scripts: { controlnet: { args: { model: 'full', image } } } },
      /"controlnet" takes an object with args, a list of units/,
    ],
    [units({ model: hostile, image }), /unit's model takes a text, not \{"toString":1\}/],
    [units({ model: 'full', image, module: hostile }), /unit's module takes a text, not/],
    [units({ model: 'union', image, union_control_type: hostile }), /union_control_type takes a text, not/],
    [units({ model: 'full', image, weight: hostile }), /unit's weight takes a number from 0, not/],
    [
      units({ model: 'full', image, module: 'canny', threshold_a: hostile }),
      /unit's threshold_a takes a number, not/,
    ],
    [{ enable_hr: true, hr_resize_x: hostile }, /hr_resize_x takes a number, not/],
  ] as const) {
    const { status, body: answer } = await server.post('/sdapi/v1/txt2img', { ...fox, ...body });
    t.equal(status, 400, JSON.stringify(body).slice(0, 80));
    t.match(answer.detail, sentence);
  }
  t.equal(await server.end(), 143);
});

test('where nobody says how large, the model does, or what is drawn over', async (t) => {
  const server = await serve('--steps', '1', '--controlnet', little);
  const asked = { ...fox, ...units({ image: wide }) };
  const flags = ['--controlnet', `${little}:1`, '--control-image', at('cropped.png'), '--steps', '1'];
  for (const [path, over, side, more] of [
    ['txt2img', {}, '128', []], // the model's size
    ['img2img', { init_images: [image], denoising_strength: 1 }, '64', ['--image', file, '--strength', '1']],
  ] as const) {
    const { body } = await server.post(`/sdapi/v1/${path}`, { ...asked, ...over });
    const wanted = await sampled(...flags, '--width', side, '--height', side, ...more);
    const drawn = await pixels(body.images[0]);
    t.equal(drawn.width, Number(side), path);
    t.equal(maxDifference(drawn.data, wanted.data), 0, `${path}: what is followed is cut to its shape`);
  }
  t.equal(await server.end(), 143);
});
