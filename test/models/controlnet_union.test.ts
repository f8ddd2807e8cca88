// ControlNets for many kinds of pictures against diffusers (golden/controlnet_union.jsonl): whole calls, in a program and by
// `sdxl sample`; that one given twice is loaded once; and what is refused.
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { preprocess, preprocessControl } from '../../io/image.ts';
import { type Json, openModel } from '../../models/checkpoint/checkpoint.ts';
import { controlnetUnion, parseControlNetUnionConfig } from '../../models/control/controlnet_union.ts';
import { inspect } from '../../models/inspect.ts';
import { locateControlNet } from '../../models/locate/locate.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import {
  picture,
  pictureIn,
  unionArchitecture,
  writeControlNet,
  writeControlNetUnion,
} from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { hubOf } from '../support/small_hub.ts';

type Of = [seed: number, width: number, height: number];
interface Call {
  call: string;
  kind: 'text2img' | 'img2img';
  seed: number;
  nets: [name: string, controls: [of: Of, mode: number][]][];
  settings: Asked & { prompt: string; width: number; height: number };
  atol: number;
  values: string;
}
const calls = goldenLines<Call | typeof unionArchitecture>('controlnet_union').filter(
  (line): line is Call => 'call' in line,
);
const { config, keys } = unionArchitecture;
const valuesOf = ({ values }: Call) => new Float32Array(new Uint8Array(Buffer.from(values, 'base64')).buffer);

