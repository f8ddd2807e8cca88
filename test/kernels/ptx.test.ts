// The committed PTX with its lowered header, as a driver's compiler sees it: no newer than the oldest supported driver reads,
// and ptxas, where there is one, finds every instruction of a file in the version and for the target that the header names.
// It parses the whole file, and is asked to compile one short entry only: all of them take minutes.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { expectedFiles, sourcesDigest } from '../../engine/cuda/build.ts';
import { forHopper, ptxFolder, readPtx } from '../../engine/cuda/kernels.ts';
import { OLDEST_DRIVER, ptxCeiling, ptxVersion } from '../../engine/cuda/versions.ts';
import { microKernels } from '../gpu/micro.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-ptx-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const skip = spawnSync('ptxas', ['--version']).status !== 0 && 'no ptxas';

/** What ptxas has against a module; empty where it has nothing. */
function complaints(ptx: string, arch: string): string {
  const path = join(folder, 'module.ptx');
  writeFileSync(path, ptx);
  const entries = ptx.split('.visible .entry ').slice(1);
  const [shortest] = entries.sort((a, b) => a.length - b.length);
  const entry = (/^\w+/.exec(shortest) as RegExpExecArray)[0];
  const ran = spawnSync('ptxas', [`-arch=${arch}`, '-e', entry, path, '-o', join(folder, 'module.cubin')]);
  return ran.status === 0 ? '' : `${ran.stderr}`.slice(0, 500);
}

test('the kernels are no newer than the oldest supported driver reads', (t) => {
  for (const { family, dtype } of expectedFiles()) {
    const version = ptxVersion(readPtx(family, dtype));
    t.ok(version > 0 && version <= ptxCeiling(OLDEST_DRIVER), `${family} ${dtype} is PTX ${version}`);
  }
  const newest = Math.max(...microKernels().map(({ ptx }) => ptxVersion(ptx)));
  t.ok(newest <= ptxCeiling(OLDEST_DRIVER), `of test:gpu's kernels the newest is PTX ${newest}`);
  t.end();
});

test('the report is of these kernels, none of which spills', (t) => {
  const report = readFileSync(join(ptxFolder, 'REPORT.md'), 'utf8');
  t.ok(report.includes(sourcesDigest()), 'npm run build:kernels has written it since the sources changed');
  const rows = report.split('\n').map((line) => line.split(' | '));
  let column = 0;
  let kernels = 0;
  for (const row of rows) {
    if (row[0] === '| kernel') column = row.indexOf('spills');
    else if (row.length > column && column > 0) {
      kernels++;
      t.equal(row[column], '0', row[0]);
    }
  }
  t.ok(kernels > 300, `${kernels} kernels`);
  t.end();
});

test('ptxas takes every committed file', { skip, timeout: 300_000 }, (t) => {
  for (const { family, dtype } of expectedFiles()) {
    const arch = forHopper(family) ? 'sm_90a' : 'sm_80';
    t.equal(complaints(readPtx(family, dtype), arch), '', `${family} ${dtype}`);
  }
  t.end();
});

test('and not one that needs a newer version, in whichever kernel', { skip }, (t) => {
  const newer = '.visible .entry newer()\n{\n\tgriddepcontrol.wait;\n\tret;\n}\n';
  const ptx = readPtx('norm', 'bfloat16').replace('.visible .entry', `${newer}.visible .entry`);
  const entries = ptx.split('.visible .entry ').slice(1);
  t.ok(entries.some((entry) => entry.startsWith('newer')));
  t.match(complaints(ptx, 'sm_90'), /requires PTX ISA \.version 7\.8 or later/);
  t.end();
});
