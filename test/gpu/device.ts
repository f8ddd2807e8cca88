// The GPU that the programs of this folder run on: a real one behind the NVIDIA driver, or with `virtual` the virtual GPU,
// on which the same programs are proved where there is none.
import { spawnSync } from 'node:child_process';
import { withoutPdl } from '../../bench/gpu/gpu.ts';
import { DeviceAttribute, type GpuApi } from '../../engine/cuda/api.ts';
import { openCudaLibrary } from '../../engine/cuda/libcuda.ts';
import { versionName } from '../../engine/cuda/versions.ts';
import { cudaDevice, type Device } from '../../engine/device.ts';
import { UserError } from '../../io/errors.ts';
import { packageRoot } from '../../io/package_root.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

/** A GPU's driver API, before anything is done with it. */
export interface Api {
  readonly api: GpuApi;
  readonly ordinal: number;
}

export interface Gpu extends Api {
  readonly device: Device;
}

/** `cuda`, `cuda:N` or `virtual`; races are looked for by the tests, not here. `arenaBytes` is the virtual one's memory. */
export function openApi(name: string, arenaBytes?: number): Api {
  const number = /^cuda(?::(\d+))?$/.exec(name);
  if (!number && name !== 'virtual')
    throw new UserError(`unknown device "${name}"; these programs run on cuda, cuda:N or virtual`);
  const ordinal = Number(number?.[1] ?? 0);
  const api = number ? openCudaLibrary() : openVirtualGpu({ races: false, arenaBytes, capability: [9, 0] });
  return { api, ordinal };
}

/** Without `pdl` each launch waits for all that came before. */
export function openGpu(name: string, pdl = true): Gpu {
  const { api, ordinal } = openApi(name);
  const gpu = { api, ordinal, device: cudaDevice(api, ordinal) };
  return pdl ? gpu : withoutPdl(gpu);
}

/** What a record must name: the GPU, its driver, the date and the commit. */
export function describeGpu({ api, ordinal }: Api, commit = said('git', 'rev-parse', '--short=10', 'HEAD')) {
  const attribute = (which: number) => api.cuDeviceGetAttribute(which, ordinal);
  const capability = `${attribute(DeviceAttribute.COMPUTE_CAPABILITY_MAJOR)}.${attribute(DeviceAttribute.COMPUTE_CAPABILITY_MINOR)}`;
  const described = {
    gpu: api.cuDeviceGetName(ordinal),
    capability,
    multiprocessors: attribute(DeviceAttribute.MULTIPROCESSOR_COUNT),
    memory_gib: Number((api.cuDeviceTotalMem(ordinal) / 2 ** 30).toFixed(1)),
    cuda: api.cuDriverGetVersion(),
    driver: said('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'),
    date: new Date().toISOString(),
    commit,
    node: process.version,
  };
  const { gpu, cuda, driver, date } = described;
  const text = `${gpu}, compute capability ${capability}, CUDA ${versionName(cuda)}, driver ${driver}; ${date}, commit ${commit}`;
  return { ...described, text };
}

/** The first line that a program prints, or "unknown" where it is not there. */
function said(program: string, ...args: string[]): string {
  const { stdout } = spawnSync(program, args, { encoding: 'utf8', cwd: packageRoot, timeout: 20_000 });
  return stdout?.trim().split('\n')[0] || 'unknown';
}
