// Packs golden data as its generator leaves it into test/golden: `node dist/test/golden_pack.js FOLDER`. Cases, their tensors (large ones
// as sums of their elements) and LoRA files are compressed; a single file becomes a recipe, as its numbers are the folder's; files that
// equal others become links to them; tokenizer.json, pictures and tensors that no test reads are left out. Without FOLDER it packs what the
// scripts in test/golden left there, NAME.jsonl.
import { createHash } from 'node:crypto';
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { brotliCompressSync, constants } from 'node:zlib';
import { decodeFloats, encodeNumbers } from '../io/dtype.ts';
import { openSafetensors } from '../io/safetensors.ts';
import type { TensorFile } from '../io/tensor_file.ts';
import {
  type Expectation,
  folded,
  type GoldenCase,
  goldenFolder,
  permuted,
  type SingleFileRecipe,
  transposed,
} from './support/golden.ts';

const [, , from] = process.argv;

function pack(path: string, bytes: Buffer): void {
  const { BROTLI_PARAM_QUALITY, BROTLI_PARAM_LGWIN } = constants;
  const params = { [BROTLI_PARAM_QUALITY]: 11, [BROTLI_PARAM_LGWIN]: 24 };
  writeFileSync(join(goldenFolder, `${path}.br`), brotliCompressSync(bytes, { params }));
}

interface Cases {
  areas: Record<string, { cases: GoldenCase[] }>;
}

/**
 * Areas and labels of which sums are kept. The embeddings of encode_prompt and the UNet's outputs are inputs of other tests,
 * and what a norm gives into which we fold a SiLU is expected after it.
 */
const summed: Record<string, RegExp> = {
  ops: /./,
  text: /^(?!.*prompt_embeds)/,
  vae: /^(?!.*conv_norm_out$)/,
  pipeline: /^(image|latents)$/,
  schedulers: /^trajectory$/,
  unet: /^(?!sample$|.*(norm[12]|conv_norm_out)$)/,
  unet_refiner: /^(?!sample$|.*(norm[12]|conv_norm_out)$)/,
};

/** What a test holds to more than its atol, which sums would be more than, or compares in part. */
const whole = ['ddim_eta1.zero_snr trajectory', 'ensemble_0.8 latents'];

/**
 * Tensors that no test reads: the draws of whole calls, as tests draw their own, and trajectories whose `step` is told what nothing here
 * can be, Euler's churn and LMS' order.
 */
const unread: Record<string, RegExp> = {
  pipeline: /\.draws\.\d+$/,
  schedulers: /^(euler\.churn|lms\.order3)\./,
};

/** Takes out of an area's cases what tells of such tensors. */
function withoutUnread(name: string, area: Cases['areas'][string]): void {
  const isUnread = (tensor: unknown) => unread[name]?.test(String(tensor)) ?? false;
  area.cases = area.cases.filter(
    ({ expect }) => !Object.values(expect).some((want) => isUnread(want.tensor)),
  );
  for (const each of area.cases)
    if (Array.isArray(each.draws) && each.draws.some(isUnread)) delete each.draws;
}

/** Their expectations by tensor: those whose atol leaves room for noise and rounding (golden.ts: folded), of what is no input. */
function foldable(name: string, { cases }: Cases['areas'][string]): Map<string, Expectation[]> {
  const found = new Map<string, Expectation[]>();
  const inputs = JSON.stringify(cases, (key, value) => (key === 'expect' ? undefined : value));
  const expectations = cases.flatMap(({ id, expect }) =>
    Object.entries(expect).map(([label, want]) => ({ id, label, want })),
  );
  for (const { id, label, want } of expectations) {
    const { noise = Number.POSITIVE_INFINITY, max_abs = Number.POSITIVE_INFINITY, atol } = want;
    const wide = atol >= 9.9 * noise && atol >= 2 ** -20 * max_abs;
    const held = whole.includes(`${id} ${label}`) || inputs.includes(`"${want.tensor}"`);
    if (summed[name]?.test(label) && wide && !held)
      found.set(want.tensor, [...(found.get(want.tensor) ?? []), want]);
  }
  return found;
}

/** The file with large expected tensors folded, as their cases then say (`of`), and each tensor's bytes plane by plane. */
function packed(path: string, sums: ReadonlyMap<string, Expectation[]>, left?: RegExp): Buffer {
  const file = openSafetensors(path);
  const whole = readFileSync(path);
  const header: Record<string, unknown> = {};
  const parts: Uint8Array[] = [];
  let at = 0;
  for (const { name, storedAs, shape: of, offset, bytes: length } of file.tensors.values()) {
    if (left?.test(name)) continue;
    const wants = storedAs === 'F32' && length >= 2048 ? (sums.get(name) ?? []) : [];
    const stored = whole.subarray(offset, offset + length);
    const bytes =
      wants.length > 0 ? encodeNumbers(folded(decodeFloats(stored, 'float32')), 'float32') : stored;
    for (const want of wants) want.of = [...of];
    const shape = wants.length > 0 ? [bytes.length / 4] : of;
    header[name] = { dtype: storedAs, shape, data_offsets: [at, at + bytes.length] };
    parts.push(transposed(bytes, bytes.length / shape.reduce((a, b) => a * b, 1)));
    at += bytes.length;
  }
  file.close();
  const text = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([size, text, ...parts]);
}

