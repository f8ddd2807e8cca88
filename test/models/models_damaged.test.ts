// Damaged checkpoints through the command line, one flaw at a time in a copy of the tiny model: one sentence that names the
// file or the tensor, status 2, and nothing left behind. (The reader's own hostile headers are in safetensors.test.ts; mistakes in
// the flags in cli.test.ts.)
import { cpSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { encodeNumbers } from '../../io/dtype.ts';
import { readJsonObject } from '../../io/json.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { inspect } from '../../models/inspect.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder } from '../support/golden.ts';

const UNET = join('unet', 'diffusion_pytorch_model.safetensors');

/** Writes the UNet again with its tensors changed; returning undefined leaves one out. */
const retold =
  (change: (entry: TensorEntry) => TensorEntry | undefined) =>
  (model: string): void => {
    const path = join(model, UNET);
    const file = openSafetensors(path);
    const entries = [...file.tensors.values()].map(({ name, dtype, shape }) => ({
      name,
      dtype,
      shape,
      bytes: file.read(name),
    }));
    file.close();
    writeSafetensors(
      path,
      entries.flatMap((entry) => change(entry) ?? []),
    );
  };

/** One tensor as float32 with its first number replaced. */
const firstNumber = (name: string, value: number) =>
  retold((entry) => {
    if (entry.name !== name) return entry;
    const values = new Float32Array(entry.shape.reduce((a, b) => a * b, 1));
    values[0] = value;
    return { ...entry, dtype: 'float32', bytes: encodeNumbers(values, 'float32') };
  });

const shard = (i: number, count: number) =>
  UNET.replace('.safetensors', `-0000${i}-of-0000${count}.safetensors`);

/** As shards: the first has the whole UNet, and the others what `more` says. */
const sharded =
  (more: Readonly<Record<string, TensorEntry[]>>) =>
  (model: string): void => {
    renameSync(join(model, UNET), join(model, shard(1, 2)));
    for (const [name, entries] of Object.entries(more)) writeSafetensors(join(model, name), entries);
  };

const bias = { name: 'conv_out.bias', dtype: 'float32', shape: [4], bytes: new Uint8Array(16) } as const;

/** Keys of a JSON file with other values. */
const telling =
  (name: string, keys: object) =>
  (model: string): void => {
    const path = join(model, name);
    writeFileSync(path, JSON.stringify({ ...readJsonObject(path), ...keys }));
  };

type Header = Record<string, { data_offsets: [number, number] }>;

/** The UNet's file with another header before the same data. */
const reheaded =
  (change: (header: Header, names: string[]) => void) =>
  (model: string): void => {
    const path = join(model, UNET);
    const bytes = readFileSync(path);
    const length = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString('utf8', 8, 8 + length)) as Header;
    const names = Object.keys(header).filter((name) => name !== '__metadata__');
    change(header, names);
    const text = Buffer.from(JSON.stringify(header));
    const size = Buffer.alloc(8);
    size.writeBigUInt64LE(BigInt(text.length));
    writeFileSync(path, Buffer.concat([size, text, bytes.subarray(8 + length)]));
  };

const writing = (name: string, text: string) => (model: string) => writeFileSync(join(model, name), text);

const claimed = (length: bigint) => (model: string) => {
  const bytes = readFileSync(join(model, UNET));
  bytes.writeBigUInt64LE(length, 0);
  writeFileSync(join(model, UNET), bytes);
};

