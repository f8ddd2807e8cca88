// `sdxl` beside the real diffusers: our exports must load there, and both must draw the same latents from the same seed, to
// 1e-3 of the largest, for every call of calls.ts. GGUF files are read by gguf's own reader, and OpenAI's own
// client asks the server. Needs Python with torch, transformers, peft, scipy and diffusers (PYTHONPATH counts), gguf and openai; says so
// and stops where they are absent. Run by `npm run test:interop`; words after it
// choose calls by label.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { main } from '../../cli/main.ts';
import type { Terminal } from '../../cli/terminal.ts';
import { decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import { openGguf } from '../../io/gguf.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { packageRoot } from '../../io/package_root.ts';
import { resize } from '../../io/resize.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { writeControlNet } from '../support/controlnet_golden.ts';
import { writeEDM } from '../support/edm_golden.ts';
import { writeInpainting } from '../support/inpainting_golden.ts';
import { writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import { writeT2IAdapter } from '../support/t2i_adapter_golden.ts';
import { argvOf, type Call } from './call.ts';
import { adapter, allCalls, base, type Pictures } from './calls.ts';
import { served } from './served.ts';
import { trained } from './trained.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-interop-'));
let said = '';
const terminal: Terminal = { out: () => {}, err: (text) => void (said += text), live: false };

async function sdxl(...argv: string[]): Promise<void> {
  said = '';
  const status = await main([...argv, '--quiet'], terminal);
  if (status !== 0) throw new Error(`sdxl ${argv.join(' ')} ended with status ${status}: ${said}`);
}

function latents(path: string): { values: Float32Array; shape: string } {
  const file = openSafetensors(path);
  const values = decodeFloats(file.read('latents'), 'float32');
  const shape = file.tensors.get('latents')?.shape.join() as string;
  file.close();
  return { values, shape };
}

/** A picture and a mask of sides that 8 does not divide, the mask with greys. */
async function oddPictures(): Promise<Pictures> {
  const [odd, oddMask] = ['odd.png', 'odd-mask.png'].map((name) => join(folder, name));
  const [width, height] = [117, 149];
  const given = await readPicture(join(packageRoot, 'test', 'golden', 'png', 'input.png'));
  writePng(odd, { ...given, width, height, data: resize(given, width, height, 'bicubic').data });
  const disc = (x: number, y: number) => (Math.hypot(x - 60, y - 70) < 40 ? 255 : 0);
  const grey = (x: number, y: number) => (y > 125 ? [0, 127, 130, 255][Math.floor(x / 30)] : disc(x, y));
  const data = Uint8Array.from({ length: width * height }, (_, i) => grey(i % width, Math.floor(i / width)));
  writePng(oddMask, { width, height, channels: 1, data });
  return { odd, oddMask };
}

export interface Job extends Call {
  /** What `sdxl` draws it from, where that is not the same. */
  ours?: string[];
  configs?: string;
  /** Where diffusers saves its pipeline, with the job's scheduler. */
  save?: string;
  /** A textual inversion's file, and what the prompt calls it. */
  inversion?: readonly [file: string, token: string];
}

/** The tiny model as either program saves it, drawn from by the other; who saves draws from the original. */
async function saved(inpainting: string, { odd, oddMask }: Pictures): Promise<Job[]> {
  const exported = join(folder, 'exported');
  await sdxl('export', base, exported, '--dtype', 'float16', '--max-shard-size', '600kB');
  const single = join(folder, 'single.safetensors');
  await sdxl('export', base, single, '--format', 'single-file', '--dtype', 'float16');
  const settings = {
    prompt: 'a red fox',
    width: 128,
    height: 128,
    num_inference_steps: 5,
    guidance_scale: 5,
  };
  const call: Call = { label: '', pipeline: 'text2img', model: base, seed: 11, settings };
  const save = join(folder, 'theirs');
  const scheduler = { class: 'DPMSolverMultistepScheduler' };
  const jobs: Job[] = [
    {
      ...call,
      label: 'a folder that diffusers saved',
      scheduler,
      save,
      ours: argvOf({ ...call, model: save }),
    },
    { ...call, label: 'export: a sharded folder', model: exported, ours: argvOf(call) },
    { ...call, label: 'export: a single file', model: single, configs: base, ours: argvOf(call) },
  ];
  const nine = join(folder, 'nine.safetensors');
  await sdxl('export', inpainting, nine, '--format', 'single-file', '--dtype', 'float16');
  const masked: Call = {
    ...{ ...call, pipeline: 'inpaint', model: inpainting },
    settings: { ...settings, image: odd, mask_image: oddMask },
  };
  const label = 'export: a single file of an inpainting model';
  jobs.push({ ...masked, label, model: nine, configs: inpainting, ours: argvOf(masked) });
  // As float32 it has the adapter exactly, and nothing else.
  const tuned = join(folder, 'tuned');
  await sdxl('export', base, tuned, '--lora', adapter, '--dtype', 'float32');
  for (const format of ['lora-peft', 'lora-kohya']) {
    const out = join(folder, `${format}.safetensors`);
    await sdxl('export', adapter, out, '--format', format, '--configs', base);
    const ours = argvOf({ ...call, loras: [[adapter, 1]] });
    jobs.push({ ...call, label: `export: ${format}`, loras: [[out, 1]], ours });
    const extracted = join(folder, `extracted-${format}.safetensors`);
    const rank = ['--base', base, '--rank', '4', '--dtype', 'float32'];
    await sdxl('export', tuned, extracted, '--format', format, ...rank);
    jobs.push({ ...call, label: `export: extracted ${format}`, loras: [[extracted, 1]], ours });
  }
  return jobs;
}

