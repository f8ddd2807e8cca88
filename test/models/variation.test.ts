// Variation seeds and seeds of another size: the noise against A1111's rng.py (golden/variation.jsonl), and `sdxl sample`: what its pictures
// say of them, drawn again by `--from`, A1111's too; mistakes.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { decodeFloats } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { CudaGenerator } from '../../models/random/cuda_random.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { VariedGenerator } from '../../models/random/variation.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { picture } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at } from '../support/golden_calls.ts';

interface Line {
  rng: 'CPU' | 'NV';
  seed: number;
  subseed: number;
  strength: number;
  from: [height: number, width: number];
  first: string;
  second: string;
}

const kinds = { CPU: TorchGenerator, NV: CudaGenerator };
const floats = (base64: string) => decodeFloats(Buffer.from(base64, 'base64'), 'float32');

test("the noise is A1111's, and later draws the seed's", (t) => {
  const lines = goldenLines<Line>('variation');
  for (const { rng, seed, subseed, strength, from, first, second } of lines) {
    const seed_resize_from = from[0] > 0 ? from : undefined;
    const variation = { subseed, subseed_strength: strength, seed_resize_from };
    const varied = new VariedGenerator(seed, variation, kinds[rng]);
    const got = varied.first([1, 4, 6, 8]).filter((_, i) => i % 3 === 0);
    const label = `${rng}, strength ${strength}, from ${from.join('x')}`;
    allClose(t, label, got, floats(first), { atol: 2e-6, rtol: 0 });
    allClose(t, `${label}: the next`, varied.randn(192).slice(0, 16), floats(second), {
      atol: 2e-6,
      rtol: 0,
    });
  }
  t.equal(lines.length, 16);
  const again = new VariedGenerator(7, { subseed: 11, subseed_strength: 1 });
  const draws = [again.first([1, 4, 6, 8]), again.first([1, 4, 6, 8])];
  const plain = new TorchGenerator(7);
  plain.randn(192);
  t.same(draws[1], plain.randn(192), 'a second pass by the same generator has plain noise');
  const several = new VariedGenerator(7, { subseed: 11, subseed_strength: 0.3 }).first([2, 4, 6, 8]);
  const [own, sub] = [7, 11].map((seed) => new TorchGenerator(seed).randn(2 * 192));
  const angles = (a: Float32Array, b: Float32Array) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  for (const i of [0, 1]) {
    const part = (x: Float32Array) => x.subarray(i * 192, (i + 1) * 192);
    t.ok(
      angles(part(several), part(own)) > angles(part(several), part(sub)),
      'of several pictures each is varied',
    );
  }
  t.end();
});

const model = join(goldenFolder, 'tiny-sdxl');
async function sample(...argv: string[]) {
  const size = ['--width', '32', '--height', '32', '--steps', '2', '--scheduler', 'euler_a'];
  const files = ['--quiet', '--output', at('out.png'), '--save-latents', at('out.safetensors')];
  return sdxl('sample', '--model', model, ...(argv.includes('--from') ? [] : size), ...files, ...argv);
}

test('sdxl sample', async (t) => {
  const drawn = async (...argv: string[]) => {
    const { status, err } = await sample('--prompt', 'a fox', ...argv);
    t.equal(status, 0, err);
    return savedLatents(at('out.safetensors'));
  };
  const seeded = ['--seed', '3'];
  const want = await drawn(...seeded);
  const variation = ['--subseed', '8', '--subseed-strength'];
  t.equal(maxDifference(await drawn(...seeded, ...variation, '0'), want), 0, 'at 0 nothing changes');
  const none = readPngText(at('out.png'));
  t.notMatch(none.parameters, /Variation/);
  const some = await drawn(...seeded, ...variation, '0.2');
  t.ok(maxDifference(some, want) > 0.1);
  for (const rng of ['cpu', 'cuda']) {
    const other = await drawn('--seed', '8', '--rng', rng, '--scheduler', 'euler');
    const whole = [...variation, '1', '--rng', rng, '--scheduler', 'euler'];
    t.ok(maxDifference(await drawn(...seeded, ...whole), other) < 1e-6, "at 1 the noise is the subseed's");
  }
  const hires = ['--hires', '--hires-scale', '1.5', '--hires-steps', '1'];
  const larger = await drawn(...seeded, ...hires);
  t.ok(maxDifference(await drawn(...seeded, ...hires, ...variation, '0.2'), larger) > 0.1);
  const over = ['--image', join(goldenFolder, 'png', 'input.png'), '--strength', '0.9', ...seeded];
  const painted = await drawn(...over);
  t.equal(maxDifference(await drawn(...over, ...variation, '0'), painted), 0);
  t.ok(maxDifference(await drawn(...over, ...variation, '0.2'), painted) > 1e-2, 'over a picture, too');
});

test('pictures say what they are, and are drawn again', async (t) => {
  const typed = [
    '--subseed',
    '8',
    '--subseed-strength',
    '0.25',
    '--seed-resize-from-w',
    '16',
    '--seed-resize-from-h',
    '48',
  ];
  const { status, err } = await sample('--prompt', 'a fox', '--seed', '3', ...typed, '--batch-count', '2');
  t.equal(status, 0, err);
  const [first, second] = [0, 1].map((i) => at(`out-${i}.png`));
  t.match(
    readPngText(first).parameters,
    /, Seed: 3, .*, Variation seed: 8, Variation seed strength: 0.25, Seed resize from: 16x48, /,
  );
  t.match(
    readPngText(second).parameters,
    /, Seed: 3, .*, Variation seed: 9, Variation seed strength: 0.25, /,
  );
  t.notOk(readFileSync(first).equals(readFileSync(second)));
  const again = await sample('--from', second);
  t.equal(again.status, 0, again.err);
  t.same(readFileSync(at('out.png')), readFileSync(second));
  // A1111's text alone, of which the sampler's layout is its own.
  const { parameters } = readPngText(second);
  writePng(at('theirs.png'), picture(1, 8, 8), { parameters });
  const theirs = await sample('--from', at('theirs.png'));
  t.equal(theirs.status, 0, theirs.err);
  t.equal(theirs.err, '');
  const fields = (path: string) => readPngText(path).parameters.match(/Seed: .*Seed resize from: \w+/)?.[0];
  t.equal(fields(at('out.png')), fields(second));
  const random = await sample('--prompt', 'a fox', '--subseed-strength', '0.5', '--json');
  t.match(JSON.parse(random.out).subseed, /^\d+$/, 'a random one is told');
});

test('mistakes', (t) =>
  refusesEach(t, (...argv) => sample('--prompt', 'a fox', ...argv), [
    [['--subseed', '3'], /--subseed needs --subseed-strength/],
    [['--subseed-strength', '1.5'], /--subseed-strength takes a number from 0 to 1/],
    [
      ['--seed-resize-from-w', '64'],
      /--seed-resize-from-w and --seed-resize-from-h are the sides of one size: give both/,
    ],
    [['--seed-resize-from-h', '60'], /not divisible by 8/],
    [
      ['--subseed', String(Number.MAX_SAFE_INTEGER), '--subseed-strength', '1', '--batch-count', '2'],
      /has no 1 seeds after it/,
    ],
  ]));
