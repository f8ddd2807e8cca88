// The koffi binding to the driver, against a stand-in library compiled here: every argument must arrive where the C ABI
// puts it, results must come back, and each failure must be a named error. And the cuda device where there is no GPU.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { FunctionAttribute } from '../../engine/cuda/api.ts';
import { openCudaLibrary } from '../../engine/cuda/libcuda.ts';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice, openDevice } from '../../engine/device.ts';
import { copyBetween } from '../../engine/exchange.ts';
import { backward, gradOf, requireGrad } from '../../engine/grad.ts';
import { layerNorm } from '../../engine/ops/norm.ts';
import { exp, silu } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { tensor, zeros } from '../../engine/tensor.ts';
import { packageRoot } from '../support/golden.ts';
import { BOUND, processorTime } from '../support/processor_time.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-stub-'));
const path = join(folder, 'libstub.so');
const source = join(packageRoot, 'test', 'kernels', 'stub_libcuda.c');
const compiled = spawnSync('g++', ['-x', 'c', '-shared', '-fPIC', '-w', '-o', path, source]);

test('calls through koffi', { skip: compiled.status !== 0 && 'no C compiler' }, (t) => {
  const api = openCudaLibrary(path);
  t.equal(api.cuDriverGetVersion(), 13000);
  t.equal(api.cuDeviceGetName(0), 'stub 0');
  t.throws(() => api.cuDeviceGetName(1), { message: /cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE/ });
  t.equal(api.cuDeviceTotalMem(0), 80 * 2 ** 30);
  t.same(api.cuMemGetInfo(), { free: 5, total: 2 ** 36 });
  const pinned = api.cuMemAllocHost(4096);
  pinned[4095] = 1;
  api.cuMemFreeHost(pinned);

  const device = cudaDevice(api);
  scope(() => {
    const x = tensor([1, 2, 3, -4], [4], { device });
    t.same([...silu(x).floats()], [2, 4, 6, -8], 'upload, module, launch, download');
    t.throws(() => exp(x), { message: /cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND/ });
  });
  t.equal(device.memory.storages, 0);
  t.throws(() => device.memory.take(2 ** 41), {
    name: 'MemoryError',
    message:
      /out of memory: 2048.00 GiB wanted while these hold it: nothing; 0.0 MiB of the device's 64.00 GiB are/,
  });
  // Several pieces of the staging buffers, the last not full.
  const large = new Uint8Array(40 * 2 ** 20 + 5).map((_, i) => i % 251);
  const [block, back] = [device.memory.take(large.length), new Uint8Array(large.length)];
  device.driver.upload(block, 0, large);
  device.driver.download(block, 0, back);
  t.equal(Buffer.compare(large, back), 0, 'copies through pinned memory');
  device.memory.give(block);
  t.throws(() => api.cuStreamSynchronize(5n), { message: /CUDA_ERROR_INVALID_HANDLE/ });
  t.end();
});

test('launches with attributes', { skip: compiled.status !== 0 && 'no C compiler' }, (t) => {
  const api = openCudaLibrary(path);
  const stream = api.cuStreamCreate(1);
  const kernel = api.cuModuleGetFunction(
    api.cuModuleLoadData('.entry silu_forward_'),
    'silu_forward_float32',
  );
  const [y, x] = [api.cuMemAllocAsync(16, stream), api.cuMemAllocAsync(16, stream)];
  api.cuMemcpyHtoDAsync(x, new Uint8Array(Float32Array.of(1, 2, 3, -4).buffer), stream);
  const parameters = new DataView(new ArrayBuffer(20));
  parameters.setBigUint64(0, y, true);
  parameters.setBigUint64(8, x, true);
  parameters.setInt32(16, 4, true);
  const offsets = [0, 8, 16];
  const launch = (blocks: number, cluster: number, programmatic?: boolean) =>
    api.cuLaunchKernel(
      kernel,
      [blocks, 1, 1],
      [256, 1, 1],
      0,
      stream,
      new Uint8Array(parameters.buffer),
      offsets,
      { cluster, programmatic },
    );
  const result = () => {
    const back = new Uint8Array(16);
    api.cuMemcpyDtoHAsync(back, y, stream);
    return [...new Float32Array(back.buffer)];
  };
  const [doubled, tripled] = [
    [2, 4, 6, -8],
    [3, 6, 9, -12],
  ];
  launch(2, 2);
  t.same(result(), doubled, 'clusters');
  launch(1, 1, true);
  t.same(result(), tripled, 'programmatic');
  launch(1, 1);
  t.same(result(), doubled, 'neither');
  launch(2, 2, true);
  t.same(result(), tripled, 'both');
  launch(2, 2, false);
  t.same(result(), doubled, 'clusters again');
  t.throws(() => launch(2, 4), { message: /cuLaunchKernelEx failed with CUDA_ERROR_INVALID_VALUE/ });
  t.end();
});

