// Our exports in the real diffusers: each is loaded there and must give the latents that `sdxl sample` gives from the same
// seed, within 1e-3 of their largest. Needs Python with torch, transformers, peft and diffusers; says so and stops where they
// are absent. Run by `npm run test:interop`, PYTHONPATH included.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { main } from '../../cli/main.ts';
import type { Terminal } from '../../cli/terminal.ts';
import { packageRoot } from '../../engine/cpu/build.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';

const golden = join(packageRoot, 'test', 'golden');
const base = join(golden, 'tiny-sdxl');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-interop-'));
const terminal: Terminal = { out: () => {}, err: (text) => void process.stderr.write(text), live: false };
const job = { prompt: 'a red fox', width: 128, height: 128, steps: 5, guidance_scale: 5, seed: 11 };

async function sdxl(...argv: string[]): Promise<void> {
  const status = await main([...argv, '--quiet'], terminal);
  if (status !== 0) throw new Error(`sdxl ${argv.join(' ')} ended with status ${status}`);
}

function latents(path: string): Float32Array {
  const file = openSafetensors(path);
  const values = decodeFloats(file.read('latents'), 'float32');
  file.close();
  return values;
}

/** What diffusers draws; undefined where it is absent. */
function theirs(model: string, lora?: string): Float32Array | undefined {
  const out = join(folder, 'theirs.safetensors');
  const script = join(packageRoot, 'test', 'interop', 'diffusers_peer.py');
  const argument = JSON.stringify({ ...job, model, lora, configs: base, out });
  const { status, stdout, stderr } = spawnSync('python3', [script, argument], { encoding: 'utf8' });
  if (status === 3 || status === null) {
    console.log(`SKIPPED: diffusers cannot be loaded here (${stdout?.trim() || 'no python3'})`);
    return undefined;
  }
  if (status !== 0) throw new Error(stderr.slice(-2000));
  return latents(out);
}

async function ours(model: string, ...more: string[]): Promise<Float32Array> {
  const out = join(folder, 'ours.safetensors');
  await sdxl(
    ...['sample', '--model', model, '--prompt', job.prompt, '--seed', String(job.seed)],
    ...['--width', '128', '--height', '128', '--steps', String(job.steps), '--dtype', 'float32'],
    ...['--output', join(folder, 'x.png'), '--save-latents', out, ...more],
  );
  return latents(out);
}

function compare(label: string, got: Float32Array, want: Float32Array): boolean {
  const largest = want.reduce((max, value) => Math.max(max, Math.abs(value)), 0);
  const error = got.reduce((max, value, i) => Math.max(max, Math.abs(value - want[i])), 0) / largest;
  const ok = got.length === want.length && error <= 1e-3;
  console.log(
    `${ok ? 'ok' : 'NOT OK'}  ${label}: largest difference ${error.toExponential(1)} of the largest latent`,
  );
  return ok;
}

async function all(): Promise<number> {
  const exported = join(folder, 'exported');
  await sdxl('export', base, exported, '--dtype', 'float16', '--max-shard-size', '600kB');
  const single = join(folder, 'single.safetensors');
  await sdxl('export', base, single, '--format', 'single-file', '--dtype', 'float16');
  const lora = join(golden, 'lora', 'scaled_kohya.safetensors');
  const adapters = ['lora-peft', 'lora-kohya'].map((format) => [
    format,
    join(folder, `${format}.safetensors`),
  ]);
  for (const [format, out] of adapters)
    await sdxl('export', lora, out, '--format', format, '--configs', base);
  const plain = await ours(base);
  const adapted = await ours(base, '--lora', lora);
  const jobs: [label: string, want: Float32Array, model: string, lora?: string][] = [
    ['a sharded folder', plain, exported],
    ['a single file', plain, single],
    ...adapters.map(([format, out]): [string, Float32Array, string, string] => [format, adapted, base, out]),
  ];
  let failed = 0;
  for (const [label, want, model, adapter] of jobs) {
    const got = theirs(model, adapter);
    if (!got) return 0;
    if (!compare(label, got, want)) failed++;
  }
  console.log(`${jobs.length - failed} passed, ${failed} failed`);
  return failed;
}

try {
  process.exitCode = (await all()) === 0 ? 0 : 1;
} finally {
  rmSync(folder, { recursive: true });
}
