// The command line on a GPU. The virtual one draws the picture that the CPU draws; what a driver refuses ends in one sentence
// and status 2, and leaves no file. A whole process runs on the stub of libcuda.so.1. Doctor says what each GPU is good for.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { gpus } from '../../cli/doctor_gpu.ts';
import type { GpuApi } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';
import { adopt, cudaDevice } from '../../engine/device.ts';
import { UserError } from '../../io/errors.ts';
import { readPicture } from '../../io/image.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, maxDifference, packageRoot } from '../support/golden.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-cuda-cli-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const output = (name: string): string => join(folder, `${name}.png`);
const sample = (device: string, name: string): string[] => [
  ...['sample', '--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a red fox', '--seed', '1'],
  ...['--width', '16', '--height', '16', '--steps', '1', '--guidance-scale', '1'],
  ...['--device', device, '--output', output(name), '--quiet'],
];

const gpu = openVirtualGpu({ races: false });
const failing = failingGpu(gpu);
const device = adopt(cudaDevice(failing.api));

/** Runs a command that must end in one sentence, status 2 and no file. */
async function refused(t: Test, name: string, sentence: RegExp): Promise<void> {
  const { status, err, out } = await sdxl(...sample('cuda:0', name));
  t.equal(status, 2, `${name}: status 2`);
  t.match(err, sentence, `${name}: ${err}`);
  t.equal(err.split('\n').length, 2, `${name}: one line`);
  t.equal(out, '');
  t.notOk(existsSync(output(name)), `${name}: no file`);
  t.equal(device.memory.storages, 0, `${name}: nothing is held`);
}

test('sample --device cuda', { timeout: 300_000 }, async (t) => {
  const on = await sdxl(...sample('auto', 'cuda'), '--json');
  const [allocations, downloads] = [failing.made('cuMemAllocAsync'), failing.made('cuMemcpyDtoHAsync')];
  t.equal(on.status, 0, on.err);
  t.equal(JSON.parse(on.out).device, 'cuda:0', 'auto takes the GPU');
  await sdxl(...sample('cpu', 'cpu'));
  const [got, want] = [await readPicture(output('cuda')), await readPicture(output('cpu'))];
  t.ok(maxDifference(got.data, want.data) <= 1, 'pixels within one level of the cpu');
  t.equal(device.memory.storages, 0);

  device.memory.trim();
  failing.fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { at: 200, always: true });
  const holders =
    /^error: out of memory: \d\.\d MiB wanted while these hold it: .*unet \d\.\d MiB.*--dtype\n$/;
  await refused(t, 'no-memory', holders);
  // By the last allocations the VAE decodes, and what is done with has been freed.
  device.memory.trim();
  failing.fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { at: allocations - 3, always: true });
  await refused(
    t,
    'no-memory-at-the-end',
    /^error: out of memory: .* wanted while these hold it: (vae|tensors at work) \d\.\d MiB, (vae|tensors at work) \d\.\d MiB; /,
  );
  // At the last download before the picture's: amid the denoising loop, whose clearing up must not hide it.
  failing.fail('cuMemcpyDtoHAsync', 'CUDA_ERROR_ECC_UNCORRECTABLE', { at: downloads - 1 });
  const sticky = (call: string, result: string, rest: string) =>
    new RegExp(`^error: ${call} failed with ${result}: the last kernel queued was \\w+; ${rest}\n$`);
  await refused(
    t,
    'lost',
    sticky(
      'cuMemcpyDtoHAsync',
      'CUDA_ERROR_ECC_UNCORRECTABLE',
      'the GPU found a memory error; reset or replace it',
    ),
  );
  await refused(
    t,
    'lost-before',
    /^error: cu\w+ failed with CUDA_ERROR_ECC_UNCORRECTABLE: the GPU was lost before/,
  );
});

test('a whole process over a library that is called libcuda.so.1', (t) => {
  const source = join(packageRoot, 'test', 'kernels', 'stub_libcuda.c');
  const library = join(folder, 'libcuda.so.1');
  const { status } = spawnSync('g++', ['-x', 'c', '-shared', '-fPIC', '-w', '-o', library, source]);
  if (status !== 0) {
    t.pass('no C compiler');
    return t.end();
  }
  const run = (...argv: string[]) =>
    spawnSync(process.execPath, [join(packageRoot, 'bin', 'sdxl.js'), ...argv], {
      env: { ...process.env, LD_LIBRARY_PATH: folder },
      encoding: 'utf8',
      timeout: 60_000,
    });
  const report = JSON.parse(run('doctor', '--json').stdout);
  t.match(report['cuda:0'], /^stub 0, compute capability 9\.0, 0\.0 GiB free of 64\.0 GiB/);
  t.match(report.mends['cuda:0'], /end other programs/);
  t.equal(report['nvidia driver'], 'for CUDA 13.0, reads PTX up to 9.0');
  t.equal(report.device, 'cuda:0', 'the device that commands take');
  // The stub has one kernel, so the first other one is an error of the driver.
  const drawn = run(...sample('cuda', 'stub'));
  t.equal(drawn.status, 2, drawn.stderr);
  t.match(
    drawn.stderr,
    /^error: cuModule\w+ failed with CUDA_ERROR_NOT_FOUND; the kernels of this package are damaged.*\n$/,
  );
  t.end();
});

test('doctor: each GPU, its driver, and the mend for each', (t) => {
  const found = (api: GpuApi) =>
    Object.fromEntries(
      gpus(() => api).map(({ name, value, mend }) => [name, `${value}${mend ? ` -> ${mend}` : ''}`]),
    );
  t.same(found(openVirtualGpu()), {
    'nvidia driver': 'for CUDA 13.0, reads PTX up to 9.0',
    'cuda:0': 'virtual GPU, compute capability 8.9, 16.0 GiB free of 16.0 GiB; used with --device cuda:0',
  });
  const weak = found(openVirtualGpu({ capability: [7, 5], driverVersion: 11080, memoryBytes: 2 ** 32 }));
  t.match(weak['nvidia driver'], /CUDA 11\.8, reads PTX up to 7\.8 -> install driver r535/);
  t.match(weak['cuda:0'], /compute capability 7\.5.* -> it is older than Ampere/);
  t.match(found(openVirtualGpu({ memoryBytes: 2 ** 32 }))['cuda:0'], /4\.0 GiB free.* -> .*draw at 512x512/);
  const busy = failingGpu(openVirtualGpu());
  busy.fail('cuDevicePrimaryCtxRetain', 'CUDA_ERROR_DEVICE_UNAVAILABLE');
  t.match(found(busy.api)['cuda:0'], /a GPU that cannot be used -> .*another program has the GPU to itself/);
  const none = gpus(() => {
    throw new UserError('libcuda.so.1 was not found');
  });
  t.match(none[0], { name: 'gpu', value: /NVIDIA driver/ });
  const refused = gpus(() => {
    throw new CudaError('CUDA_ERROR_SYSTEM_NOT_READY', 'cuInit');
  });
  t.match(refused[0], { name: 'gpu', value: /cannot be used/, mend: /cuInit failed.*nvidia-fabricmanager/ });
  t.end();
});
