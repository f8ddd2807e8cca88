// What the native library does beside kernels, and where the one in the package is of no use: a package built for another processor or
// C library.
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  cpSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { empty } from '../../engine/tensor.ts';
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

test('a tensor is filled from a file', (t) => {
  const size = 3 * 2 ** 20 + 1; // pieces for several threads, and a part of one
  const path = join(folder, 'bytes');
  const bytes = Uint8Array.from({ length: size + 7 }, (_, i) => (i * 2654435761) >>> 24);
  writeFileSync(path, bytes);
  const fd = openSync(path, 'r');
  const open = (device: string) => empty([size], { device: openDevice(device), dtype: 'uint8' });
  const [x, onHost] = [open('cpu'), open('reference')];
  t.ok(x.uploadFile(fd, 5));
  t.ok(Buffer.compare(x.bytes(), bytes.subarray(5, 5 + size)) === 0);
  t.notOk(x.uploadFile(fd, 8), 'the file ends before');
  t.notOk(onHost.uploadFile(fd, 5), 'a device that cannot');
  closeSync(fd);
  t.notOk(x.uploadFile(fd, 5), 'no file any more');
  for (const each of [x, onHost]) each.release();
  t.end();
});

test('without a compiler the reference device is what is left', (t) => {
  const { device, kernels, mends, stderr } = doctor(join(folder, 'cache'), '');
  t.equal(device, 'reference', stderr);
  t.match(stderr, /compiling the kernels for this machine, once/, 'told before the wait');
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

/** How a program ends that squares ones on the CPU, with what it says. */
function squaring(times: number, env: NodeJS.ProcessEnv = {}, before = '') {
  const [device, tensor, unary] = ['device', 'tensor', 'ops/unary'].map((name) =>
    JSON.stringify(join(packageRoot, 'dist', 'engine', `${name}.js`)),
  );
  const program = `
    import { openDevice } from ${device};
    import { tensor } from ${tensor};
    import { square } from ${unary};
    ${before}
    const x = tensor(new Float32Array(2 ** 20).fill(3), [2 ** 20], { device: openDevice('cpu') });
    for (let i = 0; i < ${times}; i++) square(x).release();
    console.log(square(x).floats().every((y) => y === 9));`;
  const { status, signal, stdout, stderr } = spawnSync(
    process.execPath,
    ['--input-type=module', '--eval', program],
    { encoding: 'utf8', env: { ...process.env, ...env } },
  );
  return signal ?? (status === 0 ? stdout.trim() : stderr);
}

test('a program may end while threads of the library look for work', (t) => {
  const ended = Array.from({ length: 20 }, () => squaring(50));
  t.same(ended, Array<string>(20).fill('true'));
  t.end();
});

test('without further threads the work is done by one', (t) => {
  const [source, none] = [join(folder, 'none.c'), join(folder, 'none.so')];
  writeFileSync(
    source,
    `#define _GNU_SOURCE
    #include <dlfcn.h>
    #include <errno.h>
    #include <stdlib.h>
    int pthread_create(void *thread, void *attributes, void *run, void *argument) {
      int (*real)(void *, void *, void *, void *) = dlsym(RTLD_NEXT, "pthread_create");
      return getenv("NO_MORE_THREADS") ? EAGAIN : real(thread, attributes, run, argument);
    }`,
  );
  const { status } = spawnSync('g++', ['-x', 'c', '-shared', '-fPIC', '-w', '-o', none, source]);
  t.equal(status, 0);
  t.equal(squaring(3, { LD_PRELOAD: none }, "process.env.NO_MORE_THREADS = '1';"), 'true');
  t.end();
});
