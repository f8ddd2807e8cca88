// Killing a run: after `kill -9` at any moment there is a whole checkpoint or none, and the run goes on from it to the same
// bytes as one that was never killed. Each run is a process of its own, killed at a moment drawn from a seed.
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { writePng } from '../io/image.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { listCheckpoints, readState } from '../train/checkpoint.ts';
import { draws } from '../train/draws.ts';
import { goldenFolder, packageRoot } from './golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-kill-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const pictures = join(folder, 'pictures');
mkdirSync(pictures);
for (let i = 0; i < 5; i++) {
  const data = Uint8Array.from({ length: 3 * 32 * 32 }, (_, at) => (at * (i + 2)) % 255);
  writePng(join(pictures, `${i}.png`), { width: 32, height: 32, channels: 3, data });
  writeFileSync(join(pictures, `${i}.txt`), `picture ${i}`);
}

/** More than twenty killed runs get to. */
const steps = 60;
const kills = 20;
const program = join(packageRoot, 'bin', 'sdxl.js');

function runFile(name: string, more: object = {}): string {
  const run = {
    output: join(folder, name),
    model: join(goldenFolder, 'tiny-sdxl'),
    steps,
    batch_size: 1,
    gradient_accumulation_steps: 2,
    dataset: { path: pictures, resolution: 32, caption_dropout_rate: 0.2, cache: join(folder, 'cache') },
    optimizer: { lr: 1e-3 },
    ema: { decay: 0.99 },
    // Nearly always at a checkpoint, so that most kills fall into the writing of one.
    checkpoints: { every_steps: 1, keep: 2 },
    ...more,
  };
  const path = join(folder, `${name}.ts`);
  writeFileSync(
    path,
    `import { defineRun } from 'sdxl';\nexport default defineRun(${JSON.stringify(run)});\n`,
  );
  return path;
}

const files = (checkpoint: string): string[] =>
  readdirSync(checkpoint, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.safetensors'))
    .sort();

function digest(checkpoint: string): string {
  const hash = createHash('sha256');
  for (const name of files(checkpoint)) hash.update(name).update(readFileSync(join(checkpoint, name)));
  return hash.digest('hex');
}

/** Resolves `delay` ms after the program has begun to train, or when it ends before. */
async function killed(child: ChildProcess, delay: number): Promise<boolean> {
  return new Promise((resolve) => {
    child.stderr?.on('data', (text: Buffer) => {
      if (String(text).includes('training ')) setTimeout(() => child.kill('SIGKILL'), delay);
    });
    child.on('close', (_, signal) => resolve(signal === 'SIGKILL'));
  });
}

test('twenty kills', { timeout: 600_000 }, async (t) => {
  const began = performance.now();
  const whole = spawnSync(process.execPath, [program, 'train', runFile('whole'), '--quiet'], {
    encoding: 'utf8',
  });
  t.equal(whole.status, 0, whole.stderr);
  // Up to three updates at this machine's pace, so that some get on however busy it is.
  const longest = Math.max(120, Math.round((3 * (performance.now() - began)) / steps));
  const file = runFile('killed');
  const random = draws(11, 0, 0, 'order');
  let count = 0;
  let furthest = 0;
  for (let turn = 0; turn < kills; turn++) {
    // A machine that has become less busy since is far quicker: halfway through, runs are killed at once.
    const delay = furthest > steps / 2 ? 0 : random.integer(longest);
    const child = spawn(process.execPath, [program, 'train', file, '--resume'], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    if (await killed(child, delay)) count++;
    for (const checkpoint of listCheckpoints(join(folder, 'killed'))) {
      for (const name of files(checkpoint)) openSafetensors(join(checkpoint, name)).close();
      furthest = readState(checkpoint).step;
    }
  }
  t.equal(count, kills, `each was killed while it trained; the last checkpoint was of step ${furthest}`);
  t.ok(furthest > 0, 'and some had got on');
  const end = spawnSync(process.execPath, [program, 'train', file, '--resume', '--quiet'], {
    encoding: 'utf8',
  });
  t.equal(end.status, 0, end.stderr);
  const [a, b] = ['whole', 'killed'].map((name) => listCheckpoints(join(folder, name)).at(-1) as string);
  t.equal(readState(b).step, steps);
  t.equal(digest(b), digest(a), 'the same weights, averages and optimizer as the run that was never killed');
  const left = readdirSync(join(folder, 'killed', 'checkpoints')).filter((name) => !name.startsWith('step-'));
  t.same(left, [], 'nothing half-written is left');
});

/** Starts a run and sends it SIGINT `delay` milliseconds after its first update. */
async function interrupted(file: string, delay: number): Promise<{ status: number | null; said: string }> {
  const child = spawn(process.execPath, [program, 'train', file], { stdio: ['ignore', 'ignore', 'pipe'] });
  let said = '';
  let asked = false;
  child.stderr.on('data', (text: Buffer) => {
    said += text;
    if (asked || !said.includes('training ')) return;
    asked = true;
    setTimeout(() => child.kill('SIGINT'), delay);
  });
  const status = await new Promise<number | null>((resolve) => child.on('close', resolve));
  return { status, said };
}

test('Ctrl-C saves and leaves', async (t) => {
  const { status, said } = await interrupted(runFile('stopped'), 0);
  t.equal(status, 130);
  t.match(said, /stopping after this update and saving/);
  const [newest] = listCheckpoints(join(folder, 'stopped')).slice(-1);
  t.match(said, new RegExp(`stopped; saved ${newest}`));
  t.ok(readState(newest).step < steps);
});

test('Ctrl-C while previews are drawn leaves them, and saves updates that no checkpoint has yet', async (t) => {
  const previews = { prompts: Array(200).fill('endless'), num_inference_steps: 1000, every_steps: 1 };
  const checkpoints = { every_steps: 50 };
  const { status, said } = await interrupted(runFile('drawing', { previews, checkpoints }), 1500);
  t.equal(status, 130, said);
  const [only] = listCheckpoints(join(folder, 'drawing'));
  t.match(said, new RegExp(`stopped; saved ${only}`));
  t.equal(readState(only).step, 1);
});
