// Training a textual inversion: gradients and steps of the new vectors against torch over diffusers' and transformers' models
// (golden/textual_inversion_training.py), runs that resume bit for bit, what comes of them, and mistakes.
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { gradOf } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { inspect } from '../../models/inspect.ts';
import { readTextualInversion } from '../../models/text/textual_inversion.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { openMaterials } from '../../train/materials.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import type { Session } from '../../train/session.ts';
import { sdxl } from '../support/command_line.ts';
import { picture } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { refuses, runFile } from '../support/run_files.ts';
import {
  basic,
  device,
  digest,
  folder,
  locate,
  losses,
  model,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

/** Of an encoder: float32 in base64, [vectors, width]; `noise` of gradient and vectors. */
interface Golden {
  name: string;
  token: string;
  word: string;
  captions: string[];
  begun: string;
  gradient: string;
  after: string;
  noise: [number, number];
}

const golden = goldenLines<Golden>('textual_inversion_training');
const [{ token, word, captions }] = golden;
const floats = (text: string): Float32Array => decodeFloats(Buffer.from(text, 'base64'), 'float32');

/** A folder of pictures with these captions. */
function captioned(name: string, texts: readonly string[]): string {
  const path = join(folder, name);
  mkdirSync(path);
  for (const [i, text] of texts.entries()) {
    writePng(join(path, `${i}.png`), picture(i, 48, 40));
    writeFileSync(join(path, `${i}.txt`), text);
  }
  return path;
}

const toys = captioned('toys', [...captions, `${token} alone`, `stripes\tof ${token.toUpperCase()}`]);

/** What a run of the token has beside what `basic` has. */
const more: RunInput = {
  train: { target: 'textual_inversion' },
  textual_inversion: { placeholder_token: token, initializer_token: word, num_vectors: 3 },
  dataset: { path: toys, resolution: 32, random_flip: true, crops: 2, cache: join(folder, 'cache') },
};
const tokenRun = (output: string): RunInput => ({ ...basic(output), ...more });
const opened = (input: RunInput) => openMaterials(resolveRun(input, 'test', 'test'), locate, silent);

/** Numbers [n, h, w, c] as the script has them. */
const formula = (step: number, size: number) =>
  Float32Array.from({ length: size }, (_, i) => (((step * i + Math.floor(i / 7)) % 129) - 64) / 64);

/** The script's pass: its captions as ours reach the encoders, the rest by its formulas. */
async function goldenPass({ task }: Session) {
  const inputs = await task.prepare({ bucket: 0, samples: [0, 1] }, 0);
  const shape = [2, 8, 8, 4];
  return {
    ...inputs,
    sample: { shape, values: formula(5, 512), dtype: 'float32' as const },
    target: { shape, values: formula(3, 512), dtype: 'float32' as const },
    timesteps: { ...inputs.timesteps, values: Float32Array.of(7, 803) },
    timeIds: {
      ...inputs.timeIds,
      values: Float32Array.of(64, 96, 0, 0, 64, 64, 80, 100, 8, 2, 64, 64),
    },
  };
}

test('vectors begin, get gradients and are moved as by torch over the whole tables', async (t) => {
  const before = device.memory.storages;
  const session = await sessionOf(
    await opened({ ...tokenRun('golden'), optimizer: { weight_decay: 0.1 }, ema: { decay: 0 } }),
  );
  const { parameters, passes, optimizer } = session;
  t.same([...parameters.keys()], ['textual_inversion.clip_l', 'textual_inversion.clip_g'], 'nothing else');
  const inputs = await goldenPass(session);
  const each = (check: (own: Parameter, one: Golden) => void) => {
    for (const one of golden) check(parameters.get(`textual_inversion.${one.name}`) as Parameter, one);
  };
  each((own, { name, begun }) => t.same(own.tensor.floats(), floats(begun), `${name} begins as the word`));
  for (let step = 0; step < 4; step++) {
    passes.queue(inputs, 1).release();
    passes.gather();
    if (step === 0)
      each(({ tensor }, { name, gradient, noise }) => {
        const got = scope(() => gradOf(tensor)?.floats() ?? []);
        allClose(t, `gradient of ${name}`, got, floats(gradient), { atol: 20 * noise[0], rtol: 0 });
      });
    optimizer.step(0.01);
    passes.broadcast();
    passes.clear();
  }
  each(({ tensor }, { name, after, noise }) =>
    allClose(t, `${name} after four steps`, tensor.floats(), floats(after), { atol: 20 * noise[1], rtol: 0 }),
  );
  session.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('runs resume bit for bit, and what they made is drawn with, read and gone on from', async (t) => {
  const before = device.memory.storages;
  const final = await resumes(t, 'token', {
    ...more,
    train: { target: 'textual_inversion', gradient_checkpointing: true },
    dataset: { ...more.dataset, caption_dropout_rate: 0.3, shuffle_caption: true },
    previews: { prompts: [`a ${token}`, 'stripes'], num_inference_steps: 1, every_steps: 1 },
    validation: { samples: 2 },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  t.same(
    readdirSync(final).sort(),
    [`${token}.safetensors`, 'run.json'],
    'the file has the name of the token',
  );
  const whole = join(folder, 'token-whole');
  t.ok(
    nonEmpty(losses(whole)).every(
      ([, loss, validated]) => Number.isFinite(loss) && Number.isFinite(validated),
    ),
  );
  const drawn = (step: number, i: number) =>
    readFileSync(join(whole, 'previews', `step-0000000${step}`, `${i}.png`));
  const pixels = (bytes: Buffer) => bytes.subarray(bytes.indexOf('IDAT'));
  t.notOk(pixels(drawn(1, 0)).equals(pixels(drawn(3, 0))), 'previews are drawn with the token as it is');
  t.ok(pixels(drawn(1, 1)).equals(pixels(drawn(3, 1))), 'and others are as ever');

  const path = join(final, `${token}.safetensors`);
  const file = openSafetensors(path);
  t.same(
    [...file.tensors.values()].map(({ name, shape, dtype }) => [name, shape, dtype]),
    [
      ['clip_g', [3, 48], 'float32'],
      ['clip_l', [3, 32], 'float32'],
    ],
  );
  t.equal(file.metadata['modelspec.architecture'], 'stable-diffusion-xl-v1-base/textual-inversion');
  file.close();
  const read = readTextualInversion(final);
  t.equal(read.token, token);
  t.ok(maxDifference(read.clip_l.values, floats(golden[0].begun)) > 0, 'it has learnt');
  t.match(inspect(final).kind, /^textual inversion/);
  const checkpoint = listCheckpoints(whole).at(-1) as string;
  t.match(inspect(checkpoint).kind, /^textual inversion/);

  const sample = async (...more: string[]) => {
    const output = join(folder, 'drawn.png');
    const { status, err } = await sdxl(
      ...['sample', '--model', model, '--prompt', `a ${token}`, '--steps', '2', '--seed', '1', '--quiet'],
      ...['--width', '64', '--height', '64', '--output', output, ...more],
    );
    t.equal(status, 0, err);
    return pixels(readFileSync(output));
  };
  const plain = await sample();
  for (const place of [final, checkpoint])
    t.notOk(plain.equals(await sample('--textual-inversion', place)), 'sdxl sample draws with it');

  const next: RunInput = {
    ...tokenRun('token-next'),
    ...{ steps: 2, ema: { decay: 0 }, optimizer: { lr: 0 } },
    textual_inversion: { placeholder_token: token, weights: path, num_vectors: 3 },
  };
  const begun = await run(next, { until: 1 });
  rmSync(path);
  const { folder: end } = await run(next, { checkpoint: begun.folder });
  const after = readTextualInversion(end);
  t.same([after.clip_l.values, after.clip_g.values], [read.clip_l.values, read.clip_g.values], 'and goes on');

  const refused = async (sentence: RegExp, ...argv: string[]) => {
    const { status, err } = await sdxl(...argv);
    t.equal(status, 2, err);
    t.match(err, sentence);
  };
  const out = join(folder, 'exported');
  await refused(
    /is a textual inversion's, which .* read as it is: take the file in /,
    'export',
    checkpoint,
    out,
  );
  await refused(/final holds a textual inversion, which sdxl sample takes as /, 'export', end, out);
});

test('in bfloat16, beside a UNet in 8 bits, under a mask, and moved while backward walks', async (t) => {
  const halves = { ...more, dtype: 'bfloat16' as const, batch_size: 2, gradient_accumulation_steps: 1 };
  const q8 = { target: 'textual_inversion', gradient_checkpointing: true, q8: true } as const;
  const ended = [false, true].map(async (fused_backward_pass) => {
    const input = { ...basic(`token-fused-${fused_backward_pass}`), ...halves, steps: 2 };
    const { folder: final } = await run({ ...input, train: { ...q8, fused_backward_pass } });
    return digest(final);
  });
  const [kept, handed] = [await ended[0], await ended[1]];
  t.equal(kept, handed, 'the same bits');
  const dataset = { ...more.dataset, alpha_mask: true };
  const masked = await run({
    ...tokenRun('token-masked'),
    dataset,
    steps: 1,
    objective: { masked_loss: true },
  });
  t.ok(readTextualInversion(masked.folder).clip_g.values.every(Number.isFinite));
});

test('templates, and the plan', async (t) => {
  const bare = captioned('bare', ['', 'of its own']);
  rmSync(join(bare, '0.txt'));
  const materials = async (learnable_property: 'object' | 'style') =>
    opened({
      ...tokenRun('templates'),
      textual_inversion: { ...more.textual_inversion, learnable_property },
      dataset: { ...more.dataset, path: bare },
    });
  const objects = await materials('object');
  const styles = await materials('style');
  const counts = [objects, styles].map(({ pictures }) =>
    pictures.samples.map((each) => each.captions.length),
  );
  t.same(counts, [
    [27, 27],
    [17, 17],
  ]);
  t.ok(objects.pictures.samples[1].captions.includes(`a cropped photo of the ${token}`));
  t.ok(styles.pictures.samples[0].captions.includes(`the painting in the style of ${token}`));
  const plan = planOf(styles);
  t.equal(plan.trained_parameters, 3 * (32 + 48));
  t.ok(
    describe(plan).some((line) =>
      line.endsWith(
        `textual_inversion ("${token}", 3 vectors from "${word}", templates of style): 240 parameters`,
      ),
    ),
    describe(plan).join('\n'),
  );
});

test('what a run may get wrong', async (t) => {
  const saved = join(folder, 'three.safetensors');
  writeSafetensors(
    saved,
    golden.map(({ name, begun }) => {
      const bytes = Buffer.from(begun, 'base64');
      return { name, dtype: 'float32', shape: [3, bytes.length / 12], bytes };
    }),
  );
  const given = (keys: RunInput['textual_inversion'], others: object = {}) => ({
    train: { target: 'textual_inversion' },
    dataset: { path: toys, resolution: 32 },
    textual_inversion: { placeholder_token: token, initializer_token: 'red', ...keys },
    ...others,
  });
  const sparse = captioned('sparse', [`a ${token}`, 'nothing', 'none']);
  const late = captioned('late', [`${'red, '.repeat(40)}${token}`, token]);
  const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
  const cases: [keys: object, sentence: RegExp][] = [
    [
      given({ placeholder_token: '' }),
      /"textual_inversion\.placeholder_token" is empty; name what is learnt/,
    ],
    [given({ placeholder_token: 'a/b' }), /placeholder_token" is "a\/b", and a file is named by it/],
    [given({ placeholder_token: 'Red' }), /is "Red", and the tokenizer has a token "Red" already; make up/],
    [given({ initializer_token: '' }), /"textual_inversion\.initializer_token" is empty; name a word/],
    [given({ weights: saved }), /"textual_inversion\.weights" both say what the token begins as/],
    [given({ initializer_token: 'a red fox' }), /comes to \d tokens, and .*num_vectors is 1; set that to \d/],
    [given({ num_vectors: 0 }), /"textual_inversion\.num_vectors" is 0; it takes a whole number from 1/],
    [given({ learnable_property: 'pose' as 'style' }), /"textual_inversion\.learnable_property" is "pose"/],
    [
      given({}, { dataset: { path: sparse, resolution: 32 } }),
      /2 of 3 captions have no "<toy>", such as "nothing"; write it into each, or set .*learnable_property/,
    ],
    [
      given({}, { dataset: { path: late, resolution: 32 } }),
      /1 of 2 captions have "<toy>" past the tokens that are read/,
    ],
    [
      given(
        { learnable_property: 'object' },
        { dataset: { path: toys, resolution: 32, instance_prompt: 'a' } },
      ),
      /takes templates for all captions, and "dataset\.instance_prompt" is one/,
    ],
    [
      given({}, { model: refiner, dataset: { path: toys, resolution: 64 } }),
      /has one text encoder, as a refiner has/,
    ],
    [
      given({ initializer_token: '', weights: saved }),
      /three\.safetensors has 3 vectors, and the run 1; set textual_inversion\.num_vectors to that/,
    ],
    [
      given({ initializer_token: '', weights: join(folder, 'nowhere.safetensors') }),
      /nowhere\.safetensors does not exist/,
    ],
    [given({}, { train: { target: 'lora' } }), /is of a token's vectors, and "train\.target" is "lora"/],
    [
      given({}, { train: { target: 'textual_inversion', text_encoders: true } }),
      /"train\.text_encoders" trains .* target "textual_inversion" does not/,
    ],
  ];
  for (const [i, [keys, sentence]] of cases.entries())
    await refuses(t, String(sentence), sentence, 'train', runFile(`token-${i}`, keys));
});
