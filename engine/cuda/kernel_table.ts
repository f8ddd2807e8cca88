// The kernels found so far: a PTX file is loaded, and compiled by the driver, when its first kernel is launched. A launch is made
// ready once, its kernel found and its parameters packed, and may then be queued again and again. An entry that itself waits for
// the kernel before it (griddepcontrol.wait, see sm90.cuh) is launched so that its blocks may begin before that kernel has ended;
// all others begin when all work before them has ended. The PTX tells which they are, not the plans.
import {
  type Dim3,
  FunctionAttribute,
  type GpuApi,
  type Kernel,
  type LaunchAttributes,
  type Stream,
} from './api.ts';
import { CudaError } from './errors.ts';
import { readPtx, typesOf } from './kernels.ts';
import { type Entry, packParameters, readManifest } from './manifest.ts';
import type { KernelLaunch } from './plan.ts';
import { PROGRAMMATIC_LAUNCH, ptxCeiling, ptxVersion, versionName } from './versions.ts';

/**
 * Dynamic shared memory that a kernel may have without asking: of the 48 KiB, what it declares by itself is taken off. Kernels that
 * are given a varying amount declare at most 1 KiB.
 */
const DEFAULT_SHARED_BYTES = 47 * 1024;

interface Loaded {
  readonly kernel: Kernel;
  readonly entry: Entry;
  readonly offsets: readonly number[];
  /** Programmatic dependent launch. */
  readonly programmatic: boolean;
  sharedBytes: number;
}

/** A launch whose kernel is loaded and whose parameters are packed. */
export interface ReadyLaunch {
  readonly name: string;
  readonly kernel: Kernel;
  readonly grid: Dim3;
  readonly block: Dim3;
  readonly shared: number;
  readonly attributes: LaunchAttributes;
  readonly parameters: Uint8Array;
  readonly offsets: readonly number[];
}

interface LoadedModule {
  readonly module: bigint;
  readonly manifest: Map<string, Entry>;
}

const unpacked = new Map<string, string>();

/** Unpacks a file once: estimates of memory open one stand-in after the other. */
const readOnce: typeof readPtx = (family, dtype) => {
  const key = `${family}_${dtype}`;
  const ptx = unpacked.get(key) ?? readPtx(family, dtype);
  unpacked.set(key, ptx);
  return ptx;
};

export class KernelTable {
  readonly #api: GpuApi;
  readonly #read: typeof readPtx;
  readonly #modules = new Map<string, LoadedModule>();
  readonly #kernels = new Map<string, Loaded>();

  constructor(api: GpuApi, read = readOnce) {
    this.#api = api;
    this.#read = read;
  }

  ready({ family, entry, grid, block, shared, args, cluster }: KernelLaunch, dtype: string): ReadyLaunch {
    const found = this.#find(family, `${entry}_${dtype}`, dtype);
    if (shared > found.sharedBytes) {
      this.#api.cuFuncSetAttribute(found.kernel, FunctionAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared);
      found.sharedBytes = shared;
    }
    const { kernel, offsets, programmatic } = found;
    const parameters = packParameters(found.entry, args);
    return {
      ...{ name: found.entry.name, kernel, grid, block: [block, 1, 1], shared },
      ...{ attributes: { cluster, programmatic }, parameters, offsets },
    };
  }

  queue({ kernel, grid, block, shared, parameters, offsets, attributes }: ReadyLaunch, stream: Stream): void {
    this.#api.cuLaunchKernel(kernel, grid, block, shared, stream, parameters, offsets, attributes);
  }

  #find(family: string, symbol: string, dtype: string): Loaded {
    const known = this.#kernels.get(symbol);
    if (known) return known;
    const { module, manifest } = this.#module(family, dtype);
    const entry = manifest.get(symbol);
    if (!entry) throw new Error(`kernels/ptx/${family}_${dtype}.ptx.br has no kernel ${symbol}`);
    const kernel = this.#api.cuModuleGetFunction(module, symbol);
    const offsets = entry.parameters.map(({ offset }) => offset);
    const programmatic = entry.waits && this.#api.cuDriverGetVersion() >= PROGRAMMATIC_LAUNCH;
    const made = { kernel, entry, offsets, programmatic, sharedBytes: DEFAULT_SHARED_BYTES };
    this.#kernels.set(symbol, made);
    return made;
  }

  #module(family: string, dtype: string): LoadedModule {
    const key = `${family}_${dtype}`;
    const known = this.#modules.get(key);
    if (known) return known;
    if (!typesOf(family).includes(dtype)) throw new Error(`the GPU has no ${family} kernels for ${dtype}`);
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
