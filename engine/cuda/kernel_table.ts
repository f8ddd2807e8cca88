// The kernels found so far: a PTX file is loaded, and compiled by the driver, when its first kernel is launched.
import { type Dim3, FunctionAttribute, type GpuApi, type Kernel, type Stream } from './api.ts';
import { CudaError } from './errors.ts';
import { readPtx } from './kernels.ts';
import { type Entry, packInto, readManifest } from './manifest.ts';
import type { KernelLaunch } from './plan.ts';
import { ptxCeiling, ptxVersion, versionName } from './versions.ts';

/** Dynamic shared memory that a kernel may have without asking. */
const DEFAULT_SHARED_BYTES = 48 * 1024;

interface Loaded {
  readonly kernel: Kernel;
  readonly entry: Entry;
  /** Where its parameters are packed: the driver has copied them when the launch returns. */
  readonly parameters: Uint8Array;
  readonly view: DataView;
  readonly offsets: readonly number[];
  sharedBytes: number;
}

interface LoadedModule {
  readonly module: bigint;
  readonly manifest: Map<string, Entry>;
}

export class KernelTable {
  readonly #api: GpuApi;
  readonly #read: typeof readPtx;
  readonly #modules = new Map<string, LoadedModule>();
  readonly #kernels = new Map<string, Loaded>();

  constructor(api: GpuApi, read = readPtx) {
    this.#api = api;
    this.#read = read;
  }

  launch(
    { family, entry, grid, block, shared, args, cluster }: KernelLaunch,
    dtype: string,
    stream: Stream,
  ): string {
    const found = this.#find(family, `${entry}_${dtype}`, dtype);
    if (shared > found.sharedBytes) {
      this.#api.cuFuncSetAttribute(found.kernel, FunctionAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared);
      found.sharedBytes = shared;
    }
    packInto(found.view, found.entry, args);
    const threads: Dim3 = [block, 1, 1];
    const { kernel, parameters, offsets } = found;
    this.#api.cuLaunchKernel(kernel, grid, threads, shared, stream, parameters, offsets, cluster);
    return found.entry.name;
  }

  #find(family: string, symbol: string, dtype: string): Loaded {
    const known = this.#kernels.get(symbol);
    if (known) return known;
    const { module, manifest } = this.#module(family, dtype);
    const entry = manifest.get(symbol);
    if (!entry) throw new Error(`kernels/ptx/${family}_${dtype}.ptx.gz has no kernel ${symbol}`);
    const kernel = this.#api.cuModuleGetFunction(module, symbol);
    const parameters = new Uint8Array(entry.bytes);
    const view = new DataView(parameters.buffer);
    const offsets = entry.parameters.map(({ offset }) => offset);
    const made = { kernel, entry, parameters, view, offsets, sharedBytes: DEFAULT_SHARED_BYTES };
    this.#kernels.set(symbol, made);
    return made;
  }

  #module(family: string, dtype: string): LoadedModule {
    const key = `${family}_${dtype}`;
    const known = this.#modules.get(key);
    if (known) return known;
    const ptx = this.#read(family, dtype);
    this.#checkVersion(key, ptx);
    const made = { module: this.#api.cuModuleLoadData(ptx), manifest: readManifest(ptx) };
    this.#modules.set(key, made);
    return made;
  }

  /** The driver's own refusal names neither version. */
  #checkVersion(key: string, ptx: string): void {
    const driver = this.#api.cuDriverGetVersion();
    const [needed, ceiling] = [ptxVersion(ptx), ptxCeiling(driver)];
    if (needed <= ceiling) return;
    const detail = `the ${key} kernels are PTX ${needed}, and a driver for CUDA ${versionName(driver)} reads up to ${ceiling}`;
    throw new CudaError('CUDA_ERROR_UNSUPPORTED_PTX_VERSION', 'cuModuleLoadData', detail);
  }
}
