// PyTorch's CPU random numbers, bit for bit, against values drawn with PyTorch itself. Where the golden data
// grants a tolerance (float64 Box-Muller, which rests on the C library) the test takes that tolerance and no
// more.
import { test } from 'tap';
import { fma32 } from '../../engine/cephes_float.ts';
import { cudaDevice, openDevice } from '../../engine/device.ts';
import { torchNormal } from '../../engine/ops/random.ts';
import { scope } from '../../engine/scope.ts';
import { empty, tensor } from '../../engine/tensor.ts';
import { CudaGenerator } from '../../models/random/cuda_random.ts';
import { type RandomDType, TorchGenerator } from '../../models/random/torch_random.ts';
import { allClose, type GoldenCase, goldenArea, maxDifference } from '../support/golden.ts';
import { noLibrary, ownDevice, runnable } from '../support/native_library.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const area = goldenArea('rng');

// JSON rounds seeds above 2^53; the case's name has every digit.
function generatorOf(each: GoldenCase): TorchGenerator {
  return new TorchGenerator(BigInt(/seed(\d+)/.exec(each.id)?.[1] ?? each.seed!));
}

interface Step {
  fn: 'rand' | 'randn' | 'randint' | 'randperm';
  n: number;
  dtype: string;
}

function play(generator: TorchGenerator, { fn, n, dtype }: Step): ArrayLike<number> {
  if (fn === 'randint') return generator.randint(0, 1000, n);
  if (fn === 'randperm') return generator.randperm(n);
  if (dtype === 'float64') return generator[fn](n, dtype);
  return generator[fn](n, dtype as Exclude<RandomDType, 'float64'>);
}

// What a case computes, by label of its expectations.
function results(each: GoldenCase): Record<string, ArrayLike<number>> {
  const generator = generatorOf(each);
  const [fn, a, b] = each.id.split('.');
  if (each.id === 'raw_words') {
    return { y: generator.rand(64).map((u) => u * 2 ** 24) };
  }
  if (each.id === 'global_generator') return { 0: generator.randn(72), 1: generator.randint(0, 1000, 5) };
  if (each.id === 'sequence') {
    return Object.fromEntries((each.steps as Step[]).map((step, i) => [i, play(generator, step)]));
  }
  if (each.id === 'randn.float32.large') {
    const all = generator.randn(65536);
    const indices = Array.from(area.floats(each.inputs!.indices));
    return { y: indices.map((i) => all[i]), sum: [all.reduce((sum, value) => sum + value, 0)] };
  }
  if (fn === 'randint') return { y: generator.randint(Number(a), Number(b), 24) };
  if (fn === 'randperm') return { y: generator.randperm(Number(a)) };
  const n = elements(each.expect.y.tensor);
  return { y: play(generator, { fn: fn as Step['fn'], n, dtype: a }) };
}

const elements = (tensor: string) => area.shape(tensor).reduce((a, b) => a * b, 1);

test('every golden draw', async (t) => {
  t.equal(area.cases.length, 173);
  for (const each of area.cases) {
    const got = results(each);
    for (const [label, expected] of Object.entries(each.expect)) {
      allClose(t, `${each.id} ${label}`, got[label], area.doubles(expected.tensor), expected);
    }
  }
});

test('seeds and arguments', async (t) => {
  const draws = (seed: number | bigint) => new TorchGenerator(seed).rand(3).join();
  t.equal(draws(2 ** 32 + 5), draws(5), 'only the low 32 bits count');
  t.equal(draws(-1), draws(0xffffffffn), 'a negative seed is its two’s complement');
  t.equal(new TorchGenerator(1).randn(0).length, 0);
  t.throws(() => new TorchGenerator(0.5), { name: 'UserError', message: /whole number/ });
  t.throws(() => new TorchGenerator(1).randint(3, 3, 1), {
    name: 'RangeError',
    message: 'randint needs safe integers with lo < hi, got 3 and 3',
  });
});

test('devices make the same normals of the words, to the bit', (t) => {
  const natives = noLibrary ? [] : runnable().map(ownDevice);
  if (noLibrary) t.pass('the native library', { skip: noLibrary });
  for (const device of [openDevice('reference'), ...natives, cudaDevice(openVirtualGpu())])
    for (const n of [16, 4096]) {
      const [own, other] = [new TorchGenerator(7), new TorchGenerator(7)];
      for (let call = 0; call < 2; call++) {
        const words = other.words(n) ?? new Int32Array();
        const got = scope(() => torchNormal(tensor(words, [n], { device, dtype: 'int32' })).bytes());
        t.ok(Buffer.from(own.randn(n).buffer).equals(got), `${device.name}, ${n} numbers, call ${call}`);
      }
    }
  const generator = new TorchGenerator(7);
  for (const n of [0, 15, 17]) t.equal(generator.words(n), undefined);
  t.same(generator.randn(20), new TorchGenerator(7).randn(20), 'which draws nothing');
  t.throws(() => torchNormal(empty([17], { device: openDevice('reference'), dtype: 'int32' })), {
    message: /words are int32 \[17\], not int32 by the 16/,
  });
  t.end();
});

test('fma32 rounds once', async (t) => {
  const ulp = 2 ** -23;
  // (1 + ulp)(1 - ulp) is just below 1: the exact sums lie beside a tie, their doubles on it.
  t.equal(fma32(1 + ulp, 2 ** -24 * (1 - ulp), 1 + ulp), 1 + ulp, 'just below a tie goes down');
  t.equal(fma32(1 + ulp, -(2 ** -24) * (1 - ulp), 1 + ulp), 1 + ulp, 'just above a tie goes up');
  t.equal(fma32(2 ** -24, 1, 1), 1, 'a tie goes to even');
  t.equal(fma32(2 ** -24, 1, 1 + ulp), 1 + 2 * ulp, 'a tie goes to even');
  t.equal(fma32(-(2 ** -40), 2 ** -40, Math.fround(0.1)), Math.fround(0.1), 'what is too small vanishes');
});

test('the noise of a 1024 x 1024 picture takes well under 100 ms', async (t) => {
  const times = Array.from({ length: 4 }, (_, seed) => {
    const generator = new TorchGenerator(seed);
    const start = performance.now();
    generator.randn(65536);
    return performance.now() - start;
  });
  const best = Math.min(...times);
  t.comment(`best of ${times.length}: ${best.toFixed(1)} ms`);
  t.ok(best < 100, `${best.toFixed(1)} ms`);
});

// torch.randn on a GPU after torch.manual_seed(0), as A1111's rng_philox.py gives it.
const onGpu = [
  ...[-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564],
  ...[-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497],
];

test("a GPU's numbers", (t) => {
  const generator = new CudaGenerator(0);
  const first = generator.randn(12);
  t.ok(maxDifference(first, onGpu) < 1e-6, [...first].join());
  t.same([...new CudaGenerator(2n ** 64n).randn(12)], [...first], 'a seed has 64 bits');
  t.notSame([...new CudaGenerator(2 ** 32).randn(12)], [...first], 'all of which count');
  const next = generator.randn(65_536);
  t.ok(maxDifference(next.subarray(0, 12), first) > 0.1, 'the next call goes on');
  const mean = next.reduce((sum, x) => sum + x, 0) / next.length;
  const square = next.reduce((sum, x) => sum + x * x, 0) / next.length;
  // Four deviations of the mean and of the variance of so many.
  t.ok(Math.abs(mean) < 0.016 && Math.abs(square - 1) < 0.023, `${mean}, ${square}`);
  t.ok(next.every(Number.isFinite));
  t.end();
});
