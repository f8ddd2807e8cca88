// Killing a run: after `kill -9` at any moment there is a whole checkpoint or none, and the run goes on from it to the same
// bytes as one that was never killed. Each run is a process of its own. It is killed at each kind of call by which it changes files, and
// by the clock, at moments drawn from a seed, which may be amid a call or amid a pass.
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { writePng } from '../../io/image.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { listCheckpoints, readState } from '../../train/checkpoint.ts';
import { draws } from '../../train/data/draws.ts';
import { goldenFolder, packageRoot } from '../support/golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-kill-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const pictures = join(folder, 'pictures');
mkdirSync(pictures);
for (let i = 0; i < 5; i++) {
  const data = Uint8Array.from({ length: 3 * 32 * 32 }, (_, at) => (at * (i + 2)) % 255);
  writePng(join(pictures, `${i}.png`), { width: 32, height: 32, channels: 3, data });
  writeFileSync(join(pictures, `${i}.txt`), `picture ${i}`);
}

/** More than all killed runs get to. */
const steps = 24;
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

/** Killed before the nth call, of one of these functions of node:fs, on what has such a path. */
type Moment = readonly [what: string, call: RegExp, nth: number];

/** In this order the first comes upon a checkpoint to go on from, and the last ones upon two, of which a third makes one go. */
const moments: readonly Moment[] = [
  ['a new log, as the run is taken up', /^renameSync .*killed.\.sdxl-[^/]*$/, 1],
  ['a line of the log', /^appendFileSync .*log\.jsonl$/, 2],
  ['amid the weights', /^writeSync .*checkpoints.*\.tmp.unet.\.sdxl/, 40],
  ['whole weights, not yet on the disk', /^fsyncSync .*\.tmp.ema.unet.\.sdxl/, 1],
  ['amid the optimizer', /^writeSync .*checkpoints.\.sdxl[^/]*\.tmp.\.sdxl/, 40],
  ['a whole checkpoint without its name', /^renameSync .*checkpoints.\.sdxl[^/]*\.tmp$/, 2],
  ['its name, not yet on the disk', /^fsyncSync .*checkpoints$/, 1],
  ['the oldest, which is to go', /^renameSync .*checkpoints.step-\d*$/, 1],
  ['the oldest, which has lost its name', /^rmSync .*checkpoints.\.sdxl[^/]*\.tmp$/, 1],
];

/** A module that node loads before the program. */
function killer([what, call, nth]: Moment): string {
  const path = join(folder, `${what.replaceAll(/\W+/g, '-')}.mjs`);
  writeFileSync(
    path,
    `import fs from 'node:fs';
    import { syncBuiltinESMExports } from 'node:module';
    const paths = new Map();
    let calls = 0;
    for (const name of ['openSync', 'writeSync', 'appendFileSync', 'fsyncSync', 'renameSync', 'rmSync']) {
      const call = fs[name];
      fs[name] = (...given) => {
        if (${call}.test(name + ' ' + (paths.get(given[0]) ?? given[0])) && ++calls === ${nth}) process.kill(process.pid, 'SIGKILL');
        const result = call(...given);
        if (name === 'openSync') paths.set(result, given[0]);
        return result;
      };
    }
    syncBuiltinESMExports();`,
  );
  return path;
}

/** Whether it was killed, by itself or `delay` ms after it has begun to train. */
async function killed(child: ChildProcess, delay?: number): Promise<boolean> {
  return new Promise((resolve) => {
    child.stderr?.on('data', (text: Buffer) => {
      if (delay !== undefined && String(text).includes('training '))
        setTimeout(() => child.kill('SIGKILL'), delay);
    });
    child.on('close', (_, signal) => resolve(signal === 'SIGKILL'));
  });
}

test('a run killed again and again ends in the bytes of one that was not', {
  timeout: 600_000,
}, async (t) => {
  const began = performance.now();
  const whole = spawnSync(process.execPath, [program, 'train', runFile('whole'), '--quiet'], {
    encoding: 'utf8',
  });
  t.equal(whole.status, 0, whole.stderr);
  // Up to two updates at this machine's pace, so that some get on however busy it is.
  const longest = Math.max(120, Math.round((2 * (performance.now() - began)) / steps));
  const file = runFile('killed');
  const random = draws(11, 0, 0, 'order');
  let furthest = 0;
  const kill = async (what: string, delay: number | undefined, ...flags: string[]) => {
    const child = spawn(process.execPath, [...flags, program, 'train', file, '--resume'], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    t.ok(await killed(child, delay), `killed: ${what}, from step ${furthest} on`);
    for (const checkpoint of listCheckpoints(join(folder, 'killed'))) {
      for (const name of files(checkpoint)) openSafetensors(join(checkpoint, name)).close();
      furthest = readState(checkpoint).step;
    }
  };
  await kill('a first checkpoint', undefined, '--import', killer(['first', /^fsyncSync .*checkpoints$/, 1]));
  t.equal(furthest, 1, 'which had its name already');
  for (const moment of moments) await kill(moment[0], undefined, '--import', killer(moment));
  // A machine that has become less busy since is far quicker: once far on, runs are killed at once.
  for (let turn = 0; turn < 4; turn++) {
    const delay = furthest > steps / 2 ? 0 : random.integer(longest);
    await kill(`after ${delay} ms`, delay);
  }
  t.ok(furthest > 4 && furthest < steps, `some had got on, to step ${furthest}`);
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
  t.match(said, new RegExp(`stopped; saved ${newest}: --resume goes on`));
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
