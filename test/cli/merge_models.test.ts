// `sdxl export --merge`: models merged whole. The judges are kohya's merge_models.py, A1111's formula in torch and supermerger's blocks, as
// recorded; sums in float64 over every weight; and the bits of the models themselves. And mistakes, which leave nothing.
import {
  cpSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { namedParameters } from '../../engine/module.ts';
import { decodeFloats, type FloatDType } from '../../io/dtype.ts';
import { openGguf } from '../../io/gguf.ts';
import { readPicture } from '../../io/image.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { buildComponent } from '../../models/formats/components.ts';
import { componentConfigs } from '../../models/formats/diffusers_config.ts';
import { presets } from '../../models/formats/presets.ts';
import { mergedBlockCount, mergedBlockOf } from '../../models/formats/unet_blocks.ts';
import { unetKeyInSgm } from '../../models/unet/unet_keys.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents } from '../support/contents.ts';
import { weight } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { writeInpainting } from '../support/inpainting_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { writeAdapter } from '../support/tiny_adapter.ts';
import { tinyFiles, writeTiny } from '../support/tiny_model.ts';

const tiny = join(goldenFolder, 'tiny-sdxl');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-merge-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

const known = new Map<string, Float32Array>();
/** ControlNets' formula, each weight made once. */
const formula = (letter: string, path: string, shape: readonly number[]): Float32Array => {
  const name = `${letter} ${path} ${shape}`;
  const values = known.get(name) ?? weight(letter, path, shape);
  known.set(name, values);
  return values;
};

/** A model whose weights are the formula of its letter, exact in float16. */
const write = (letter: string, dtype: FloatDType = 'float16', name = letter): string =>
  writeTiny(at(name), dtype, (path, shape) => formula(letter, path, shape));
const [a, b, c, d] = ['a', 'b', 'c', 'd'].map((letter) => write(letter));

interface Stored {
  dtype: string;
  shape: readonly number[];
  bytes: Uint8Array;
  values: Float32Array;
}

/** Every weight of a folder's UNet and text encoders, by component and name. */
function weightsIn(model: string): Map<string, Stored> {
  const found = new Map<string, Stored>();
  for (const [component, name] of Object.entries(tinyFiles)) {
    const file = openSafetensors(join(model, component, name));
    for (const { name, dtype, shape } of nonEmpty(file.tensors.values())) {
      const bytes = file.read(name);
      found.set(`${component}.${name}`, { dtype, shape, bytes, values: decodeFloats(bytes, dtype) });
    }
    file.close();
  }
  return found;
}

let count = 0;
/** Exports what is merged to a new folder, or all to `--format`'s file, and gives its path. */
async function made(t: Test, from: string, ...argv: string[]): Promise<string> {
  const format = argv[argv.indexOf('--format') + 1];
  const ending = argv.includes('--format') ? ({ gguf: '.gguf' }[format] ?? '.safetensors') : '';
  const out = at(`made-${count++}${ending}`);
  const parts = ending || argv.includes('--save-keys') ? [] : ['--save-keys', Object.keys(tinyFiles).join()];
  const { status, err } = await sdxl('export', from, out, '--quiet', ...parts, ...argv);
  t.equal(status, 0, err);
  return out;
}

/** What a weight is to be, in float64. */
type Expected = (path: string, shape: readonly number[]) => Float64Array;
const sumOf =
  (shares: (path: string) => readonly (readonly [by: number, letter: string])[]): Expected =>
  (path, shape) => {
    const terms = shares(path).map(([by, letter]) => [by, formula(letter, path, shape)] as const);
    const sum = new Float64Array(terms[0][1].length);
    for (const [by, x] of terms) for (let i = 0; i < x.length; i++) sum[i] += by * x[i];
    return sum;
  };

/** Of numbers that a type's rounding may change: half a unit of its last place. */
const places = { float32: 2 ** -24, float16: 2 ** -11, bfloat16: 2 ** -8 };

/** Every weight, to rounding. */
function sameAs(
  t: Test,
  model: string,
  expected: Expected,
  what: string,
  dtype: FloatDType = 'float16',
): void {
  const wrong = [...weightsIn(model)].flatMap(([path, { shape, values, dtype: stored }]) => {
    const want = expected(path, shape);
    const isNear = values.every(
      (x, i) => Math.abs(x - want[i]) <= 1.01 * places[dtype] * Math.abs(want[i]) + 1e-7,
    );
    return isNear && stored === dtype ? [] : [`${path} ${stored} ${maxDifference(values, want)}`];
  });
  t.same(wrong, [], what);
}

interface Recorded {
  key: string;
  ratios: Record<string, number>;
  base: string | null;
  stride: number;
  dtype: 'float32' | 'float16';
  values: string;
}
interface Blocks {
  blocks: Record<string, string>;
  texts: string[];
  order: string[];
}
const [recordedBlocks, ...recorded] = goldenLines<Recorded | Blocks>('merge_models') as [
  Blocks,
  ...Recorded[],
];

test("kohya's weighted sums, and A1111's sum with a difference", async (t) => {
  const merges = new Set(recorded.map(({ ratios, base }) => JSON.stringify({ ratios, base })));
  t.equal(merges.size, 5);
  for (const merge of merges) {
    const { ratios, base } = JSON.parse(merge) as Pick<Recorded, 'ratios' | 'base'>;
    const shares = Object.entries(ratios).flatMap(([letter, by]) => ['--merge', `${at(letter)}:${by}`]);
    const argv = [...shares, ...(base ? ['--merge-base', at(base)] : [])];
    const mine = recorded.filter(
      (line) => JSON.stringify({ ratios: line.ratios, base: line.base }) === merge,
    );
    const [{ dtype }] = mine;
    const found = weightsIn(await made(t, a, ...argv, ...(dtype === 'float16' ? [] : ['--dtype', dtype])));
    for (const { key, stride, values: packed } of mine) {
      const want = decodeFloats(Buffer.from(packed, 'base64'), dtype);
      const { values, dtype: stored } = found.get(key) as Stored;
      const got = values.filter((_, i) => i % stride === 0);
      t.same([stored, got.length], [dtype, want.length]);
      // Theirs are rounded after each step, in float32: a number halfway between two of float16 may fall to the other side.
      const off = Math.max(...got.map((x, i) => Math.abs(x - want[i]) / Math.max(Math.abs(want[i]), 0.1)));
      t.ok(off <= (dtype === 'float32' ? 2 ** -20 : 2 ** -10), `${merge} ${key}: ${off}`);
    }
  }
});

test("supermerger's blocks", (t) => {
  const config = presets['sdxl-base'].unet;
  const { blocks, texts, order } = recordedBlocks;
  t.equal(mergedBlockCount(config), order.length);
  t.same([texts, order[0]], [['BASE'], 'BASE']);
  const built = buildComponent(componentConfigs(presets['sdxl-base']).unet);
  const keys = [...namedParameters((built as NonNullable<typeof built>).module).keys()];
  const found = new Map(keys.map((key) => [unetKeyInSgm(key, config), order[mergedBlockOf(key, config)]]));
  for (const [key, block] of Object.entries(blocks)) t.equal(found.get(key), block, key);
  t.same([...new Set(found.values())].sort(), order.slice(1).sort());
  t.end();
});

test('ratios by block, and of the text encoders and the UNet', async (t) => {
  const ratios = recordedBlocks.order.map((_, i) => Math.round(100 * Math.sin(i) ** 2) / 100);
  const config = { ...presets['sdxl-base'].unet };
  const of = (list: readonly number[]) => (path: string) => {
    const [, component, key] = /^([^.]+)\.(.*)$/.exec(path) as RegExpExecArray;
    if (component !== 'unet') return list[0];
    return list.length === 2 ? list[1] : list[mergedBlockOf(key, config)];
  };
  const sum = (at: (path: string) => number) =>
    sumOf((path) => [[1 - at(path), 'a'] as const, [at(path), 'b'] as const]);
  sameAs(t, await made(t, a, '--merge', `${b}:${ratios}`), sum(of(ratios)), 'all of them');
  sameAs(t, await made(t, a, '--merge', `${b}:0,0.3`), sum(of([0, 0.3])), 'two');
  // Of each model its own, and the base takes away what they add.
  const both = await made(t, a, '--merge', `${b}:${ratios}`, '--merge', `${d}:0.5,0`, '--merge-base', c);
  const difference = sumOf((path) => {
    const [mine, other] = [of(ratios)(path), of([0.5, 0])(path)];
    return [[1, 'a'] as const, [mine, 'b'] as const, [other, 'd'] as const, [-mine - other, 'c'] as const];
  });
  sameAs(t, both, difference, 'with a difference');
});

test("a ratio of 0 leaves A's bits, and one of 1 B's", async (t) => {
  const bits = (model: string) =>
    new Map([...weightsIn(model)].map(([path, { bytes }]) => [path, Buffer.from(bytes).toString('base64')]));
  /** With zeros of both signs. */
  const signed = writeTiny(at('signed'), 'float16', (path, shape) =>
    formula('b', path, shape).map((x, i) => (i % 3 ? x : i % 2 ? -0 : 0)),
  );
  t.same(bits(await made(t, signed, '--merge', `${b}:0`)), bits(signed));
  t.same(bits(await made(t, a, '--merge', `${signed}:1`)), bits(signed));
  t.same(bits(await made(t, a, '--merge', `${b}:0.75`, '--merge-base', b)), bits(a), 'no difference');
  const vae = join('vae', 'diffusion_pytorch_model.safetensors');
  const out = await made(t, a, '--merge', `${b}:0.5`, '--save-keys', 'unet,vae');
  t.same(contents(join(out, vae)), contents(join(tiny, vae)), 'the VAE stays');
});

test('folders, single files, GGUF and UNets alone, in any type', async (t) => {
  const want = sumOf(() => [[0.6, 'a'] as const, [0.4, 'b'] as const]);
  const [single, gguf] = [
    await made(t, b, '--format', 'single-file', '--dtype', 'float32'),
    await made(t, b, '--format', 'gguf'),
  ];
  sameAs(t, await made(t, a, '--merge', `${single}:0.4`), want, 'a single file in float32');
  sameAs(t, await made(t, a, '--merge', `${gguf}:0.4`), want, 'GGUF');
  const file = await made(t, a, '--format', 'single-file');
  const argv = ['--configs', tiny, '--merge', `${gguf}:0.4`];
  sameAs(t, await made(t, file, ...argv, '--dtype', 'bfloat16'), want, 'into a single file', 'bfloat16');
  const halves = sumOf((path) => [
    [path.startsWith('unet') ? 0.6 : 1, 'a'] as const,
    [path.startsWith('unet') ? 0.4 : 0, 'b'] as const,
  ]);
  const alone = await made(t, b, '--format', 'gguf', '--save-keys', 'unet');
  for (const unet of [alone, join(b, 'unet'), join(b, 'unet', tinyFiles.unet)])
    sameAs(t, await made(t, a, '--merge', `${unet}:0,0.4`), halves, unet);
  const out = await made(t, a, '--merge', `${b}:0.4`, '--format', 'single-file');
  sameAs(t, await made(t, out, '--configs', tiny), want, 'to a single file');
  const near = await made(t, a, '--merge', `${b}:0.4`, '--format', 'gguf', '--type', 'f16');
  sameAs(t, await made(t, near, '--configs', tiny, '--dtype', 'float16'), want, 'to GGUF');
});

test('an inpainting model is merged with a plain one in the channels of the latents', async (t) => {
  const inpainting = writeInpainting(at('inpainting'));
  const key = 'unet.conv_in.weight';
  const first = formula('inpainting', 'conv_in.weight', [16, 9, 3, 3]);
  const wanted = (own: number, of: Record<string, number>) => {
    const others = Object.entries(of).map(([letter, by]) => ({ by, x: formula(letter, key, [16, 4, 3, 3]) }));
    return Float32Array.from(first, (x, i) => {
      const [o, channel, tap] = [Math.floor(i / 81), Math.floor(i / 9) % 9, i % 9];
      if (channel > 3) return x;
      return others.reduce((sum, { by, x }) => sum + by * x[(o * 4 + channel) * 9 + tap], own * x);
    });
  };
  const plain = await made(t, inpainting, '--merge', `${b}:0.3`);
  const got = (out: string) => weightsIn(out).get(key) as Stored;
  t.same(got(plain).shape, [16, 9, 3, 3]);
  t.ok(maxDifference(got(plain).values, wanted(0.7, { b: 0.3 })) < 2 ** -11, 'a weighted sum');
  const tuned = await made(t, inpainting, '--merge', `${b}:1`, '--merge-base', c);
  t.ok(maxDifference(got(tuned).values, wanted(1, { b: 1, c: -1 })) < 2 ** -10, 'with a difference');
  // Of two, one sees as much as A.
  const mixed = await made(t, inpainting, '--merge', `${inpainting}:0.5`, '--merge', `${b}:0.25`);
  t.ok(maxDifference(got(mixed).values, wanted(0.75, { b: 0.25 })) < 2 ** -11, 'several');
});

test('LoRAs are merged into what the models make', async (t) => {
  const lora = ['--lora', `${writeAdapter(at('lora.safetensors'), { size: 0.1 })}:0.5`];
  const single = ['--dtype', 'float32'];
  const both = await made(t, a, '--merge', `${b}:0.5`, ...lora, ...single);
  const after = await made(t, await made(t, a, '--merge', `${b}:0.5`, ...single), ...lora);
  const before = await made(t, await made(t, a, ...lora, ...single), '--merge', `${b}:0.5`);
  const apart = (one: string, other: string) => {
    const theirs = weightsIn(other);
    return Math.max(
      ...[...weightsIn(one)].map(([path, { values }]) =>
        maxDifference(values, theirs.get(path)?.values ?? []),
      ),
    );
  };
  t.equal(apart(both, after), 0);
  t.ok(apart(both, before) > 1e-3, 'which is not the other order');
  const of = ['--format', 'lora-peft', '--base', a, '--rank', '2', '--save-keys', 'text_encoder'];
  const [extracted, want] = [
    await made(t, a, ...of, '--merge', `${b}:0.5`, ...lora),
    await made(t, both, ...of),
  ];
  t.same(contents(extracted), contents(want), 'of which a LoRA may be extracted');
});

test('a picture of the merged model, and what it says of itself', async (t) => {
  const sum = sumOf(() => [[0.5, 'a'] as const, [0.5, 'b'] as const]);
  const judge = writeTiny(at('judge'), 'float32', (path, shape) => Float32Array.from(sum(path, shape)));
  const out = at('mix.safetensors');
  const argv = ['--merge', `${b}:0.5`, '--dtype', 'float32', '--format', 'single-file', '--quiet', '--json'];
  const { out: said, err } = await sdxl('export', a, out, ...argv);
  const recipe = {
    type: 'sdxl',
    interp_method: 'Weighted sum',
    primary_model: 'a',
    secondary_models: [{ model: 'b', ratios: [0.5] }],
  };
  t.same(JSON.parse(said || err).merge, recipe);
  const file = openSafetensors(out);
  file.close();
  t.same(JSON.parse(file.metadata.sd_merge_recipe), recipe);
  t.equal(file.metadata.format, 'pt');
  const share = ['--merge', `${b}:0.5`, '--merge-base', c];
  const [parts, gguf] = [await made(t, a, ...share), await made(t, a, ...share, '--format', 'gguf')];
  for (const each of [openSafetensors(join(parts, 'unet', tinyFiles.unet)), openGguf(gguf)]) {
    each.close();
    const told = JSON.parse(String(each.metadata.sd_merge_recipe));
    t.same(told, { ...recipe, interp_method: 'Add difference', tertiary_model: 'c' });
  }
  const drawn = async (name: string, ...argv: string[]) => {
    const settings = ['--prompt', 'a fox', '--steps', '2', '--width', '64', '--height', '64', '--seed', '3'];
    const more = ['--dtype', 'float32', '--output', at(`${name}.png`), '--quiet'];
    t.match(await sdxl('sample', ...argv, ...settings, ...more), { status: 0 });
    return (await readPicture(at(`${name}.png`))).data;
  };
  const want = await drawn('judge', '--model', judge);
  t.same(await drawn('mix', '--model', out, '--configs', tiny), want);
  t.ok(maxDifference(await drawn('a', '--model', a), want) > 20, "which is not A's");
});

test('mistakes leave nothing', async (t) => {
  const edited = (name: string, file: string, more: object): string => {
    cpSync(b, at(name), { recursive: true });
    const path = join(at(name), file);
    writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), ...more }));
    return at(name);
  };
  const scheduler = join('scheduler', 'scheduler_config.json');
  const velocity = edited('velocity', scheduler, { prediction_type: 'v_prediction' });
  const marked = at('marked.safetensors');
  t.match(await sdxl('export', velocity, marked, '--format', 'single-file', '--quiet'), { status: 0 });
  const edm = edited('edm', scheduler, { _class_name: 'EDMEulerScheduler' });
  const short = edited('short', scheduler, {});
  truncateSync(join(short, 'unet', tinyFiles.unet), 5000);
  const large = writeTiny(at('large'), 'float32', (path, shape) =>
    path === 'unet.conv_out.bias' ? new Float32Array(4).fill(1e6) : formula('b', path, shape),
  );
  const broken = writeTiny(at('broken'), 'float16', (path, shape) =>
    formula('b', path, shape).map((x) => (path === 'unet.conv_out.weight' ? Number.NaN : x)),
  );
  const shallow = edited('shallow', join('unet', 'config.json'), { transformer_layers_per_block: [1, 1, 1] });
  const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
  const inpainting = at('inpainting');
  const out = at('none');
  const call = (...argv: string[]) => sdxl('export', a, out, '--quiet', ...argv);
  await refusesEach(t, call, [
    [['--merge', b], /--merge takes a model and how much of it, such as .*:0\.3/],
    [['--merge', `${b}:much`], /--merge FILE:RATIO takes a number, not "much"/],
    [['--merge', `${b}:1,2,3`], /has 3 ratios: give one, two \(.*\), or 20 \(BASE, IN00 to OUT08\)/],
    [['--merge', `${at('nothing')}:1`], /no model at/],
    [['--merge-base', c], /name these with --merge FILE:RATIO/],
    [
      ['--merge', `${b}:1`, '--save-keys', 'vae'],
      /--merge changes nothing of what --save-keys names \(vae\)/,
    ],
    [
      ['--merge', `${b}:1`, '--format', 'lora-kohya'],
      /--merge is for a model's parts, and lora-kohya is one file/,
    ],
    [
      ['--merge', `${refiner}:0.5`],
      /unet\.\S+ is (absent|\[[\d,]+\]) in .*refiner and .* in .*; merge models of one arch/,
    ],
    [['--merge', `${shallow}:0.5`], /unet\.down_blocks\S+ is absent in .*shallow and \[\d+/],
    [
      ['--merge', `${inpainting}:0.5`],
      /is an inpainting model and .* is none: give the former in the first place/,
    ],
    [
      ['--merge', `${b}:1`, '--merge-base', inpainting],
      /unet\.conv_in\.weight is \[16,4,3,3\] in .*b and \[16,9,3,3\] in/,
    ],
    [
      ['--merge', `${marked}:0.5`],
      /marked\.safetensors predicts v_prediction and .*a epsilon: merge models that predict the same/,
    ],
    [['--merge', `${edm}:0.5`], /edm predicts epsilon under EDM's noise and .*a epsilon/],
    [['--merge', `${velocity}:0.5`, '--merge-base', c], /velocity predicts v_prediction and .*c epsilon/],
    [['--merge', `${join(b, 'unet')}:0.5`], /unet has no text_encoder to be merged; .* as in 0,0\.3/],
    [['--merge', `${short}:0.5`], /short.unet.diffusion_pytorch_model\.safetensors.* is truncated/],
    [
      ['--merge', `${broken}:0.5`],
      /broken.unet: tensor conv_out\.weight holds NaN or infinity; the file is damaged/,
    ],
    [
      ['--merge', `${large}:0.5`],
      /conv_out\.bias holds 5\d+.*, more than float16 can; export it as bfloat16/,
    ],
  ]);
  t.notOk(existsSync(out), 'nothing is written');
  t.same(
    readdirSync(folder).filter((name) => name.startsWith('none')),
    [],
    'nor beside it',
  );
  // The difference of two that predict the same may be added to what predicts something else.
  await made(t, velocity, '--merge', `${b}:0.5`, '--merge-base', c, '--save-keys', 'unet');
  // And a UNet alone does not say what it predicts.
  await made(t, velocity, '--merge', `${join(b, 'unet')}:0,0.5`, '--save-keys', 'unet');
});