const digest = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

/** Every tensor of a folder as float16, as it is and transposed, by the hash of its bytes. */
function tensorsOf(folder: string): Map<string, string> {
  const found = new Map<string, string>();
  for (const component of readdirSync(folder)) {
    const name = existsSync(join(folder, component, 'config.json'))
      ? readdirSync(join(folder, component)).find((each) => each.endsWith('.safetensors'))
      : undefined;
    if (!name) continue;
    const file = openSafetensors(join(folder, component, name));
    for (const { name: tensor, dtype, shape } of file.tensors.values()) {
      const values = decodeFloats(file.read(tensor), dtype);
      const note = (numbers: Float32Array, part: string) => {
        const hash = digest(encodeNumbers(numbers, 'float16'));
        if (!found.has(hash)) found.set(hash, part);
      };
      note(values, `${component}/${tensor}`);
      if (shape.length === 2) note(permuted(values, shape, [1, 0]), `T ${component}/${tensor}`);
    }
    file.close();
  }
  return found;
}

/** One of the folder's tensors, or three end to end (OpenCLIP's fused q, k and v). */
function partsOf(file: TensorFile, name: string, known: ReadonlyMap<string, string>): string[] {
  const bytes = file.read(name);
  for (const count of [1, 3]) {
    const parts = Array.from({ length: count }, (_, i) =>
      known.get(digest(bytes.subarray((i * bytes.length) / count, ((i + 1) * bytes.length) / count))),
    );
    if (parts.every((part) => part !== undefined)) return parts;
  }
  throw new Error(`${file.path}: ${name} is not made of the folder's tensors`);
}

function recipe(folder: string): SingleFileRecipe {
  const path = join(from, `${folder}-singlefile.safetensors`);
  const file = openSafetensors(path);
  const bytes = readFileSync(path);
  const known = tensorsOf(join(from, folder));
  const header = bytes.toString('utf8', 8, 8 + Number(bytes.readBigUInt64LE(0)));
  return {
    sha256: digest(bytes),
    header,
    parts: [...file.tensors.keys()].map((name) => partsOf(file, name, known)),
  };
}

/** Files that are others' copies, which links stand for. */
const twins = [
  [
    'tiny-sdxl-refiner/vae/diffusion_pytorch_model.safetensors',
    'tiny-sdxl/vae/diffusion_pytorch_model.safetensors',
  ],
  ...['vocab.json', 'merges.txt'].flatMap((file) =>
    ['tiny-sdxl', 'tiny-sdxl-refiner'].map((model) => [
      `${model}/tokenizer_2/${file}`,
      `tiny-sdxl/tokenizer/${file}`,
    ]),
  ),
];

function packFolder(): void {
  // README.md describes what is packed, and so is written here.
  const leftOut =
    /README\.md$|tokenizer\.json$|-singlefile\.safetensors$|cases\.json$|(cases|lora)\/.*\.safetensors$|png\/(?!input|t2i_cfg5)/;
  cpSync(from, goldenFolder, { recursive: true, filter: (path) => !leftOut.test(path) });
  const cases = JSON.parse(readFileSync(join(from, 'cases.json'), 'utf8')) as Cases;
  for (const [name, area] of Object.entries(cases.areas)) {
    const file = `cases/${name}.safetensors`;
    withoutUnread(name, area);
    pack(file, packed(join(from, file), foldable(name, area), unread[name]));
  }
  pack('cases.json', Buffer.from(JSON.stringify(cases)));
  for (const name of readdirSync(join(from, 'lora')))
    pack(`lora/${name}`, readFileSync(join(from, 'lora', name)));
  for (const folder of ['tiny-sdxl', 'tiny-sdxl-refiner'])
    pack(`${folder}-singlefile.json`, Buffer.from(JSON.stringify(recipe(folder))));
  for (const [path, to] of twins) {
    rmSync(join(goldenFolder, path), { force: true });
    symlinkSync(
      relative(join(goldenFolder, dirname(path)), join(goldenFolder, to)),
      join(goldenFolder, path),
    );
  }
}

function packLines(): void {
  for (const name of readdirSync(goldenFolder).filter((each) => each.endsWith('.jsonl'))) {
    pack(name, readFileSync(join(goldenFolder, name)));
    rmSync(join(goldenFolder, name));
  }
}

if (from) packFolder();
else packLines();
