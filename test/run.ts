// Runs every test file through tap and ends with the plain line `N passed, N failed`, which tap's own reporters do not
// print. Exit status is tap's. Arguments are passed on: `npm test -- dist/test/ops.test.js`.
import { spawn } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = dirname(fileURLToPath(import.meta.url));
const given = process.argv.slice(2);
const files = given.length
  ? given
  : readdirSync(here)
      .filter((name) => name.endsWith('.test.js'))
      .sort()
      .map((name) => join(here, name));

let passed = 0;
let failed = 0;

/** One test file in its own process: counts its assertions, shows only what failed and a line of summary. */
function run(file: string): Promise<void> {
  return new Promise((resolve) => {
    const started = Date.now();
    const child = spawn(process.execPath, [file], { stdio: ['ignore', 'pipe', 'inherit'] });
    let output = '';
    child.stdout.on('data', (chunk: Buffer) => {
      output += chunk;
    });
    child.on('close', (status) => {
      const lines = output.split('\n');
      const leaves = lines.filter((line, i) => /^\s*(not )?ok \d/.test(line) && !isSubtestResult(lines, i));
      const bad = leaves.filter((line) => /^\s*not ok/.test(line));
      const skips = leaves.filter((line) => /# (SKIP|TODO)/i.test(line));
      const crashed = status !== 0 && bad.length === 0 ? 1 : 0;
      passed += leaves.length - bad.length - skips.length;
      failed += bad.length + crashed;
      for (const line of bad) console.log(line.trim());
      for (const line of skips) console.log(line.trim());
      if (crashed) console.log(`${file} ended with status ${status}:\n${lines.slice(-20).join('\n')}`);
      const name = file.slice(here.length + 1);
      console.log(`# ${name}: ${leaves.length} assertions, ${bad.length} failed, ${((Date.now() - started) / 1000).toFixed(1)} s`);
      resolve();
    });
  });
}

/** A subtest's own `ok` line repeats what its assertions said: it follows the subtest's plan, one indent deeper. */
function isSubtestResult(lines: readonly string[], at: number): boolean {
  const indent = (line: string) => line.length - line.trimStart().length;
  for (let i = at - 1; i >= 0; i--) {
    if (lines[i].trim() === '') continue;
    return indent(lines[i]) > indent(lines[at]) && !/^\s*(---|\.\.\.)/.test(lines[i]);
  }
  return false;
}

createRequire(import.meta.url).resolve('tap');
for (const file of files) await run(file);
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
