// The second pass over a picture enlarged: torch's interpolate, and passes as A1111 makes them over diffusers' latents
// (golden/hires.jsonl); pictures that give their settings back; enlarged pixels; mistakes.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { hiresSize, shownOf } from '../../cli/sample/hires_options.ts';
import { openDevice } from '../../engine/device.ts';
import { writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { type Interpolation, interpolate } from '../../models/vae/interpolate.ts';
import { middleOf } from '../../models/vae/latents.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { picture, writeControlNet } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';

/** What a second pass may be told otherwise, and what its picture then says. */
const own = { prompt: 'a blue hare, in snow', negative_prompt: 'fog', guidance_scale: 3 };
const ownFlags = [
  ...['--hires-prompt', own.prompt, '--hires-negative-prompt', own.negative_prompt],
  ...['--hires-guidance-scale', `${own.guidance_scale}`],
];
const ownText = 'Hires prompt: "a blue hare, in snow", Hires negative prompt: fog, Hires CFG Scale: 3, ';

type Line = Interpolation & { values: string; shape: number[] } & (
    | { kind: 'interpolate'; size: [number, number] }
    | ({ kind: 'passes'; prompt: string; atol: number; again?: typeof own } & Record<
        'seed' | 'size' | 'larger' | 'steps' | 'hires_steps' | 'strength',
        number
      >)
  );
const golden = goldenLines<Line>('hires');
const valuesOf = ({ values }: Line) => new Float32Array(new Uint8Array(Buffer.from(values, 'base64')).buffer);

const folder = mkdtempSync(join(tmpdir(), 'sdxl-hires-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const sample = (...argv: string[]) =>
  sdxl('sample', '--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a red fox', '--quiet', ...argv);

test("torch's interpolate", (t) => {
  for (const line of golden) {
    if (line.kind !== 'interpolate') continue;
    const { shape, size, mode, antialias } = line;
    const count = shape.reduce((a, b) => a * b, 1);
    const data = Float32Array.from({ length: count }, (_, i) => Math.sin(i * 1.7));
    const made = interpolate({ shape, data }, size, { mode, antialias });
    t.same(made.shape, [...shape.slice(0, 2), ...size]);
    const label = `${shape} to ${size}, ${mode}${antialias ? ', antialiased' : ''}`;
    allClose(t, label, made.data, valuesOf(line), { atol: 1e-6, rtol: 0 });
  }
  t.end();
});

const upscalerOf = ({ mode, antialias }: Interpolation): string => {
  const words = [mode === 'bilinear' ? '' : mode, antialias ? 'antialiased' : ''].filter(
    (word) => word !== '',
  );
  return words.length > 0 ? `Latent (${words.join(' ')})` : 'Latent';
};

test('passes as A1111 makes them, and the settings in the picture', async (t) => {
  for (const line of golden) {
    if (line.kind !== 'passes') continue;
    const [output, saved] = [at(`${line.seed}.png`), at(`${line.seed}.safetensors`)];
    const { status, err, out } = await sample(
      ...[
        '--negative-prompt',
        'rain',
        '--seed',
        `${line.seed}`,
        '--width',
        `${line.size}`,
        '--height',
        `${line.size}`,
      ],
      ...['--steps', `${line.steps}`, '--hires', '--hires-steps', `${line.hires_steps}`],
      ...['--hires-width', `${line.larger}`, '--hires-denoising-strength', `${line.strength}`],
      ...['--hires-upscaler', upscalerOf(line), '--json', '--output', output, '--save-latents', saved],
      ...(line.again ? ownFlags : []),
    );
    t.same(line.again ?? own, own);
    t.equal(status, 0, err);
    allClose(t, upscalerOf(line), savedLatents(saved), valuesOf(line), { atol: line.atol, rtol: 0 });
    t.match(JSON.parse(out), { width: line.larger, height: line.larger });
    const text = readPngText(output);
    t.match(
      text.parameters,
      `Size: ${line.size}x${line.size}, Denoising strength: ${line.strength}, ${line.again ? ownText : ''}Hires resize: ${line.larger}x0, ` +
        `Hires steps: ${line.hires_steps}, Hires upscaler: ${upscalerOf(line)}, RNG: CPU`,
    );
    const again = at('again.png');
    t.equal((await sdxl('sample', '--from', output, '--output', again, '--quiet')).status, 0, '--from');
    t.ok(readFileSync(again).equals(readFileSync(output)), 'the same file');
  }
});

test('a second pass by a sampler of its own is image to image by that', async (t) => {
  const [output, saved, again] = [at('own.png'), at('own.safetensors'), at('again.png')];
  const asked = { prompt: 'a red fox', width: 64, height: 64, num_inference_steps: 3 };
  const { status, err } = await sample(
    ...[
      '--width',
      '64',
      '--height',
      '64',
      '--steps',
      '3',
      '--seed',
      '8',
      '--scheduler',
      'DPM++ 2M',
      '--karras',
    ],
    ...[
      '--hires',
      '--hires-scale',
      '1',
      '--hires-denoising-strength',
      '0.5',
      '--hires-scheduler',
      'Heun SGM Uniform',
    ],
    ...['--hires-timestep-spacing', 'linspace', '--output', output, '--save-latents', saved],
  );
  t.equal(status, 0, err);
  const device = openDevice('cpu');
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  t.teardown(() => pipeline.release());
  const noise = () => [new TorchGenerator(8)];
  const first = await denoiseToEnd(pipeline, {
    ...{ ...asked, scheduler: { name: 'dpm++2m_karras' }, generators: noise() },
  });
  const second = await denoiseToEnd(pipeline, {
    ...{ ...asked, image: first.latents, generators: noise(), num_inference_steps: 6, strength: 3.5 / 6 },
    scheduler: { name: 'heun_sgm_uniform', config: { timestep_spacing: 'linspace' } },
  });
  t.equal(maxDifference(savedLatents(saved), second.latents.data), 0);
  const text = readPngText(output);
  t.match(
    text.parameters,
    /Sampler: DPM\+\+ 2M, Schedule type: Karras, .* Hires sampler: Heun, Hires schedule type: SGM Uniform, /,
  );
  t.equal((await sdxl('sample', '--from', output, '--output', again, '--quiet')).status, 0, '--from');
  t.ok(readFileSync(again).equals(readFileSync(output)), 'the same file');
});

test('each of several pictures has its own second pass', async (t) => {
  const say = ['--width', '64', '--height', '64', '--steps', '2', '--hires', '--hires-scale', '1.5'];
  const drawn = async (name: string, ...more: string[]) => {
    const saved = at(`${name}.safetensors`);
    const { status, err } = await sample(
      ...say,
      ...more,
      '--output',
      at(`${name}.png`),
      '--save-latents',
      saved,
    );
    t.equal(status, 0, `${name} ${err}`);
    return savedLatents(saved);
  };
  for (const upscaler of ['Latent', 'Lanczos', 'Nearest']) {
    const both = await drawn('both', '--seed', '4', '--batch-count', '2', '--hires-upscaler', upscaler);
    const [one, two] = [
      await drawn('one', '--seed', '4', '--hires-upscaler', upscaler),
      await drawn('two', '--seed', '5', '--hires-upscaler', upscaler),
    ];
    t.equal(maxDifference(both, [...one, ...two]), 0, upscaler);
    t.equal(one.length, 4 * 12 * 12, 'half as large again');
    const at_once = await drawn('at_once', '--seed', '4', '--num-images', '2', '--hires-upscaler', upscaler);
    t.equal(at_once.length, 2 * one.length, 'two of one seed');
  }
  const [latent, lanczos] = [
    await drawn('latent', '--seed', '4'),
    await drawn('lanczos', '--seed', '4', '--hires-upscaler', 'Lanczos'),
  ];
  t.ok(maxDifference(latent, lanczos) > 0.1, 'pixels enlarged are others than latents');
  const unguided = ['--seed', '4', '--hires-guidance-scale', '1'];
  const [plain, dry] = [await drawn('plain', ...unguided), await drawn('dry', ...unguided, '-n', 'rain')];
  t.ok(maxDifference(plain, dry) > 0, 'a negative prompt counts in the first pass, if not in the second');
});

test('ControlNets are followed as in the first pass', async (t) => {
  const net = writeControlNet(at('net'), 'full');
  writePng(at('control.png'), picture(1, 64, 64));
  const drawn = async (scale: string) => {
    const argv = [
      '--width',
      '64',
      '--height',
      '64',
      '--steps',
      '2',
      '--seed',
      '1',
      '--hires',
      '--hires-scale',
      '1',
    ];
    const controlled = ['--controlnet', `${net}${scale}`, '--control-image', at('control.png')];
    const saved = at('controlled.safetensors');
    const { status, err } = await sample(
      ...[...argv, ...controlled, '--output', at('controlled.png'), '--save-latents', saved],
    );
    t.equal(status, 0, err);
    return savedLatents(saved);
  };
  const [plain, one, less] = [await drawn(''), await drawn(':1'), await drawn(':0.8')];
  t.equal(maxDifference(plain, one), 0, 'by 1, and not by the 0.8 of pictures that are drawn over');
  t.ok(maxDifference(plain, less) > 1e-3, 'which would show');
});

test('how large it is', (t) => {
  const sizes = (width: number, height: number, options: object) =>
    hiresSize({ hires: true, ...options }, { width, height }, 8);
  t.match(sizes(832, 1216, {}), { width: 1664, height: 2432 });
  t.match(sizes(832, 1216, { hiresHeight: 1824 }), { width: 1248, height: 1824 });
  t.match(sizes(832, 1216, { hiresWidth: 1000 }), { width: 1000, height: 1456 }, 'cut to whole latents');
  // No square of which a side was asked for may come out another shape, as 832 * (960 / 832) is below 960.
  for (let from = 64; from <= 1536; from += 8)
    for (let to = from; to <= 2048; to += 8) {
      const both = { width: to, height: to };
      for (const options of [{ hiresWidth: to }, { hiresHeight: to }]) {
        const found = sizes(from, from, options);
        if (found?.width !== to || found?.height !== to) t.same(found, both, `${from} to ${to}`);
      }
    }
  t.end();
});

/** A1111's hr_upscale_to_x and _y, and the first row and column that its truncate_y and _x leave, by hand from its formulas. */
const cuts = [
  { from: [832, 1216], to: [1024, 1024], uncut: [1024, 1496], first: [0, 29] }, // 1024 * 1216 // 832; 187 rows, of which (1496 - 1024) // 8 = 59 go
  { from: [1216, 832], to: [1024, 1024], uncut: [1496, 1024], first: [29, 0] },
  { from: [1024, 1024], to: [1536, 1152], uncut: [1536, 1536], first: [0, 24] },
  { from: [896, 1152], to: [1344, 1728], uncut: [1344, 1728], first: [0, 0] },
  { from: [64, 72], to: [96, 96], uncut: [96, 108], first: [0, 0] }, // 13 rows, of which the last goes
];

test('to another shape it is cut as by A1111', (t) => {
  for (const { from, to, uncut, first } of cuts) {
    const [[width, height], [hiresWidth, hiresHeight], [w, h]] = [from, to, uncut];
    const larger = hiresSize({ hires: true, hiresWidth, hiresHeight }, { width, height }, 8);
    t.same(larger, { width: hiresWidth, height: hiresHeight, uncut: { width: w, height: h } }, `${from}`);
    const [rows, columns] = [Math.floor(h / 8), Math.floor(w / 8)];
    const places = Float32Array.from({ length: rows * columns }, (_, i) => i);
    const cut = middleOf({ shape: [1, 1, rows, columns], data: places }, [hiresHeight / 8, hiresWidth / 8]);
    t.same(cut.shape, [1, 1, hiresHeight / 8, hiresWidth / 8]);
    const [x, y] = first;
    const last = (y + hiresHeight / 8 - 1) * columns + x + hiresWidth / 8 - 1;
    t.same([cut.data[0], cut.data.at(-1)], [y * columns + x, last]);
  }
  const third = { width: 64, height: 32, uncut: { width: 64, height: 96 } };
  const lines = Uint8Array.from({ length: 2 * 30 }, (_, i) => Math.floor(i / 2));
  const shown = shownOf({ width: 2, height: 30, channels: 1, data: lines }, third);
  t.same([...shown.data], [...lines.subarray(20, 40)], 'and so is what is followed');
  t.end();
});

test('a second pass of another shape is drawn over the middle', async (t) => {
  const sides = ['--width', '64', '--height', '64', '--steps', '2', '--seed', '8', '--hires'];
  const strength = ['--hires-denoising-strength', '0.5'];
  const saved = at('wide.safetensors');
  const drawn = (...argv: string[]) =>
    sample(...sides, ...strength, ...argv, '--output', at('wide.png'), '--save-latents', saved, '--json');
  const wide = await drawn(
    '--hires-width',
    '128',
    '--hires-height',
    '96',
    '--hires-upscaler',
    'Latent (nearest)',
  );
  t.match(JSON.parse(wide.out), { width: 128, height: 96 }, wide.err);
  const device = openDevice('cpu');
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  t.teardown(() => pipeline.release());
  const asked = { prompt: 'a red fox', width: 64, height: 64, num_inference_steps: 2 };
  const noise = () => [new TorchGenerator(8)];
  const { latents } = await denoiseToEnd(pipeline, { ...asked, generators: noise() });
  // Each latent is 2x2, and of 16 rows two go at the top and two at the bottom.
  const data = Float32Array.from({ length: 4 * 12 * 16 }, (_, i) => {
    const [plane, y, x] = [Math.floor(i / 192), Math.floor(i / 16) % 12, i % 16];
    return latents.data[plane * 64 + Math.floor((y + 2) / 2) * 8 + Math.floor(x / 2)];
  });
  const second = await denoiseToEnd(pipeline, {
    ...{ ...asked, width: 128, height: 96, image: { shape: [1, 4, 12, 16], data }, generators: noise() },
    ...{ num_inference_steps: 4, strength: 2.5 / 4 },
  });
  t.equal(maxDifference(savedLatents(saved), second.latents.data), 0);
  for (const upscaler of ['Nearest', 'Lanczos']) {
    const { out, err } = await sample(
      ...['--width', '64', '--height', '72', '--steps', '1', '--hires', '--hires-width', '96'],
      ...['--hires-height', '96', '--hires-upscaler', upscaler, '--output', at('odd.png'), '--json'],
    );
    t.match(JSON.parse(out || '{}'), { width: 96, height: 96 }, `${upscaler} ${err}`);
  }
});

test('a size that is typed beside --from stands for the one in the picture', async (t) => {
  const from = async (first: readonly string[], typed: readonly string[]) => {
    const made = await sample(
      ...['--width', '64', '--height', '64', '--steps', '1', '--hires', ...first],
      ...['--output', at('first.png')],
    );
    t.equal(made.status, 0, made.err);
    const argv = ['--from', at('first.png'), ...typed, '--output', at('second.png'), '--json', '--quiet'];
    const { status, out, err } = await sdxl('sample', ...argv);
    t.equal(status, 0, err);
    return JSON.parse(out) as unknown;
  };
  t.match(await from(['--hires-scale', '2'], ['--hires-width', '80']), { width: 80, height: 80 });
  t.match(
    await from(['--hires-width', '96', '--hires-height', '72'], ['--hires-scale', '1.5']),
    { width: 96, height: 96 },
    'both sides give way',
  );
});

test('mistakes', (t) =>
  refusesEach(t, sample, [
    [['--hires-scale', '2'], /--hires-scale needs --hires: a second pass/],
    [['--hires-prompt', 'x'], /--hires-prompt needs --hires: a second pass/],
    [['--hires', '--hires-scale', '2', '--hires-width', '128'], /--hires-scale says how large, and so do/],
    [
      ['--width', '64', '--height', '512', '--hires', '--hires-width', '512', '--hires-height', '128'],
      /--hires-width and --hires-height would leave less than a quarter of a picture of 64x512, enlarged to 512x4096/,
    ],
    [['--hires', '--hires-upscaler', 'Latnt'], /--hires-upscaler takes Latent, .*; did you mean "?Latent/],
    [
      ['--hires', '--hires-denoising-strength', '0'],
      /--hires-denoising-strength takes a number from 0.01 to 1/,
    ],
    [
      ['--hires', '--hires-steps', '20', '--hires-denoising-strength', '0.01'],
      /at --hires-denoising-strength 0\.01 the 20 --hires-steps are of a schedule of 2000, and .* from 1 to 1000/,
    ],
    [
      ['--hires', '--steps', '8', '--hires-denoising-strength', '0.1', '--scheduler', 'lcm'],
      /at --hires-denoising-strength 0\.1 the 8 --hires-steps are of a schedule of 80, and .* more than the 50/,
    ],
    [['--hires-scheduler', 'euler'], /--hires-scheduler needs --hires: a second pass/],
    [['--hires', '--hires-timestep-spacing', 'trailing'], /--hires-timestep-spacing needs --hires-scheduler/],
    [['--hires', '--hires-scheduler', 'eular'], /unknown scheduler "eular".*euler/],
    [['--hires', '--hires-scheduler', 'edm_euler'], /^error: EDMEulerScheduler draws with models that were/],
    [['--hires', '--image', 'x.png'], /--hires draws from a prompt alone: over a picture give a larger/],
    [['--hires', '--refiner', 'x'], /--hires draws from a prompt alone: leave out --refiner/],
    [['--hires', '--sigmas', '3,0'], /--hires draws from a prompt alone: give --steps in place of --sigmas/],
  ]));