/**
 * Adapters of text encoders and of one layer of the UNet, in peft's and in kohya's spelling. Under transformers 5 diffusers
 * loads the first encoder's only by the names that it has there, without `text_model.`, which kohya's do not become.
 */
function textAdapters(): Job[] {
  const layers: [component: string, kohya: string, path: string, width: number][] = [
    ['text_encoder', 'te1', 'text_model.encoder.layers.1.self_attn.q_proj', 32],
    ['text_encoder', 'te1', 'text_model.encoder.layers.2.mlp.fc1', 32],
    ['text_encoder_2', 'te2', 'text_model.encoder.layers.0.self_attn.out_proj', 48],
    ['text_encoder_2', 'te2', 'text_model.encoder.layers.2.self_attn.v_proj', 48],
    ['unet', 'unet', 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q', 32],
  ];
  const generator = new TorchGenerator(5);
  const entry = (name: string, shape: number[]): TensorEntry => {
    const values = generator.randn(shape.reduce((a, b) => a * b, 1)) as Float32Array;
    return { name, dtype: 'float32', shape, bytes: encodeNumbers(values, 'float32') };
  };
  const pairs = layers.map(([component, kohya, path, width]) => ({
    names: {
      peft: `${component}.${component === 'text_encoder' ? path.slice('text_model.'.length) : path}`,
      kohya: `lora_${kohya}_${path.replaceAll('.', '_')}`,
    },
    down: entry('', [4, width]),
    up: entry('', [path.endsWith('fc1') ? 4 * width : width, 4]),
  }));
  const alpha = { ...entry('', []), bytes: encodeNumbers(Float32Array.of(4), 'float32') };
  return (['peft', 'kohya'] as const).map((spelling) => {
    const [down, up] = spelling === 'peft' ? ['lora_A', 'lora_B'] : ['lora_down', 'lora_up'];
    const file = join(folder, `text-${spelling}.safetensors`);
    const loadable = pairs.filter(({ names }) => spelling === 'peft' || !names.kohya.startsWith('lora_te1'));
    const entries = loadable.flatMap((pair) => {
      const name = pair.names[spelling];
      return [
        { ...pair.down, name: `${name}.${down}.weight` },
        { ...pair.up, name: `${name}.${up}.weight` },
        ...(spelling === 'kohya' ? [{ ...alpha, name: `${name}.alpha` }] : []),
      ];
    });
    writeSafetensors(file, entries);
    const settings = {
      prompt: 'a red fox',
      width: 64,
      height: 64,
      num_inference_steps: 4,
      guidance_scale: 5,
    };
    const call: Call = { label: '', pipeline: 'text2img', model: base, seed: 12, settings };
    return { ...call, label: `an adapter of the text encoders, ${spelling}`, loras: [[file, 0.3]] };
  });
}

/** Has diffusers draw them all; false where it is absent. */
function drawTheirs(jobs: readonly (Job & { out: string })[]): boolean {
  const list = join(folder, 'jobs.jsonl');
  writeFileSync(list, jobs.map((job) => `${JSON.stringify(job)}\n`).join(''));
  const script = join(packageRoot, 'test', 'interop', 'diffusers_peer.py');
  // torch may have much to say of a machine.
  const options = { encoding: 'utf8', maxBuffer: 2 ** 28 } as const;
  const { status, stdout, stderr, error } = spawnSync('python3', [script, list], options);
  const isAbsent = error && 'code' in error && error.code === 'ENOENT';
  if (status === 3 || isAbsent) {
    console.log(`SKIPPED: diffusers cannot be loaded here (${stdout?.trim() || 'no python3'})`);
    return false;
  }
  if (error) throw error;
  if (status !== 0) throw new Error(stderr.slice(-2000));
  return true;
}

async function compare(job: Job & { out: string }): Promise<boolean> {
  const saved = join(folder, 'ours.safetensors');
  const files = ['--output', join(folder, 'x.png'), '--save-latents', saved];
  await sdxl(...(job.ours ?? argvOf(job)), ...files);
  const [got, want] = [latents(saved), latents(job.out)];
  const largest = want.values.reduce((max, value) => Math.max(max, Math.abs(value)), 0);
  const error = got.values.reduce((max, value, i) => Math.max(max, Math.abs(value - want.values[i])), 0);
  const ok = got.shape === want.shape && error <= 1e-3 * largest;
  const told = `largest difference ${(error / largest).toExponential(1)} of the largest latent`;
  console.log(`${ok ? 'ok' : 'NOT OK'}  ${job.label}: ${told}`);
  return ok;
}

/** Of each of our exports to GGUF whether gguf's own reader sees what it says of itself, and every number as ours reads it. */
async function readByGguf(words: readonly string[]): Promise<boolean[]> {
  const results: boolean[] = [];
  for (const [label, flags, says] of [
    ['a whole model', [], '"metadata": {}, "types": ["F16", "F32", "Q8_0"]'],
    ['a UNet', ['--save-keys', 'unet'], '"general.architecture": "sdxl", "general.quantization_version": 2'],
  ] as const) {
    if (words.length > 0 && !words.some((word) => `export: gguf, ${label}`.includes(word))) continue;
    const [path, out] = ['exported.gguf', 'read.safetensors'].map((name) => join(folder, name));
    rmSync(path, { force: true });
    await sdxl('export', base, path, '--format', 'gguf', '--type', 'q8_0', ...flags);
    const script = join(packageRoot, 'test', 'interop', 'gguf_peer.py');
    const { status, stdout, stderr } = spawnSync('python3', [script, path, out], { encoding: 'utf8' });
    if (status === 3 || status === null) {
      console.log(`SKIPPED: gguf cannot be loaded here (${stdout?.trim() || 'no python3'})`);
      return results;
    }
    const [ours, theirs] = [openGguf(path), status === 0 ? openSafetensors(out) : undefined];
    const other = [...ours.tensors.values()].filter(({ name, dtype, shape }) => {
      const want = theirs?.tensors.get(name);
      const values = decodeFloats(ours.read(name), dtype);
      return (
        want?.shape.join() !== shape.join() ||
        !theirs ||
        Buffer.compare(theirs.read(name), encodeNumbers(values, 'float32')) !== 0
      );
    });
    const ok = stdout.includes(says) && theirs?.tensors.size === ours.tensors.size && other.length === 0;
    console.log(
      `${ok ? 'ok' : 'NOT OK'}  export: gguf, ${label}: ${other.length} tensors read otherwise ${stderr.slice(-300)}`,
    );
    results.push(ok);
    for (const file of [ours, theirs]) file?.close();
  }
  return results;
}

async function all(words: readonly string[]): Promise<number> {
  const [full, small] = ['full', 'small'].map((name) => writeControlNet(join(folder, name), name));
  const encoder = join(folder, 'image_encoder');
  writeEncoder(encoder);
  const [plain, plus] = ['plain', 'plus'].map((name) =>
    writeIPAdapter(join(folder, `ip-adapter_${name}.safetensors`), name),
  );
  const [edges, sketch] = ['edges', 'sketch'].map((name) => writeT2IAdapter(join(folder, name), name));
  const inpainting = writeInpainting(join(folder, 'inpainting'));
  const edm = {
    playground: writeEDM(join(folder, 'playground'), 'playground'),
    cosxl: writeEDM(join(folder, 'cosxl'), 'cosxl'),
  };
  const pictures = await oddPictures();
  const calls = allCalls(pictures, { full, small }, { edges, sketch }, { plain, plus }, inpainting, edm);
  const jobs = [
    ...(await saved(inpainting, pictures)),
    ...textAdapters(),
    ...(await trained(sdxl, folder, pictures, encoder)),
    ...calls,
  ]
    .filter(({ label }) => words.length === 0 || words.some((word) => label.includes(word)))
    .map((job, i) => ({ ...job, out: join(folder, `theirs-${i}.safetensors`) }));
  const results = await readByGguf(words);
  if (words.length === 0 || words.some((word) => "serve: OpenAI's client".includes(word)))
    results.push(...(await served(sdxl, folder)));
  const drawn = drawTheirs(jobs);
  if (drawn) for (const job of jobs) results.push(await compare(job));
  const failed = results.filter((ok) => !ok).length;
  // What was left out is no pass.
  if (drawn) console.log(`${results.length - failed} passed, ${failed} failed`);
  return failed;
}

try {
  process.exitCode = (await all(process.argv.slice(2))) === 0 ? 0 : 1;
} finally {
  rmSync(folder, { recursive: true });
}
