// The command line in process: a good run gives diffusers' picture; each mistake gives one sentence, status 2, no file.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { test } from 'tap';
import { progressBar } from '../../cli/progress.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import { packageRoot } from '../../io/package_root.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { sdxl as run } from '../support/command_line.ts';
import { goldenFolder, goldenLora, goldenSingleFile } from '../support/golden.ts';
import { runFile } from '../support/run_files.ts';

const model = join(goldenFolder, 'tiny-sdxl');
const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
const lora = goldenLora('lora/scaled_kohya.safetensors');

const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-cli-'));

test('progress tells a speed only when it knows one', async (t) => {
  const lines: string[] = [];
  const terminal = { live: false, out: () => {}, err: (text: string) => void lines.push(text) };
  const bar = progressBar(terminal, 'encoding pictures', false);
  bar.update(512, 1591);
  await new Promise((done) => setTimeout(done, 200));
  bar.update(1591, 1591, 'loss 0.5');
  t.equal(lines[0], 'encoding pictures 512/1591\n');
  t.match(lines[1], /^encoding pictures 1591\/1591 {2}loss 0\.5 {2}\d+\.\d it\/s {2}0s left\n$/);
});

test('progress fits into the screen, the time left last of all to go', async (t) => {
  for (const [columns, want] of [
    [200, /^\[#{12}\.{12}\] training 5\/10 {2}loss 1, lr 2, peak 3 GiB {2}\d+\.\d it\/s {2}\ds left$/],
    [72, /^\[#+\.+\] training 5\/10 {2}loss 1, lr 2, peak 3 GiB {2}\d+\.\d it\/s {2}\ds left$/],
    [50, /^training 5\/10 {2}loss 1, lr 2 {2}\d+\.\d it\/s {2}\ds left$/],
    [34, /^training 5\/10 {2}\d+\.\d it\/s {2}\ds left$/],
    [20, /^training 5\/10 {2}\d+\.\d/],
  ] as const) {
    let line = '';
    const terminal = { live: true, columns, out: () => {}, err: (text: string) => void (line = text) };
    const bar = progressBar(terminal, 'training', false);
    bar.update(1, 10);
    await new Promise((done) => setTimeout(done, 120));
    bar.update(5, 10, 'loss 1, lr 2, peak 3 GiB');
    const shown = line.replace('\r\x1b[K', '');
    t.match(shown, want);
    t.ok(shown.length < columns, `${shown.length} letters of ${columns}`);
  }
});

test('mistakes', async (t) => {
  const folder = scratch();
  const damaged = join(folder, 'damaged');
  cpSync(model, damaged, { recursive: true });
  truncateSync(join(damaged, 'unet', 'diffusion_pytorch_model.safetensors'), 100_000);
  const noIndex = join(folder, 'no-index');
  cpSync(join(model, 'vae'), noIndex, { recursive: true });
  const pickle = join(folder, 'model.ckpt');
  writeFileSync(pickle, 'x');
  const picture = join(folder, 'picture.png');
  copyFileSync(join(goldenFolder, 'png', 'input.png'), picture);
  const mask = join(folder, 'mask.png');
  writePng(mask, { width: 8, height: 8, channels: 1, data: new Uint8Array(64) });
  const disguised = join(folder, 'disguised.safetensors');
  writeFileSync(disguised, 'PK\x03\x04 archive/data.pkl and more');
  const inpainting = join(folder, 'inpainting');
  cpSync(model, inpainting, { recursive: true });
  const unetConfig = join(inpainting, 'unet', 'config.json');
  const config = JSON.parse(readFileSync(unetConfig, 'utf8'));
  writeFileSync(unetConfig, JSON.stringify({ ...config, in_channels: 9 }));
  const output = join(folder, 'out', 'x.png');
  const cases: [label: string, argv: string[], says: RegExp][] = [
    ['unknown model path', ['--model', join(folder, 'absent')], /no model at/],
    ['folder without model_index.json', ['--model', noIndex], /model_index\.json/],
    ['truncated weights', ['--model', damaged], /unet.*download it again/],
    ['pickle', ['--model', pickle], /pickle/],
    [
      'pickle of a LoRA',
      ['--model', model, '--lora', pickle],
      /model\.ckpt is a pickle, .* give .*\.safetensors/,
    ],
    ['pickle by another name', ['--model', disguised], /disguised.* is a PyTorch pickle, which can run/],
    ['a whole model that is a LoRA', ['--model', lora], /not an SDXL checkpoint in one file/],
    [
      'an inpainting model',
      ['--model', inpainting, '--image', picture],
      /this UNet takes 9 channels: it is an inpainting model, .* give image and mask \(--image, --mask\), or take a base model/,
    ],
    [
      'a folder without a LoRA',
      ['--model', model, '--lora', folder],
      /holds no LoRA: a folder must have one of/,
    ],
    [
      'no such LoRA',
      ['--model', damaged, '--lora', join(folder, 'absent:0.5')],
      /no LoRA at .*absent; give a/,
    ],
    ['a picture that is no PNG', ['--model', damaged, '--output', join(folder, 'x.jpg')], /ends in \.png/],
    [
      'a start with nothing to go on from',
      ['--model', damaged, '--denoising-start', '0.5'],
      /--refiner or --im/,
    ],
    [
      'Karras where there is none',
      ['--model', damaged, '--scheduler', 'ddim', '--karras'],
      /no Karras sigmas/,
    ],
    ['too many steps for LCM', ['--model', damaged, '--scheduler', 'lcm', '--steps', '51'], /distilled on/],
    [
      'a strength that leaves nothing',
      ['--model', damaged, '--image', picture, '--strength', '0.01'],
      /leave none of the 50 steps/,
    ],
    [
      'the same in the refiner',
      ['--model', damaged, '--refiner', refiner, '--strength', '0.01'],
      /leave none of the 50 steps/,
    ],
    ['words outside of quotes', ['--model', model, 'red', 'heart'], /"red" belongs to no flag.* --prompt/],
    [
      'a UNet for a VAE',
      ['--model', model, '--vae', join(model, 'unet')],
      /holds a UNet2DConditionModel, not SDXL's VAE/,
    ],
    [
      'latents over the picture',
      ['--model', model, '--save-latents', join(folder, 'result.png')],
      /latents are written as safetensors; give a name that ends in \.safetensors/,
    ],
    ['no picture', ['--model', model, '--image', 'nope.png'], /error: --image: nope\.png does not exist/],
    [
      'no prompts',
      ['--model', model, '--prompt-file', 'nope.txt'],
      /--prompt-file: nope\.txt does not exist/,
    ],
    ['unknown VAE', ['--model', model, '--vae', join(folder, 'absent')], /no VAE at/],
    [
      'more pixels than can be decoded whole',
      ['--model', model, '--width', '16384', '--height', '16384'],
      /16384x16384 pixels are more than the VAE can decode whole .*--vae-tiling/,
    ],
    ['width not divisible by 8', ['--model', model, '--width', '100'], /divisible by 8/],
    ['unknown scheduler', ['--model', model, '--scheduler', 'eulr'], /did you mean "euler"/],
    [
      'strength out of range',
      ['--model', model, '--image', picture, '--strength', '1.5'],
      /--strength takes/,
    ],
    ['mask of another size', ['--model', model, '--image', picture, '--mask', mask], /same size/],
    ['mask without image', ['--model', model, '--mask', mask], /--image/],
    ['unknown device', ['--model', model, '--device', 'tpu'], /unknown device/],
    ['clip skip past the encoder', ['--model', model, '--clip-skip', '4'], /at most 3 can be skipped/],
  ];
  const target = join(folder, 'result.png');
  for (const [label, argv, says] of cases) {
    const { status, err } = await run('sample', '--prompt', 'x', '--quiet', '--output', target, ...argv);
    t.equal(status, 2, `${label}: status`);
    t.ok(says.test(err) && err.trim().split('\n').length === 1, `${label}: one sentence: ${err.trim()}`);
    t.notOk(existsSync(target), `${label}: no file`);
  }
  const unwritable = await run('sample', '--model', model, '--prompt', 'x', '--quiet', '--output', output);
  t.equal(unwritable.status, 2, 'unwritable output');
  t.match(
    unwritable.err,
    /--output: .*out does not exist.*create the folder\n$/,
    'unwritable output: one sentence',
  );
  t.equal((await run('sample', '--model', model)).status, 2, 'missing prompt');
  t.equal((await run('sampel')).status, 2, 'unknown command');
  const words = new RegExp(`\\(${join(packageRoot, 'docs', 'coming_from.md')} has other programs' words`);
  t.match((await run('train', '--max_train_steps', '5', 'x.ts')).err, words, 'an unknown option');
  t.notMatch((await run('plan', '--rank', '5', 'x.ts')).err, /coming_from/);
  t.notMatch((await run('train')).err, /coming_from/, 'a missing argument');
  t.notOk(
    readdirSync(folder).some((name) => name.includes('.tmp')),
    'no temporary file is left',
  );
  rmSync(folder, { recursive: true });
});

test('an empty variable of a shell is told of', async (t) => {
  const drawn = ['sample', '--model', model, '--prompt', 'a', '--output', join(scratch(), 'none.png')];
  for (const [argv, sentence] of [
    [[...drawn, '--image', ''], /^error: --image is given nothing: write FILE behind it, or leave it out\n$/],
    [[...drawn, '--unet', ''], /^error: --unet is given nothing: write DIR\|FILE\|HUB_ID behind it/],
    [[...drawn, '--lora', 'a', '--lora', ''], /^error: --lora is given nothing/],
    [['export', model, ''], /^error: OUT is given nothing: write it behind "export"\n$/],
  ] as const) {
    const { status, err } = await run(...argv);
    t.equal(status, 2, argv.join(' '));
    t.match(err, sentence);
  }
});

test('help loads no command: it answers at once', (t) => {
  const seen = new Set<string>();
  const visit = (file: string) => {
    if (seen.has(file)) return;
    seen.add(file);
    const imports = readFileSync(file, 'utf8').matchAll(/^import .*?from ["'](\.[^"']+)["'];/gms);
    for (const [, path] of imports) visit(join(dirname(file), path));
  };
  visit(join(packageRoot, 'dist', 'cli', 'main.js'));
  t.ok(seen.size > 2, [...seen].join(' '));
  t.same(
    [...seen].filter((file) => /dist.(engine.(?!cpu.build)|models|train)/.test(file)),
    [],
  );
  t.end();
});

test('inspect tells what a checkpoint is', async (t) => {
  const about = async (path: string) => JSON.parse((await run('inspect', path, '--json')).out);
  const base = await about(model);
  t.match(base.kind, /StableDiffusionXLPipeline/);
  t.same(
    base.components.map((c: { name: string; parameters: number }) => [c.name, c.parameters]),
    [
      ['text_encoder', 117_344],
      ['text_encoder_2', 214_800],
      ['unet', 714_660],
      ['vae', 391_687],
    ],
  );
  t.same(base.problems, []);
  t.match((await about(join(goldenFolder, 'tiny-sdxl-refiner'))).kind, /refiner/);
  t.match((await about(goldenSingleFile('tiny-sdxl'))).kind, /single file: SDXL base/);
  const adapter = await about(lora);
  t.match(adapter.kind, /kohya/);
  t.same(adapter.lora, { kinds: { LoRA: 136 }, ranks: [4], layers: { lora_unet: 136 } });

  const folder = scratch();
  cpSync(model, folder, { recursive: true });
  rmSync(join(folder, 'vae'), { recursive: true });
  const file = join(folder, 'unet', 'diffusion_pytorch_model.safetensors');
  const unet = openSafetensors(file);
  const kept = [...unet.tensors.values()].slice(1).map(({ name, dtype, shape }) => {
    return { name, dtype, shape, bytes: unet.read(name) };
  });
  unet.close();
  writeSafetensors(file, [...kept, { name: 'stray', dtype: 'uint8', shape: [1], bytes: Uint8Array.of(1) }]);
  const { status, out, err } = await run('inspect', folder, '--json');
  t.equal(status, 2);
  t.match(JSON.parse(out).problems.join(), /vae is named.*missing.*unet: missing .*unexpected stray/);
  t.match(err, /2 more problems/);
  const pickle = join(folder, 'x.ckpt');
  writeFileSync(pickle, Buffer.alloc(100, 0xb6));
  t.match((await run('inspect', pickle)).err, /x\.ckpt is a pickle, which can run code when read/);
  rmSync(folder, { recursive: true });
});

test('an interrupt leaves whole files or none', async (t) => {
  const folder = scratch();
  const output = join(folder, 'x.png');
  const program = join(packageRoot, 'bin', 'sdxl.js');
  const argv = [program, 'sample', '-m', model, '-p', 'x', '--steps', '900', '-o', output];
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'ignore', 'pipe'] });
  child.stderr.once('data', () => child.kill('SIGINT'));
  const [code, signal] = (await once(child, 'close')) as [number | null, string | null];
  t.ok(code === 130 || signal === 'SIGINT', `status ${code}, signal ${signal}: a shell reports 130`);
  t.same(readdirSync(folder), [], 'nothing is left');
  for (const [ending, status] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const) {
    const out = join(folder, `${ending}.safetensors`);
    const exporting = spawn(process.execPath, [program, 'export', model, out, '--format', 'single-file'], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    exporting.stderr.once('data', () => exporting.kill(ending)); // amid the file
    const [left] = (await once(exporting, 'close')) as [number | null];
    t.equal(left, status, `${ending}: as a shell reports it`);
    t.notOk(
      readdirSync(folder).some((name) => name.endsWith('.tmp')),
      `${ending}: nothing half-written`,
    );
  }
  rmSync(folder, { recursive: true });
});

test('a reader who leaves ends nothing, a result that cannot be written is an error and ends nothing either', async (t) => {
  const ended = async (stdout: 'pipe' | number, left?: 'stdout' | 'stderr', argv = ['inspect', model]) => {
    const program = join(packageRoot, 'bin', 'sdxl.js');
    const child = spawn(process.execPath, [program, ...argv], { stdio: ['ignore', stdout, 'pipe'] });
    if (left) child[left]?.destroy();
    let err = '';
    child.stderr?.on('data', (text) => void (err += text));
    const [code] = (await once(child, 'close')) as [number | null];
    return { code, err };
  };
  t.same(await ended('pipe', 'stdout'), { code: 0, err: '' });
  t.same(await ended('pipe', 'stderr'), { code: 0, err: '' });
  if (process.platform === 'linux') {
    const full = openSync('/dev/full', 'w');
    const { code, err } = await ended(full);
    const told = /^error: the disk is full while writing the standard output: .*$/gm;
    t.equal(code, 2);
    t.equal(err.replace(told, ''), '\n', err);
    const trained = await ended(full, undefined, ['train', runFile('full', {}), '--json', '--quiet']);
    closeSync(full);
    t.equal(trained.code, 2);
    t.equal(trained.err.match(told)?.length, 1);
    t.match(trained.err, /done: (.*full-out.final)\n/, 'what is trained is saved');
  }
});

test('help and doctor', async (t) => {
  const help = await run('sample', '--help');
  t.equal(help.status, 0);
  t.ok(
    help.out.includes('--denoising-end') && help.out.includes('Examples:'),
    'help lists flags and examples',
  );
  const flags = help.out.slice(0, help.out.indexOf('Examples:')).split('\n');
  t.same(
    flags.filter((line) => line.length > 80),
    [],
    'in 80 columns',
  );
  for (const command of ['sample', 'grid', 'serve', 'export', 'train']) {
    const { out } = await run(command, '--help');
    const wide = out.split('\n').filter((line) => line.length > 80 && !line.startsWith(' '));
    t.same(wide, [], `what ${command} says below its flags, too`);
  }
  for (const command of ['train', 'plan']) {
    const { out } = await run(command, '--help');
    const [keys = ''] = /\/.*run\.d\.ts$/m.exec(out) ?? [];
    t.ok(out.includes('Examples:') && existsSync(keys), `${command} tells where a run's keys are: ${keys}`);
  }
  t.ok(JSON.parse((await run('doctor', '--json')).out).node, 'doctor reports');
});

test('what would steer a screen is not printed of a file', async (t) => {
  const folder = scratch();
  const hostile = join(folder, 'hostile.safetensors');
  const bytes = encodeNumbers(new Float32Array(1), 'float32');
  const name = 'lora_unet_\u001b]0;mine\u0007x\nerror: y.lora_up.weight';
  writeSafetensors(hostile, [{ name, dtype: 'float32', shape: [1], bytes }], { title: 'a\u001b[2Jb' });
  const { out, err } = await run('inspect', hostile);
  t.match(out, /title: a\ufffd\[2Jb/);
  t.match(err, /lora_unet_\ufffd\]0;mine\ufffdx error: y/, 'and stays in its line');
  t.notMatch(out + err, /[^\P{Cc}\n]/u);
  rmSync(folder, { recursive: true });
});

test('too few files are told of from the first on', (t) => {
  const argv = [
    '-c',
    'ulimit -n 48; "$0" "$@"',
    process.execPath,
    join(packageRoot, 'bin', 'sdxl.js'),
    'train',
    'x.ts',
  ];
  const { status, stderr } = spawnSync('sh', argv, { encoding: 'utf8' });
  t.equal(status, 2);
  t.match(stderr, /^error: too many files are open to open .*: raise the limit with "ulimit -n"\n$/);
  t.end();
});
