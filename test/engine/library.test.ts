// The native library where the one in the package is of no use: a package built for another processor or C library.
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { test } from 'tap';
import { packageRoot } from '../support/golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-library-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
for (const name of ['bin', 'dist', 'kernels/cpu', 'package.json'])
  cpSync(join(packageRoot, name), join(folder, name), {
    recursive: true,
    filter: (from) => !['test', 'bench'].includes(basename(from)),
  });
symlinkSync(join(packageRoot, 'node_modules'), join(folder, 'node_modules'));
mkdirSync(join(folder, 'build'));
writeFileSync(join(folder, 'build', 'libsdxl_cpu.so'), 'of another machine');

/** What `sdxl doctor` says there, of a machine with these folders. */
function doctor(cache: string, path: string) {
  const env = { ...process.env, XDG_CACHE_HOME: cache, PATH: path };
  const argv = [join(folder, 'bin', 'sdxl.js'), 'doctor', '--json'];
  const { stdout, stderr } = spawnSync(process.execPath, argv, { encoding: 'utf8', env });
  return { ...JSON.parse(stdout || '{}'), stderr };
}

test('without a compiler the reference device is what is left', (t) => {
  const { device, kernels, mends, stderr } = doctor(join(folder, 'cache'), '');
  t.equal(device, 'reference', stderr);
  t.match(kernels, /make was not found/);
  t.match(mends.kernels, /install make and g\+\+/);
  t.end();
});

test('a cache that cannot be written', (t) => {
  const { device, kernels, mends, stderr } = doctor('/proc/none', dirname(process.execPath));
  t.equal(device, 'reference', stderr);
  t.match(kernels, /\/proc\/none.* cannot be written/);
  t.match(mends.kernels, /have XDG_CACHE_HOME name a folder that can be written/);
  t.end();
});

test('a program may end while threads of the library look for work', (t) => {
  const [device, tensor, unary] = ['device', 'tensor', 'ops/unary'].map((name) =>
    JSON.stringify(join(packageRoot, 'dist', 'engine', `${name}.js`)),
  );
  const program = `
    import { openDevice } from ${device};
    import { zeros } from ${tensor};
    import { square } from ${unary};
    const x = zeros([2 ** 20], { device: openDevice('cpu') });
    for (let i = 0; i < 50; i++) square(x).release();`;
  const ended = Array.from({ length: 20 }, () => {
    const { status, signal, stderr } = spawnSync(
      process.execPath,
      ['--input-type=module', '--eval', program],
      { encoding: 'utf8' },
    );
    return signal ?? (status === 0 ? 'well' : stderr);
  });
  t.same(ended, Array<string>(20).fill('well'));
  t.end();
});
