// Runs every test file but those of kernels/ and programs/ through tap and ends with the plain line `N passed, N failed`, which tap's own
// reporters do not print. Exit status is tap's. Arguments are files, as in `npm test -- dist/test/engine/ops.test.js`, or `--kernels` or
// `--programs`, for those alone.
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync, statfsSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = dirname(fileURLToPath(import.meta.url));
const given = process.argv.slice(2);
/**
 * Folders that are suites of their own, asked for by their names. What a GPU does, on the virtual one, this itself, what it has memory for,
 * and the programs for a machine that has one, take longer than all else together, and cuda.test.js, every kernel's proof, as long as the
 * rest of them. (A case of a second or two on the virtual GPU stays with those of the other devices.) Programs that are killed wherever
 * it may hurt are started hundreds of times.
 */
const suites = ['kernels', 'programs'];
const suite = suites.find((name) => given[0] === `--${name}`);
const suiteOf = (path: string) => suites.find((name) => path.startsWith(`${name}/`));
const found = () =>
  readdirSync(here, { recursive: true, encoding: 'utf8' }).filter(
    (path) => path.endsWith('.test.js') && suiteOf(path) === suite,
  );
const named = given.filter((each) => each !== `--${suite}`);
const files = named.length
  ? named
  : found()
      .sort()
      .map((path) => join(here, path));

/**
 * What the tests write lies in memory, where that has room: it is flushed as a user's files are and gone a second later; on a disk that was
 * a fifth of train.test.js. That the program does flush, train_kill.test.js sees by its calls.
 */
function scratch(): string {
  const memory = '/dev/shm';
  const free = () => {
    const { bavail, bsize } = statfsSync(memory);
    return bavail * bsize;
  };
  return mkdtempSync(join(existsSync(memory) && free() > 4 * 2 ** 30 ? memory : tmpdir(), 'sdxl-test-'));
}
const temporary = scratch();
process.on('exit', () => rmSync(temporary, { recursive: true, force: true }));
for (const name of ['SIGINT', 'SIGTERM'] as const) process.on(name, () => process.exit(1));

let passed = 0;
let failed = 0;
let skipped = 0;

/** One test file in its own process: counts its assertions, shows only what failed or was skipped and a line of summary. */
function run(file: string): Promise<void> {
  return new Promise((resolve) => {
    const started = Date.now();
    // tap's own limit of 30 s per file would trip on a busy machine: whole models on the virtual GPU take minutes on a free one.
    const env = { ...process.env, TAP_TIMEOUT: '1800', TMPDIR: temporary };
    const child = spawn(process.execPath, [file], { env, stdio: ['ignore', 'pipe', 'inherit'] });
    let output = '';
    child.stdout.on('data', (chunk: Buffer) => {
      output += chunk;
    });
    child.on('close', (status) => {
      const total = /^# \{ total: \d+.*\}$/m.exec(output)?.[0] ?? '';
      const count = (word: string) => Number(new RegExp(`${word}: (\\d+)`).exec(total)?.[1] ?? 0);
      const crashed = total === '' || (status !== 0 && count('fail') === 0);
      passed += count('pass');
      skipped += count('skip');
      failed += count('fail') + (crashed ? 1 : 0);
      const telling = output.split('\n').filter((line) => /^\s*not ok|# (SKIP|TODO)/.test(line));
      for (const line of telling) console.log(line.trim());
      if (crashed) console.log(`${file} ended with status ${status}:\n${output.slice(-3000)}`);
      const seconds = ((Date.now() - started) / 1000).toFixed(1);
      const counts = [`${count('pass')} passed`, `${count('fail')} failed`];
      if (count('skip') > 0) counts.push(`${count('skip')} skipped`);
      console.log(`# ${basename(file)}: ${counts.join(', ')}, ${seconds} s`);
      resolve();
    });
  });
}

/** Two files at once: most of them have one busy thread. */
const queue = [...files];
async function runQueue(): Promise<void> {
  for (let file = queue.shift(); file; file = queue.shift()) await run(file);
}
await Promise.all(Array.from({ length: Math.min(2, availableParallelism()) }, runQueue));
if (skipped > 0) console.log(`# skipped, and so not proved here: ${skipped}`);
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