const folder = mkdtempSync(join(tmpdir(), 'sdxl-controlnet-union-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const model = join(goldenFolder, 'tiny-sdxl');

const writeUnion = (name: string, json?: Json, into = name): string =>
  writeControlNetUnion(at(into), name, json);
for (const name of ['union', 'other']) writeUnion(name);
writeControlNet(at('plain'), 'full');

const controlsOf = ({ nets }: Call) =>
  nets.flatMap(([name, controls]) => controls.map(([of, mode]) => ({ name, of, mode })));

/** Diffusers has a scale and a part of the steps for each net, and so for each of its pictures. */
async function drawn(c: Call, device: Device): Promise<Float32Array> {
  const controls = controlsOf(c);
  const sources = await Promise.all(controls.map(({ name }) => locateControlNet(at(name))));
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32', controlnet: sources });
  const { latents } = await denoiseToEnd(pipeline, {
    ...c.settings,
    control_image: controls.map(({ of }) => preprocessControl(picture(...of), 64, 64)),
    control_mode: controls.map(({ mode }) => mode),
    image: c.kind === 'img2img' ? preprocess(picture(4, 64, 64)) : undefined,
    generators: [new TorchGenerator(c.seed)],
  });
  pipeline.release();
  return latents.data;
}

test("diffusers' keys", (t) => {
  const own = namedParameters(controlnetUnion(parseControlNetUnionConfig(config, 'config.json')));
  const shapes = Object.fromEntries([...own].map(([key, { shape }]) => [key, shape]));
  t.same(shapes, keys);
  t.end();
});

for (const device of devices) {
  test(`whole calls on ${device.name}`, { timeout: 300_000 }, async (t) => {
    const before = device.memory.storages;
    const some = calls.filter(({ call }) => device.name !== 'reference' || call === 'no_guidance');
    for (const c of nonEmpty(some))
      allClose(t, c.call, await drawn(c, device), valuesOf(c), { atol: c.atol, rtol: 0 });
    t.equal(device.memory.storages, before, 'live tensors');
  });
}

const pictureFile = (of: Of): string => pictureIn(folder, ...of);
const sample = (...argv: string[]) =>
  sdxl(
    'sample',
    '--model',
    model,
    '--prompt',
    'a red fox in the snow',
    '--width',
    '64',
    '--height',
    '64',
    '--quiet',
    ...argv,
  );

async function sampled(t: Test, id: string, ...argv: string[]): Promise<Float32Array> {
  const saved = at(`${id}.safetensors`);
  const { status, err } = await sample(...argv, '--output', at(`${id}.png`), '--save-latents', saved);
  t.equal(status, 0, `${id} ${err}`);
  return savedLatents(saved);
}

test('by flags, and the settings in the picture', async (t) => {
  const c = calls.find(({ call }) => call === 'two_controls') as Call;
  const scales = c.settings.controlnet_conditioning_scale as number[];
  const flags = controlsOf(c).flatMap(({ name, of, mode }, i) => [
    ...['--controlnet', `${at(name)}:${scales[i]}`, '--control-image', pictureFile(of)],
    ...['--control-mode', ['openpose', '', '', '', 'normal'][mode]],
  ]);
  const rest = ['--negative-prompt', 'rain', '--seed', `${c.seed}`, '--steps', '4'];
  const latents = await sampled(t, 'flags', ...flags, ...rest);
  allClose(t, c.call, latents, valuesOf(c), { atol: c.atol, rtol: 0 });
  const again = at('again.png');
  t.equal((await sdxl('sample', '--from', at('flags.png'), '--output', again, '--quiet')).status, 0);
  t.ok(readFileSync(again).equals(readFileSync(at('flags.png'))), 'the same picture and settings');
});

test('as its author published it, and in 8-bit integers', async (t) => {
  const { num_control_type, ...less } = config;
  const path = writeUnion(
    'union',
    { ...less, _class_name: 'ControlNetModel', num_control_type: 3 },
    'published',
  );
  const flags = [
    '--control-image',
    pictureFile([1, 64, 64]),
    '--control-mode',
    '4',
    '--steps',
    '2',
    '--seed',
    '1',
  ];
  const [own, published, q8] = [
    await sampled(t, 'own', ...flags, '--controlnet', at('union')),
    await sampled(t, 'published', ...flags, '--controlnet', path),
    await sampled(t, 'q8', ...flags, '--controlnet', at('union'), '--q8'),
  ];
  t.equal(maxDifference(own, published), 0, `the weights tell that there are ${num_control_type} kinds`);
  t.match(inspect(path), { kind: 'diffusers component: ControlNetUnionModel', problems: [] });
  const alone = join(path, 'diffusion_pytorch_model.safetensors');
  t.match(inspect(alone).kind, /^ControlNet weights under diffusers' keys/);
  const off = maxDifference(own, q8);
  t.ok(off > 0 && off < 1, `${off} off in 8 bits`);
});

test('another file of its repository on the hub, which tells of more kinds than the config beside it', async (t) => {
  const repo = t.testdir({ repo: {} });
  const promax = 'diffusion_pytorch_model_promax.safetensors';
  copyFileSync(join(at('union'), 'diffusion_pytorch_model.safetensors'), join(repo, 'repo', promax));
  writeFileSync(join(repo, 'repo', 'config.json'), JSON.stringify({ ...config, num_control_type: 3 }));
  const asked = await hubOf(t, repo);
  const source = await locateControlNet(`xinsir/union/${promax}`);
  t.same(asked.sort(), ['config.json', promax]);
  t.equal(source.config('controlnet').num_control_type, config.num_control_type);
});

test('one of one kind, given twice, is loaded once and follows each picture', async (t) => {
  const device = openDevice('cpu');
  const source = await locateControlNet(at('plain'));
  const copy = await locateControlNet(writeControlNet(at('copy'), 'full'));
  const draw = async (sources: readonly (typeof source)[]) => {
    const before = device.memory.live;
    const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32', controlnet: sources });
    const bytes = device.memory.live - before;
    const { latents } = await denoiseToEnd(pipeline, {
      ...{
        prompt: 'a fox',
        width: 64,
        height: 64,
        num_inference_steps: 2,
        generators: [new TorchGenerator(1)],
      },
      control_image: [1, 2].map((seed) => preprocessControl(picture(seed, 64, 64), 64, 64)),
    });
    pipeline.release();
    return { bytes, latents: latents.data };
  };
  const [once, twice] = [await draw([source, source]), await draw([source, copy])];
  t.ok(once.bytes < twice.bytes, 'less memory than two');
  t.equal(maxDifference(once.latents, twice.latents), 0, 'the same picture');
});

test('beside those of one kind, which have no mode', async (t) => {
  const given = (name: string, i: number) => [
    ...['--controlnet', at(name), '--control-image', pictureFile([i, 64, 64])],
  ];
  const rest = ['--steps', '2', '--seed', '1'];
  const drawn =
    (id: string, ...names: string[]) =>
    (...modes: string[]) =>
      sampled(t, id, ...names.flatMap(given), ...modes.flatMap((mode) => ['--control-mode', mode]), ...rest);
  const mixed = drawn('mixed', 'plain', 'union');
  const [depth, normal] = [await mixed('depth'), await mixed('normal')];
  t.ok(maxDifference(depth, normal) > 1e-3, 'its mode counts');
  const device = openDevice('cpu');
  const sources = await Promise.all(['plain', 'union'].map((name) => locateControlNet(at(name))));
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32', controlnet: sources });
  const { latents } = await denoiseToEnd(pipeline, {
    ...{ prompt: 'a red fox in the snow', width: 64, height: 64, num_inference_steps: 2 },
    control_image: [0, 1].map((seed) => preprocessControl(picture(seed, 64, 64), 64, 64)),
    control_mode: [undefined, 1],
    generators: [new TorchGenerator(1)],
  });
  pipeline.release();
  t.equal(maxDifference(depth, latents.data), 0, 'it is that of the union');
  const two = drawn('two', 'union', 'plain', 'other');
  const [same, others] = [await two('depth'), await two('depth', 'normal')];
  t.equal(maxDifference(same, await two('depth', 'depth')), 0, 'once for all unions');
  t.ok(maxDifference(same, others) > 1e-3, 'once for each');
  const again = at('mixed-again.png');
  t.equal((await sdxl('sample', '--from', at('two.png'), '--output', again, '--quiet')).status, 0);
  t.ok(readFileSync(again).equals(readFileSync(at('two.png'))), 'the settings are in the picture');
});

test('mistakes', async (t) => {
  const shown = (path: string, ...argv: string[]) => [
    ...['--controlnet', at(path), '--control-image', pictureFile([1, 64, 64])],
    ...argv,
  ];
  await refusesEach(t, sample, [
    [
      shown('union'),
      /no control_mode \(--control-mode\) for a ControlNet union: .* 0 openpose, .*5 segment$/m,
    ],
    [
      shown('union', '--control-mode', 'tile'),
      /control_mode 6 for a ControlNet union: say what its picture is/,
    ],
    [
      shown('union', '--control-mode', 'cany'),
      /--control-mode takes a number from 0 to 7 or .*; did you mean "?canny/,
    ],
    [shown('plain', '--control-mode', '1'), /control_mode is 1 for a ControlNet of one kind/],
    [
      [...shown('plain'), ...shown('union'), ...shown('plain'), '--control-mode', '1', '--control-mode', '2'],
      /control_mode has 2 numbers for 3 ControlNets, of which 1 are unions: give one, or one to each union/,
    ],
    [['--control-mode', '1'], /--control-mode needs --controlnet/],
  ]);
});