test('every other call', { skip: compiled.status !== 0 && 'no C compiler' }, (t) => {
  const api = openCudaLibrary(path);
  const stream = api.cuStreamCreate(1);
  const [a, b] = [api.cuMemAllocAsync(8, stream), api.cuMemAllocAsync(8, stream)];
  const read = (from: bigint) => {
    const inside = new Uint8Array(12);
    api.cuMemcpyDtoHAsync(inside.subarray(3, 11), from, stream);
    return [...inside];
  };
  api.cuMemsetD8Async(a, 7, 8, stream);
  api.cuMemcpyHtoDAsync(a, Uint8Array.of(1, 2, 3, 4).subarray(1, 3), stream);
  api.cuMemcpyDtoDAsync(b, a + 1n, 4, stream);
  t.same(read(a), [0, 0, 0, 2, 3, 7, 7, 7, 7, 7, 7, 0]);
  t.same(read(b).slice(3, 7), [3, 7, 7, 7]);
  const context = api.cuDevicePrimaryCtxRetain(0);
  api.cuMemcpyPeerAsync(b, context, a, context, 2, stream);
  t.same(read(b).slice(3, 7), [2, 3, 7, 7]);
  t.equal(api.cuDeviceCanAccessPeer(0, 0), true);
  const pool = api.cuDeviceGetDefaultMemPool(0);
  api.cuMemPoolSetAccess(pool, 0);
  t.throws(() => api.cuMemPoolSetAccess(pool + 1n, 0), { message: /CUDA_ERROR_INVALID_VALUE/ });
  for (const contexts of [[context, 1n] as const, [1n, context] as const])
    t.throws(() => api.cuMemcpyPeerAsync(b, contexts[0], a, contexts[1], 2, stream), {
      message: /CUDA_ERROR_INVALID_CONTEXT/,
    });

  const module = api.cuModuleLoadData('.entry silu_forward_');
  const kernel = api.cuModuleGetFunction(module, 'silu_forward_float32');
  t.equal(api.cuFuncGetAttribute(FunctionAttribute.NUM_REGS, kernel), 104);
  api.cuFuncSetAttribute(kernel, FunctionAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, 232448);
  t.throws(() => api.cuFuncSetAttribute(kernel, 9, 1), {
    message: /code 912, CUDA_ERROR_INVALID_CLUSTER_SIZE/,
  });
  t.throws(() => api.cuModuleLoadData('.version 99'), {
    message: /INVALID_PTX: ptxas: \.version; is no module;/,
  });
  api.cuModuleUnload(module);

  const event = api.cuEventCreate(2);
  api.cuStreamWaitEvent(stream, event);
  t.equal(api.cuEventElapsedTime(event, event), 1.5);
  api.cuEventDestroy(event);
  api.cuStreamBeginCapture(stream);
  const graph = api.cuStreamEndCapture(stream);
  const exec = api.cuGraphInstantiate(graph);
  api.cuGraphDestroy(graph);
  api.cuGraphLaunch(exec, stream);
  api.cuGraphExecDestroy(exec);
  api.cuCtxSynchronize();
  api.cuStreamDestroy(stream);

  // No interleaving (0), L2 lines of 128 bytes (2), zeros outside (0).
  const said = (map: Uint8Array) => [...new BigInt64Array(map.buffer)].map(Number);
  const common = { dataType: 9, globalAddress: 0x7f0000000010n, swizzle: 3 };
  const tiled = { globalDim: [64, 2 ** 32, 5], globalStrides: [128, 2 ** 39], elementStrides: [1, 1, 2] };
  t.same(said(api.cuTensorMapEncodeTiled({ ...common, ...tiled, boxDim: [64, 256, 1] })), [
    ...[9, 3, 0x7f0000000010, 64, 5, 128, 2 ** 39, 64, 1, 1, 2, 0, 3, 2, 0, -1],
  ]);
  const image = { globalDim: [8, 9, 10, 11], globalStrides: [16, 144, 1440], elementStrides: [1, 2, 2, 1] };
  const corners = { pixelBoxLowerCorner: [-1, -2], pixelBoxUpperCorner: [-128, 127] };
  const sizes = { channelsPerPixel: 64, pixelsPerColumn: 128 };
  t.same(said(api.cuTensorMapEncodeIm2col({ ...common, ...image, ...corners, ...sizes })), [
    ...[9, 4, 0x7f0000000010, 11, 1440, -1, -2, -128, 127, 64, 128, 2, 0, 3, 2, 0],
  ]);
  t.end();
});