const cases: readonly (readonly [flaw: string, damage: (model: string) => void, says: readonly RegExp[]])[] =
  [
    ...(['model_index.json', 'unet/config.json', 'vae/config.json', 'text_encoder/config.json'] as const).map(
      (name) =>
        [`nothing in ${name}`, writing(name, 'null'), [/config|index/, /a JSON object/, /download/]] as const,
    ),
    [
      'no schedule',
      (model) => rmSync(join(model, 'scheduler'), { recursive: true }),
      [/has no scheduler\/scheduler_config\.json; the model is incomplete/],
    ],
    ['an empty config', writing('unet/config.json', '{}'), [/unet/, /"block_out_channels" is undefined/]],
    [
      'a schedule in words',
      writing('scheduler/scheduler_config.json', '{"beta_end": "small"}'),
      [/beta_end is "small", but must be a number/],
    ],
    [
      'a billion layers of a UNet',
      telling('unet/config.json', { transformer_layers_per_block: [1, 1e9, 2] }),
      [/"transformer_layers_per_block" is \[1,1000000000,2\], not a whole number from 0 to 100/],
    ],
    [
      'a billion layers of a text encoder',
      telling('text_encoder/config.json', { num_hidden_layers: 1e9 }),
      [/"num_hidden_layers" is 1000000000, not a whole number from 1 to 100/],
    ],
    [
      'a list without end, of which not all is told',
      telling('unet/config.json', { up_block_types: Array(5000).fill(1) }),
      [/"up_block_types" is \[[1,]{4900,5000}\.\.\.\n$/],
    ],
    [
      'lists in lists without end',
      writing('unet/config.json', `{"act_fn": ${'['.repeat(1e5)}${']'.repeat(1e5)}}`),
      [/unet\/config\.json has lists or objects more than 64 deep: download it again/],
    ],
    [
      'a width that is infinite',
      (model) => {
        const path = join(model, 'vae/config.json');
        writeFileSync(path, readFileSync(path, 'utf8').replace(/16(?=,)/, 'Infinity'));
      },
      [/"block_out_channels" is \[null,24,32,32\], not a list of widths/],
    ],
    [
      'an activation that is no text',
      telling('text_encoder/config.json', { hidden_act: { toString: 1 } }),
      [/hidden_act \{"toString":1\} is not supported/],
    ],
    [
      'a token whose id is no number',
      telling('tokenizer/vocab.json', { ied: { toString: 1 } }),
      [/tokenizer has ids in vocab\.json that are no token ids/],
    ],
    [
      'a length that is no number',
      telling('tokenizer/tokenizer_config.json', { model_max_length: { toString: 1 } }),
      [/tokenizer has model_max_length \{"toString":1\}: correct it/],
    ],
    ['header longer than the file', claimed(50_000_000n), [/unet/, /ends inside its header/, /download/]],
    ['header of impossible length', claimed(2n ** 62n), [/unet/, /claims a header of/, /download/]],
    [
      'overlapping offsets',
      reheaded((header, names) => {
        const [begin, end] = header[names[1]].data_offsets;
        header[names[1]].data_offsets = [begin - 2, end - 2];
      }),
      [/unet/, /tensor ".*" .* overlaps/],
    ],
    [
      'offsets out of range',
      reheaded((header, names) => {
        const last = names.reduce((a, b) => (header[a].data_offsets[1] > header[b].data_offsets[1] ? a : b));
        const [begin, end] = header[last].data_offsets;
        header[last].data_offsets = [begin + 1e9, end + 1e9];
      }),
      [/unet/, /tensor ".*" .* has offsets outside the file/],
    ],
    [
      'missing, unexpected and misshapen tensors, all named',
      retold((entry) => {
        if (entry.name === 'conv_in.bias' || entry.name === 'mid_block.resnets.0.norm1.weight')
          return undefined;
        if (entry.name === 'conv_out.bias') return { ...entry, name: 'conv_out.wrong' };
        if (entry.name === 'time_embedding.linear_1.bias') return { ...entry, shape: [1, ...entry.shape] };
        return entry;
      }),
      [
        /missing [^;]*conv_in\.bias/,
        /missing [^;]*mid_block\.resnets\.0\.norm1\.weight/,
        /missing [^;]*conv_out\.bias/,
        /unexpected conv_out\.wrong/,
        /misshapen time_embedding\.linear_1\.bias is \[1,64\] and should be \[64\]/,
      ],
    ],
    ['NaN in weights', firstNumber('conv_in.bias', Number.NaN), [/unet: tensor conv_in\.bias holds NaN/]],
    [
      'infinity in weights',
      firstNumber('conv_in.bias', -Infinity),
      [/tensor conv_in\.bias holds NaN or inf/],
    ],
    [
      'a number too large for float16',
      firstNumber('conv_in.bias', 65520),
      [/unet: tensor conv_in\.bias holds numbers too large for float16/, /bfloat16 or float32/],
    ],
    [
      'a pickle in place of weights',
      (model) => renameSync(join(model, UNET), join(model, 'unet', 'diffusion_pytorch_model.bin')),
      [/unet.*diffusion_pytorch_model\.bin is a pickle/, /can run code/, /\.safetensors/],
    ],
    [
      'a pickle under the name of safetensors',
      (model) => writeFileSync(join(model, UNET), Buffer.from('PK\x03\x04 archive/data.pkl and more')),
      [/unet/, /pickle/],
    ],
    ['no weights', (model) => rmSync(join(model, UNET)), [/unet has no \.safetensors file/, /download/]],
    [
      'a text encoder left out',
      (model) => rmSync(join(model, 'text_encoder'), { recursive: true }),
      [
        /has no text_encoder, and its UNet takes 80 .*, of which text_encoder_2 gives 48; .*download it again/,
      ],
    ],
    [
      "another model's text encoder",
      (model) => cpSync(join(model, 'text_encoder_2'), join(model, 'text_encoder'), { recursive: true }),
      [/takes 80 features of text and its text encoders give 96; take all of them from one model/],
    ],
    [
      "another model's widths of embedded sizes",
      telling('unet/config.json', { addition_time_embed_dim: 32 }),
      [/takes a pooled prompt of -56 numbers, by .* and text_encoder_2 gives 40; take config and weights/],
    ],
    [
      'a tokenizer of longer prompts',
      telling('tokenizer_2/tokenizer_config.json', { model_max_length: 248 }),
      [/tokenizer_2 makes 248 tokens of a prompt, and its text encoder takes 77: correct model_max_length/],
    ],
    ['a shard is missing', sharded({}), [/unet has 1 of 2 shards; download the missing ones/]],
    [
      'shards of two models',
      sharded({ [shard(2, 2)]: [], [shard(3, 3)]: [] }),
      [/unet has shards of 2 and of 3; remove what is not its own/],
    ],
    [
      'a tensor in two shards',
      sharded({ [shard(2, 2)]: [bias] }),
      [/1-of-00002.safetensors and .*2-of-00002.safetensors both have tensor conv_out\.bias; download/],
    ],
    [
      'no config',
      (model) => rmSync(join(model, 'unet', 'config.json')),
      [/no unet\/config\.json/, /download/],
    ],
  ];

test('damaged checkpoints', async (t) => {
  for (const [flaw, damage, says] of cases) {
    const folder = mkdtempSync(join(tmpdir(), 'sdxl-damaged-'));
    const model = join(folder, 'model');
    cpSync(join(goldenFolder, 'tiny-sdxl'), model, { recursive: true });
    damage(model);
    const argv = ['--width', '64', '--height', '64', '--steps', '1', '--dtype', 'float16', '--quiet'];
    const files = ['--output', join(folder, 'x.png'), '--save-latents', join(folder, 'x.safetensors')];
    const { status, err } = await sdxl('sample', '--model', model, '--prompt', 'x', ...argv, ...files);
    t.equal(status, 2, `${flaw}: status`);
    t.equal(err.trim().split('\n').length, 1, `${flaw}: one line`);
    for (const word of says) t.match(err, word, `${flaw}: ${err.trim()}`);
    t.equal(readdirSync(folder).join(), 'model', `${flaw}: no file is left`);
    rmSync(folder, { recursive: true });
  }
});

test('a class that is no text', (t) => {
  const model = t.testdir({});
  cpSync(join(goldenFolder, 'tiny-sdxl', 'text_encoder'), model, { recursive: true });
  telling('config.json', { architectures: [5] })(model);
  t.match(inspect(model).problems, ['its config names no class']);
  t.end();
});
