// The command line in process: a good run gives diffusers' picture; each mistake gives one sentence, status 2, no file.
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { main } from '../cli/main.ts';
import { readPicture, writePng } from '../io/image.ts';
import { goldenFolder, maxDifference } from './golden.ts';

const model = join(goldenFolder, 'tiny-sdxl');

async function run(...argv: string[]): Promise<{ status: number; out: string; err: string }> {
  let [out, err] = ['', ''];
  const terminal = {
    out: (text: string) => (out += text),
    err: (text: string) => (err += text),
    live: false,
  };
  const status = await main(argv, terminal as never);
  return { status, out, err };
}

const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-cli-'));

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
  const output = join(folder, 'out', 'x.png');
  const cases: [label: string, argv: string[], says: RegExp][] = [
    ['unknown model path', ['--model', join(folder, 'absent')], /no model at/],
    ['folder without model_index.json', ['--model', noIndex], /model_index\.json/],
    ['truncated weights', ['--model', damaged], /unet.*download it again/],
    ['pickle', ['--model', pickle], /pickle/],
    ['width not divisible by 8', ['--model', model, '--width', '100'], /divisible by 8/],
    ['unknown scheduler', ['--model', model, '--scheduler', 'eulr'], /did you mean "euler"/],
    [
      'strength out of range',
      ['--model', model, '--image', picture, '--strength', '1.5'],
      /--strength takes/,
    ],
    ['mask of another size', ['--model', model, '--image', picture, '--mask', mask], /same size/],
    ['mask without image', ['--model', model, '--mask', mask], /--image/],
    ['no model', [], /--model/],
    ['unknown device', ['--model', model, '--device', 'tpu'], /unknown device/],
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
  t.equal((await run('sample', '--model', model)).status, 2, 'missing prompt');
  t.equal((await run('sampel')).status, 2, 'unknown command');
  t.notOk(
    readdirSync(folder).some((name) => name.includes('.tmp')),
    'no temporary file is left',
  );
  rmSync(folder, { recursive: true });
});

test('help and doctor', async (t) => {
  const help = await run('sample', '--help');
  t.equal(help.status, 0);
  t.ok(
    help.out.includes('--denoising-end') && help.out.includes('Examples:'),
    'help lists flags and examples',
  );
  t.ok(JSON.parse((await run('doctor', '--json')).out).node, 'doctor reports');
});
