// `sdxl sample --ip-adapter`: diffusers' latents (golden/ip_adapter.jsonl), pictures that give their settings back, a refiner, the hub's
// layout with two vision encoders, what `sdxl inspect` tells, and mistakes.
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { readPicture, writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import type { Scale, ScalesByBlock } from '../../models/ip_adapter/ip_adapter_scale.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { disc, pictureIn } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, maxDifference } from '../support/golden.ts';
import {
  encoderConfig,
  golden,
  type Of,
  writeEncoder,
  writeIPAdapter,
} from '../support/ip_adapter_golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-cli-ip-adapter-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const [model, refiner] = ['tiny-sdxl', 'tiny-sdxl-refiner'].map((name) => join(goldenFolder, name));
writeEncoder(at('image_encoder'));
for (const name of ['plain', 'plus']) writeIPAdapter(at(`${name}.safetensors`), name);

const pictureFile = (...of: Of): string => pictureIn(folder, ...of);
const seen = pictureFile(1, 117, 149);
const size = ['--width', '64', '--height', '64'];
const sample = (...argv: string[]) =>
  sdxl('sample', '--model', model, '--prompt', 'a red fox in the snow', '--quiet', ...argv);

/** As it is typed. */
function scaleText(scale: Scale | ScalesByBlock): string {
  if (typeof scale === 'number') return scale === 1 ? '' : `:${scale}`;
  if (Array.isArray(scale)) return `:${scale}`;
  const parts = Object.entries(scale).flatMap(([side, given]: [string, unknown]) =>
    Object.entries(typeof given === 'object' ? { ...given } : { '': given }).map(
      ([block, list]) => `:${[side, block].filter(Boolean).join('.')}=${list}`,
    ),
  );
  return parts.join('');
}

function maskFile(of: 'disc' | Of): string {
  if (of !== 'disc') return pictureFile(...of);
  writePng(at('disc.png'), disc());
  return at('disc.png');
}

const ofs = (of: Of | Of[]): Of[] => (typeof of[0] === 'number' ? [of as Of] : (of as Of[]));

test("diffusers' latents, and the settings in the picture", async (t) => {
  for (const id of ['plain', 'two', 'img2img', 'several_of_one', 'blocks_of_two', 'masks']) {
    const c = golden.find(({ call }) => call === id) as (typeof golden)[number];
    const { num_images_per_prompt = 1, num_inference_steps = 4, strength, cache_interval } = c.settings;
    const { width = 64, height = 64 } = c.settings;
    const [output, saved] = [at(`${id}.png`), at(`${id}-latents.safetensors`)];
    const { status, err, out } = await sample(
      ...[
        '--width',
        `${width}`,
        '--height',
        `${height}`,
        '--seed',
        String(c.seed),
        '--json',
        '--output',
        output,
      ],
      ...['--negative-prompt', 'rain', ...(cache_interval ? ['--cache-interval', `${cache_interval}`] : [])],
      ...['--num-images', String(num_images_per_prompt), '--steps', String(num_inference_steps)],
      ...(strength ? ['--image', pictureFile(4, 64, 64), '--strength', String(strength)] : []),
      ...c.adapters.flatMap(([name, of, scale, masks]) => [
        ...['--ip-adapter', `${at(`${name}.safetensors`)}${scaleText(scale)}`],
        ...ofs(of).flatMap((each) => ['--ip-adapter-image', pictureFile(...each)]),
        ...(masks ?? []).flatMap((each) => ['--ip-adapter-mask', maskFile(each)]),
      ]),
      ...['--save-latents', saved],
    );
    t.equal(status, 0, `${id} ${err}`);
    allClose(t, id, savedLatents(saved), c.values, { atol: c.atol, rtol: 0 });
    const [first] = JSON.parse(out).files;
    const back = await sdxl(
      'sample',
      '--from',
      first,
      '--output',
      at(`${id}-again.png`),
      '--json',
      '--quiet',
    );
    t.equal(back.status, 0, `from its own picture ${back.err}`);
    const [second] = JSON.parse(back.out).files;
    t.ok(readFileSync(first).equals(readFileSync(second)), `${id}: the same picture and settings`);
  }
  const kept = JSON.parse(readPngText(at('two.png')).sdxl);
  t.same(kept.ipAdapter, [`${at('plain.safetensors')}:0.7`, `${at('plus.safetensors')}:-0.4`]);
  t.same(kept.ipAdapterImage, [seen, pictureFile(3, 56, 56)]);
  const [blocks, masked] = ['blocks_of_two', 'masks'].map((id) =>
    JSON.parse(readPngText(at(`${id}.png`)).sdxl),
  );
  t.same(blocks.ipAdapter, [
    `${at('plain.safetensors')}:down.block_2=0,1:mid=0.5`,
    `${at('plus.safetensors')}:up=0.8:down.block_1=-0.3`,
  ]);
  t.same(masked.ipAdapter, [`${at('plain.safetensors')}:0.7,1.2`]);
  t.same(masked.ipAdapterMask, [at('disc.png'), pictureFile(2, 60, 80)]);
});

/** What is drawn by the picture in two steps. */
async function draw(adapter: string, ...argv: string[]) {
  const output = at('drawn.png');
  const by = ['--ip-adapter', adapter, '--ip-adapter-image', seen, '--steps', '2', '--seed', '1'];
  const { status, err } = await sample(...size, ...by, '--output', output, ...argv);
  return { status, err, data: status === 0 ? (await readPicture(output)).data : new Uint8Array() };
}

test('a refiner goes on alone, and folders and the hub have what belongs together', async (t) => {
  const parts = [`${at('plain.safetensors')}:up=1`, '--ip-adapter-mask', seen] as const;
  const refined = await draw(...parts, '--refiner', refiner, '--denoising-end', '0.5');
  t.equal(refined.status, 0, refined.err);
  const want = { plain: await draw(at('plain.safetensors')), plus: await draw(at('plus.safetensors')) };
  t.ok(maxDifference(want.plain.data, want.plus.data) > 1);

  // As in h94/IP-Adapter: another encoder beside the adapters than the one that "plus" was made with.
  const commit = '0123456789abcdef0123456789abcdef01234567';
  const repo = at(join('hub', 'models--h94--IP-Adapter'));
  const snapshot = join(repo, 'snapshots', commit);
  mkdirSync(join(repo, 'refs'), { recursive: true });
  writeFileSync(join(repo, 'refs', 'main'), commit);
  cpSync(at('image_encoder'), join(snapshot, 'models', 'image_encoder'), { recursive: true });
  writeEncoder(join(snapshot, 'sdxl_models', 'image_encoder'), { ...encoderConfig, hidden_size: 24 });
  const file = join(snapshot, 'sdxl_models', 'ip-adapter-plus_sdxl.safetensors');
  cpSync(at('plus.safetensors'), file);
  const same = async (adapter: string) => {
    const { status, err, data } = await draw(adapter);
    t.equal(status, 0, err);
    t.equal(maxDifference(data, want.plus.data), 0, adapter);
  };
  await same(file);
  await same(snapshot);
  const before = { ...process.env };
  Object.assign(process.env, { HF_HUB_CACHE: at('hub'), HF_HUB_OFFLINE: '1' });
  t.teardown(() => Object.assign(process.env, { HF_HUB_CACHE: '', HF_HUB_OFFLINE: '0' }, before));
  await same('h94/IP-Adapter');
  await same('h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl.safetensors');
  t.match(
    (await draw('h94/IP-Adapter/sdxl_models/other.safetensors')).err,
    /h94\/IP-Adapter is not \(wholly\) in/,
  );
  t.match(
    (await draw('h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.bin:0.5')).err,
    /ip-adapter_sdxl\.bin is a pickle, .* give h94\/IP-Adapter\/sdxl_models\/ip-adapter_sdxl\.safetensors,/,
  );
  cpSync(file, join(snapshot, 'sdxl_models', 'ip-adapter_sdxl.safetensors'));
  for (const several of [snapshot, 'h94/IP-Adapter'])
    t.match(
      (await draw(several)).err,
      /has several IP-Adapters: give one of them, .*\/sdxl_models\/ip-adapter_sdxl\.safetensors/,
    );
});

test('inspect', async (t) => {
  const about = async (path: string) => {
    const { status, out, err } = await sdxl('inspect', path);
    return { status, told: out + err };
  };
  for (const [path, says, wanted] of [
    [
      at('plain.safetensors'),
      /IP-Adapter: an embedding of width 40 as 4 tokens of width 80, for 17 layers/,
      0,
    ],
    [at('plus.safetensors'), /IP-Adapter plus: hidden states of width 48 as 6 tokens of width 80, for 17/, 0],
    [at('image_encoder'), /CLIPVisionModelWithProjection/, 0],
    [
      withShape('misshapen', 'ip_adapter.5.to_v_ip.weight'),
      /misshapen ip_adapter\.5\.to_v_ip\.weight is \[\d+\]/,
      2,
    ],
    [withShape('torn', 'image_proj.norm.weight', true), /torn.* has no tensor image_proj\.norm\.weight/, 2],
  ] as const) {
    const { status, told } = await about(path);
    t.match(told, says);
    t.equal(status, wanted, told);
  }
});

/** The plain adapter with a tensor flat, or without it. */
function withShape(name: string, key: string, absent = false): string {
  const file = openSafetensors(at('plain.safetensors'));
  const entries = [...file.tensors.values()].map((info) => ({
    ...{ name: info.name, dtype: info.dtype, bytes: file.read(info.name) },
    shape: info.name === key ? [info.shape.reduce((a, b) => a * b, 1)] : info.shape,
  }));
  file.close();
  const path = at(`${name}.safetensors`);
  writeSafetensors(
    path,
    entries.filter((each) => !absent || each.name !== key),
  );
  return path;
}

test('mistakes', async (t) => {
  const [output, plain] = [at('none.png'), ['--ip-adapter', at('plain.safetensors')]];
  for (const name of ['empty', 'alone', 'pickled']) mkdirSync(at(name));
  cpSync(at('plain.safetensors'), join(at('alone'), 'plain.safetensors'));
  writeFileSync(join(at('pickled'), 'ip-adapter_sdxl.bin'), '');
  const by = (...argv: string[]) => [...argv, '--ip-adapter-image', seen];
  const scaled = (scale: string) => by('--ip-adapter', `${at('plain.safetensors')}:${scale}`);
  const cases: [argv: string[], says: RegExp][] = [
    [plain, /there are 1 of --ip-adapter and 0 of --ip-adapter-image: give a picture to each/],
    [
      by(...plain, '--ip-adapter-mask', seen, '--ip-adapter-mask', seen),
      /there are 1 of --ip-adapter-image and 2 of --ip-adapter-mask: give a mask to each picture, in their order/,
    ],
    [by(...plain, '--ip-adapter-mask', at('absent.png')), /absent\.png does not exist/],
    [scaled('0.7,'), /--ip-adapter FILE:SCALE takes a number, not ""/],
    [
      scaled('0.7,1.2'),
      /has a number for each picture, which masks alone keep apart: give .*--ip-adapter-mask/,
    ],
    [scaled('up.block_0=0,x'), /--ip-adapter FILE:up\.block_0 takes a number, not "x"/],
    [scaled('up.block_0='), /--ip-adapter FILE:up\.block_0 takes a number, not ""/],
    [scaled('up.block_0.1=1'), /takes a BLOCK such as mid, up or up\.block_0, not "up\.block_0\.1"/],
    [scaled('up=1:up.block_0=0'), /FILE:up=1:up\.block_0=0 says up\.block_0 twice; give it once/],
    [scaled('0.6:mid=1'), /has a scale beside those of blocks: leave it out, as what is not named counts 0/],
    [scaled('mid=1:mid=0'), /says mid twice/],
    [
      scaled('up.block_2=1'),
      /names up\.block_2, and this UNet attends to the prompt in .*; did you mean "up\.block_0"/,
    ],
    [scaled('up.block_0=0,1'), /of up\.block_0 has 2 scales for 3 transformers/],
    [by(), /there are 0 of --ip-adapter and 1 of --ip-adapter-image/],
    [[...plain, '--ip-adapter-image', at('absent.png')], /absent\.png does not exist/],
    [by('--ip-adapter', `${at('plain.safetensors')}:1.2.3`), /--ip-adapter .*takes a number, not "1\.2\.3"/],
    [
      by('--ip-adapter', at('absent.safetensors')),
      /no IP-Adapter at .*absent\.safetensors; give an IP-Adapter's/,
    ],
    [by('--ip-adapter', at('empty')), /empty has no IP-Adapter; give/],
    [
      by('--ip-adapter', at('pickled')),
      /ip-adapter_sdxl\.bin is a pickle, .*give .*ip-adapter_sdxl\.safetensors/,
    ],
    [
      by('--ip-adapter', join(at('alone'), 'plain.safetensors')),
      /plain\.safetensors has no image_encoder beside it: put/,
    ],
    [by('--ip-adapter', seen), /1-117-149\.png .*safetensors/],
    [
      ['--lora', at('plain.safetensors')],
      /plain\.safetensors is an IP-Adapter, .* as --ip-adapter .*plain\.safetensors/,
    ],
    [by(...plain, '--model', refiner), /tiny-sdxl-refiner is a refiner, for which there are no IP-Adapters/],
  ];
  await refusesEach(t, (...argv) => sample(...size, ...argv, '--output', output), cases);
  t.notOk(existsSync(output));
});
