// `sdxl sample` in process: diffusers' picture, a picture's settings and back, VAEs in one file, the refiner, types and long
// prompts, and the model that comes along.
import { copyFileSync, cpSync, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { readPicture, writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { refusesEach, sdxl as run } from '../support/command_line.ts';
import { goldenFolder, goldenSingleFile, maxDifference } from '../support/golden.ts';

const model = join(goldenFolder, 'tiny-sdxl');
const refiner = join(goldenFolder, 'tiny-sdxl-refiner');

const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-cli-'));

/** One step of 64x64 pixels. */
const small = (prompt: string): string[] =>
  `sample --width 64 --height 64 --steps 1 --model`.split(' ').concat(model, '--prompt', prompt);

test('sample draws the golden picture and reports it', async (t) => {
  const folder = scratch();
  const output = join(folder, 'picture.png');
  const prompt = 'An astronaut riding a horse on the moon, cinematic lighting';
  const shape = ['--width', '128', '--height', '128', '--steps', '20', '--seed', '1064'];
  const latents = join(folder, 'latents.safetensors');
  const { status, out } = await run(
    ...['sample', '--model', model, '--prompt', prompt, ...shape],
    ...['--output', output, '--save-latents', latents, '--json', '--quiet'],
  );
  t.equal(status, 0);
  t.equal(JSON.parse(out).seed, 1064);
  const [got, want] = [
    await readPicture(output),
    await readPicture(join(goldenFolder, 'png', 't2i_cfg5.png')),
  ];
  t.ok(maxDifference(got.data, want.data) <= 1, 'pixels within one level');
  t.ok(existsSync(latents), 'latents saved');
  rmSync(folder, { recursive: true });
});

test('a picture gives its settings back', async (t) => {
  const folder = scratch();
  const [first, again] = [join(folder, 'first.png'), join(folder, 'again.png')];
  const prompt = 'ein Fuchs, 狐, "quoted" <b>';
  const made = await run(
    ...['sample', '-m', model, '-p', prompt, '-n', 'rain', '-s', '7', '-W', '64', '-H', '72', '-o', first],
    ...[
      '--steps',
      '3',
      '--cfg-scale',
      '2.5',
      '--sampling-method=dpm++2m',
      '--original-size',
      '80x64',
      '--quiet',
    ],
  );
  t.equal(made.status, 0, `short and foreign flags are taken ${made.err}`);
  const back = await run('sample', '--from', first, '-o', again, '--quiet');
  t.equal(back.status, 0, `from its own picture ${back.err}`);
  const [a, b] = [await readPicture(first), await readPicture(again)];
  t.same([b.width, b.height], [64, 72]);
  t.equal(maxDifference(a.data, b.data), 0, 'the same picture');
  const text = readPngText(first);
  t.match(
    text.parameters,
    /^ein Fuchs, 狐.*\nNegative prompt: rain\nSteps: 3, Sampler: DPM\+\+ 2M, .*Seed: 7/,
  );

  const foreign = join(folder, 'foreign.png');
  const fields =
    'Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3, Seed: 5, Size: 64x64, Model: x, Hires checkpoint: y';
  writePng(foreign, a, { parameters: `a cat\nand a dog\nNegative prompt: rain\n${fields}` });
  const a1111 = await run(
    'sample',
    '--from',
    foreign,
    '-m',
    model,
    '-o',
    again,
    '--json',
    '--quiet',
    '--seed',
    '6',
  );
  t.equal(a1111.status, 0, `from A1111's text ${a1111.err}`);
  t.equal(a1111.err, `warning: ${foreign} was made with Hires checkpoint: y, which --from does not take\n`);
  t.same([JSON.parse(a1111.out).steps, JSON.parse(a1111.out).seed], [2, 6], 'a typed flag goes before');
  t.match(
    readPngText(again).parameters,
    /^a cat\nand a dog\nNegative prompt: rain\n.*DPM\+\+ 2M, Schedule type: Karras/,
  );
  const kept = JSON.parse(readPngText(again).sdxl);
  t.match(kept.scheduler, /karras/i, 'with the sigmas of the schedule type');
  t.equal(kept.rng, 'cuda', "its noise is a GPU's");
  t.match(text.parameters, /RNG: CPU/, 'and ours says that it is not');
  t.notMatch(readPngText(again).parameters, /RNG/);

  const bare = fields.replace(/, Model.*/, '');
  writePng(foreign, a, { parameters: `a cat\n${bare.replace('Karras', 'Align Your Steps')}` });
  t.equal((await run('sample', '--from', foreign, '-m', model, '-o', again, '--quiet')).err, '');
  t.match(readPngText(again).parameters, /Steps: 2, Sampler: DPM\+\+ 2M, Schedule type: Align Your Steps, /);
  writePng(foreign, a, { parameters: `a cat\n${bare.replace('Karras', 'Bong Tangent')}` });
  const lacking = ['sample', '--from', foreign, '-m', model, '-o', again, '--quiet', '--steps', '1'];
  const untaken = /made with Schedule type: Bong Tangent, which --from does not take; there is --scheduler/;
  t.match((await run(...lacking)).err, untaken);
  t.equal((await run(...lacking, '--scheduler', 'euler')).err, '', 'where the sampler is typed');

  writePng(foreign, a, { sdxl: '{"width": "12"}' });
  for (const [file, says] of [
    [foreign, /--width 12 is not divisible by 8/],
    [join(goldenFolder, 'png', 'input.png'), /carries no settings/],
    [join(folder, 'absent.png'), /does not exist/],
    [join(model, 'model_index.json'), /not a PNG/],
  ] as const) {
    const { status, err } = await run('sample', '--from', file, '-m', model, '-o', again);
    t.ok(status === 2 && says.test(err), err.trim());
  }
  const odd = ['{"prompt": [{"toString": 1}]}', `{"prompt": ${'['.repeat(1e5)}${']'.repeat(1e5)}}`];
  for (const settings of [
    ...['{"prompt": true}', '{"width": true}', '{"karras": "no"}', '{"lora": true}', '{"seed": {}}'],
    ...odd,
  ]) {
    writePng(foreign, a, { sdxl: settings });
    const { status, err } = await run('sample', '--from', foreign, '-m', model, '-o', again);
    t.ok(status === 2 && /the settings in .* are damaged/.test(err), `${settings.slice(0, 40)} ${err}`);
  }
  rmSync(folder, { recursive: true });
});

test('typed steps stand for all that a picture says of them', async (t) => {
  const folder = scratch();
  const [first, again] = [join(folder, 'first.png'), join(folder, 'again.png')];
  const args = ['-m', model, '-p', 'x', '-W', '64', '-H', '64', '-s', '1', '--quiet'];
  t.equal((await run('sample', ...args, '--timesteps', '999,500,100', '-o', first)).status, 0);
  const stepsOf = async (...argv: string[]) =>
    JSON.parse((await run('sample', '--from', first, '-o', again, '--json', '--quiet', ...argv)).out).steps;
  t.equal(await stepsOf(), 3);
  t.equal(await stepsOf('--steps', '2'), 2);
  t.equal(await stepsOf('--sigmas', '14,1,0', '--scheduler', 'euler'), 2);
  rmSync(folder, { recursive: true });
});

test('what is typed and does nothing is refused, and of a picture read back', async (t) => {
  const folder = scratch();
  const [first, again] = [join(folder, 'first.png'), join(folder, 'again.png')];
  const args = ['sample', '-m', model, '-p', 'x', '-W', '64', '-H', '64', '-s', '1', '--quiet', '-o', again];
  await refusesEach(t, (...argv) => run(...args, ...argv), [
    [
      ['--denoising-end', '0.8'],
      /half denoised, for a refiner to finish; give --refiner, or --save-latents to/,
    ],
    [['--steps', '2', '--timesteps', '999,500'], /--steps and --timesteps both lay out the steps/],
    [['--steps', '2', '--sigmas', '14,0', '--scheduler', 'euler'], /--steps and --sigmas both lay out/],
    [['--configs', model], /--configs .* is for a model that is a single file, and a folder has its own/],
    [['--eta', '0.5', '--scheduler', 'unipc'], /--eta: UniPCMultistepScheduler takes none; .* ddim or tcd/],
    [['--eta', '0.5'], /--eta: EulerDiscreteScheduler takes none/],
    [['--eta-ancestral', '0'], /--eta-ancestral: EulerDiscreteScheduler puts no noise into its steps; leave/],
  ]);
  t.notOk(existsSync(again));
  const latents = ['--save-latents', join(folder, 'half.safetensors')];
  const made = await run(...args, '-o', first, '--steps', '2', '--denoising-end', '0.5', ...latents);
  t.equal(made.status, 0, made.err);
  t.equal((await run('sample', '--from', first, '-o', again, '--quiet')).err, '', 'read back');
  t.ok(readFileSync(first).equals(readFileSync(again)));
  const subseed = ['--steps', '1', '--subseed', '3', '--subseed-strength', '0'];
  t.match(
    (await run(...args, ...subseed)).err,
    /^warning: --subseed does nothing at --subseed-strength 0; .*\n$/,
  );
  const ddim = ['--eta', '0.5', '--scheduler', 'ddim', '--steps', '2'];
  t.equal((await run(...args, ...ddim, '-o', first)).status, 0);
  t.equal((await run('sample', '--from', first, '--scheduler', 'euler', '-o', again, '--quiet')).err, '');
  rmSync(folder, { recursive: true });
});

test('a VAE in one file, under either spelling, is the folder it came from', async (t) => {
  const folder = scratch();
  const draw = async (name: string, ...argv: string[]) => {
    const output = join(folder, name);
    const shape = ['--width', '64', '--height', '64', '--steps', '1', '--seed', '1', '--quiet'];
    const { status, err } = await run('sample', '-m', model, '-p', 'x', '-o', output, ...shape, ...argv);
    t.equal(status, 0, `${name} ${err}`);
    return (await readPicture(output)).data;
  };
  const want = await draw('own.png');
  const final = join(folder, 'final');
  cpSync(join(model, 'vae'), join(final, 'vae'), { recursive: true });
  t.same(await draw('final.png', '--vae', final), want, 'as training leaves it');
  const whole = openSafetensors(goldenSingleFile('tiny-sdxl'));
  const prefix = 'first_stage_model.';
  const part = [...whole.tensors.values()]
    .filter(({ name }) => name.startsWith(prefix))
    .map(({ name, dtype, shape }) => ({
      name: name.slice(prefix.length),
      dtype,
      shape,
      bytes: whole.read(name),
    }));
  whole.close();
  const original = join(folder, 'sdxl_vae.safetensors');
  writeSafetensors(original, part);
  copyFileSync(join(model, 'vae', 'config.json'), join(folder, 'config.json'));
  t.equal(maxDifference(await draw('original.png', '--vae', original), want), 0);
  const diffusers = join(model, 'vae', 'diffusion_pytorch_model.safetensors');
  t.equal(maxDifference(await draw('diffusers.png', '--vae', diffusers), want), 0);
  const wrong = join(model, 'unet', 'diffusion_pytorch_model.safetensors');
  t.match((await run('sample', '-m', model, '-p', 'x', '--vae', wrong)).err, /not a VAE/);
  rmSync(folder, { recursive: true });
});

test('base and refiner', async (t) => {
  const folder = scratch();
  const shape = ['--width', '64', '--height', '64', '--steps', '5', '--seed', '1', '--num-images', '2'];
  const long = 'one two three four five six seven eight nine ten '.repeat(9);
  const draw = async (...argv: string[]) => {
    const saved = join(folder, 'latents.safetensors');
    const files = ['-o', join(folder, 'x.png'), '--save-latents', saved];
    const said = await run(
      'sample',
      '-m',
      model,
      '-p',
      long,
      '--refiner',
      refiner,
      ...shape,
      ...files,
      ...argv,
    );
    t.equal(said.status, 0, said.err);
    const file = openSafetensors(saved);
    const latents = Buffer.from(file.read('latents'));
    t.same(file.tensors.get('latents')?.shape, [2, 4, 8, 8], 'latents as diffusers has them');
    file.close();
    return { latents, lines: said.err.split('\n') };
  };
  const { latents: handed, lines } = await draw('--denoising-end', '0.6');
  const warnings = lines.flatMap((line, i) => (/^warning: the prompt has more tokens/.test(line) ? [i] : []));
  t.equal(warnings.length, 1, 'what was cut off, once for both encoders and both stages');
  t.ok(lines.findIndex((line) => line.startsWith('sampling 1/3')) > warnings[0], 'before the steps');
  t.ok(handed.equals((await draw('--denoising-start', '0.6')).latents), 'either end says where they meet');
  t.notOk(handed.equals((await draw('--denoising-end', '0.6', '--scheduler', 'ddim')).latents));
  const { lines: finished } = await draw('--strength', '0.4');
  t.ok(
    finished.some((line) => /sampling 5\/5/.test(line)) &&
      finished.some((line) => /refining 2\/2/.test(line)),
    'or the refiner works over finished pictures',
  );
  rmSync(folder, { recursive: true });
});

test('a picture and a mask without a size', async (t) => {
  const folder = scratch();
  const grey = (width: number, height: number, channels: 1 | 3, value: number) => ({
    ...{ width, height, channels },
    data: new Uint8Array(width * height * channels).fill(value),
  });
  const [image, mask, output] = ['image', 'mask', 'x'].map((name) => join(folder, `${name}.png`));
  writePng(image, grey(70, 66, 3, 90));
  writePng(mask, grey(70, 66, 1, 255));
  const argv = ['-i', image, '--mask', mask, '-o', output, '--steps', '2', '--quiet'];
  const { status, err } = await run('sample', '-m', model, '-p', 'x', ...argv);
  t.equal(status, 0, err);
  const drawn = await readPicture(output);
  t.same([drawn.width, drawn.height], [64, 64], "the picture's, cut to whole latents");
  writePng(image, grey(7, 9, 3, 90));
  const tiny = await run('sample', '-m', model, '-p', 'x', '-i', image, '-o', output);
  t.equal(tiny.status, 2);
  t.match(tiny.err, /image\.png is 7x9 and a latent 8x8 pixels: give --width and --height/);
  rmSync(folder, { recursive: true });
});

test('the type of the VAE is checked, and kept in the picture', async (t) => {
  const out = join(scratch(), 'out.png');
  const args = small('x');
  const wrong = await run(...args, '--vae-dtype', 'half', '--output', out);
  t.equal(wrong.status, 2);
  t.match(wrong.err, /--vae-dtype takes auto, float32, bfloat16, float16, not "half"/);
  t.equal((await run(...args, '--vae-dtype', 'float16', '--seed', '1', '--output', out)).status, 0);
  t.equal(JSON.parse(readPngText(out).sdxl).vaeDtype, 'float16');
  const again = join(scratch(), 'again.png');
  t.equal((await run('sample', '--from', out, '--output', again)).status, 0);
  t.ok(readFileSync(out).equals(readFileSync(again)), 'the same picture');
  t.end();
});

test('a long prompt is told of, or read', async (t) => {
  const out = join(scratch(), 'out.png');
  const prompt = Array.from({ length: 90 }, (_, i) => (i % 2 ? 'fox' : 'red')).join(' ');
  const args = small(prompt);
  const cut = await run(...args, '--output', out);
  t.match(cut.err, /this part was cut off \(--max-token-length reads more\): ".*fox/);
  const much = await run(...small('fox '.repeat(1000)), '--output', out);
  t.match(much.err, /"(fox ){100,150}/, 'of much, its begin');
  t.ok(much.err.length < 800, `${much.err.length} letters`);
  const whole = await run(...args, '--max-token-length', '150', '--output', out);
  t.equal(whole.status, 0);
  t.notMatch(whole.err, /cut off/);
  t.equal(JSON.parse(readPngText(out).sdxl).maxTokenLength, 150);
  const wrong = await run(...args, '--max-token-length', '100', '--output', out);
  t.equal(wrong.status, 2);
  t.match(wrong.err, /--max-token-length is 100; give a multiple of 75/);
});

test('without a model the small one that comes along draws', async (t) => {
  const folder = scratch();
  for (const prompt of ['red heart', 'yoda pokemon']) {
    const output = join(folder, `${prompt}.png`);
    const { status, err } = await run(
      'sample',
      '--prompt',
      prompt,
      '--steps',
      '4',
      '--seed',
      '1',
      '--output',
      output,
    );
    t.equal(status, 0, err);
    t.match(err, /^using the emoji model that comes with sdxl/);
    const { width, height } = await readPicture(output);
    t.same([width, height], [64, 64]);
  }
  rmSync(folder, { recursive: true });
});