test('a launch from JavaScript', { skip: compiled.status !== 0 && 'no C compiler' }, (t) => {
  const device = cudaDevice(openCudaLibrary(path));
  scope(() => {
    const x = tensor([1, 2, 3, 4], [4], { device });
    const { address } = x.block;
    const launch = () => device.driver.launch('silu_forward_float32', [address, address, 4]);
    // Its result is not returned: it would live on in the outer scope, and each op would allocate.
    const op = () => scope(() => void silu(x));
    for (const [what, run] of Object.entries({ 'plan, packing and call': launch, 'a whole op': op })) {
      const microseconds = processorTime(2000, run);
      t.ok(microseconds < BOUND, `${what}: ${microseconds.toFixed(2)} microseconds`);
      t.comment(`${what}: ${microseconds.toFixed(2)} microseconds`);
    }
  });
  t.end();
});

test('two GPUs in one process: each call finds the context of its own', (t) => {
  let now = 0n;
  const copies: bigint[][] = [];
  const gpu = (own: bigint) => {
    const api = { ...standInApi(anyHopper), cuDeviceCanAccessPeer: () => false };
    const inOwn =
      <A extends unknown[], R>(call: (...args: A) => R) =>
      (...args: A): R => {
        t.equal(now, own);
        return call(...args);
      };
    return cudaDevice({
      ...api,
      cuDevicePrimaryCtxRetain: () => own,
      cuCtxSetCurrent(context) {
        now = context;
      },
      cuMemAllocAsync: inOwn(api.cuMemAllocAsync),
      cuMemcpyPeerAsync: inOwn((...args) => void copies.push([args[1], args[3]])),
      cuEventCreate: inOwn(api.cuEventCreate),
      cuEventRecord: inOwn(api.cuEventRecord),
      cuStreamWaitEvent: inOwn(api.cuStreamWaitEvent),
      cuModuleLoadData: inOwn(api.cuModuleLoadData),
      cuLaunchKernel: inOwn(api.cuLaunchKernel),
    });
  };
  const devices = [gpu(1n), gpu(2n)];
  for (const { driver, memory } of [...devices, ...devices]) {
    const { address } = memory.take(2 ** 20);
    driver.launch('silu_forward_float32', [address, address, 1]);
  }
  const [from, to] = devices.map((device) => zeros([9], { device }));
  copyBetween([[to, from]]);
  t.same(copies, [[2n, 1n]], 'the contexts of target and source');
  t.end();
});

test('no driver, no such GPU, too old a GPU: one sentence each', (t) => {
  t.throws(() => openCudaLibrary(join(folder, 'none.so')), { name: 'UserError', message: /NVIDIA driver/ });
  // A library that lacks a call, as an old driver's does; where there is none of this name, that is the answer.
  t.throws(() => openCudaLibrary('libm.so.6'), {
    name: 'UserError',
    message: /(has no cuInit|was not found): /,
  });
  t.throws(() => openDevice('cuda:x'), { message: /unknown device "cuda:x"/ });
  t.throws(() => cudaDevice(openVirtualGpu(), 3), { message: /CUDA_ERROR_INVALID_DEVICE.*1 GPU/ });
  const turing = openVirtualGpu({ capability: [7, 5] });
  t.throws(() => cudaDevice(turing), { message: /compute capability 7.5; the GPU is older than Ampere/ });
  t.end();
});

test('shared memory that a kernel declares counts beside what it is given', (t) => {
  const device = cudaDevice(openVirtualGpu());
  // Two sums of each column: 48 KiB less what the kernel declares, between the two, and 48 KiB.
  for (const c of [6128, 6136, 6144]) {
    const pass = () =>
      scope(() => {
        const [x, weight, bias] = [[2, c], [c], [c]].map((shape) => requireGrad(zeros(shape, { device })));
        backward(layerNorm(x, weight, bias, { eps: 1e-5 }));
        return gradOf(bias)?.floats();
      });
    t.ok(
      pass()?.every((sum) => sum === 2),
      `${c} columns`,
    );
  }
  t.end();
});

test('a launch with wrong parameters, and a kernel that is not there', (t) => {
  const { driver, memory } = cudaDevice(openVirtualGpu());
  const { address } = memory.take(256);
  t.throws(() => driver.launch('silu_forward_float32', [address, address]), {
    message: /silu_forward_float32 takes \(ppi\), got \(pp\)/,
  });
  t.throws(() => driver.launch('linear_forward_float32', [address, 3, address]), {
    message: /linear_forward takes \(pppppiiii\), got \(pnp\)/,
  });
  t.throws(() => driver.launch('flip_forward_float32', []), { message: /no kernel flip_forward/ });
  t.end();
});

process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
