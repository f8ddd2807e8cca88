// The native library for tests that cannot do without it: a test that has none says so as a skip, which test/run.ts counts, and does
// not end as if it had held something.
import { findLibrary } from '../../engine/cpu/build.ts';
import { type CpuDriver, openCpuDriver } from '../../engine/cpu/driver.ts';
import { type Device, nativeDevice } from '../../engine/device.ts';

const library = findLibrary();

/** Why there is no library, as a test's `skip`; false where there is one. */
export const noLibrary: string | false = 'reason' in library && library.reason;

function nativePath(): string {
  if ('reason' in library) throw new Error(`no native library: ${library.reason}`);
  return library.path;
}

export const openNative = (): CpuDriver => openCpuDriver(nativePath());

/** A device of its own, for `arch` or this machine's best instruction set. */
export const ownDevice = (arch?: string): Device => nativeDevice(nativePath(), arch);

/** The instruction sets of the library, and of these what this machine can run. */
export const instructionSets = ['avx512', 'avx2', 'portable'];
export const runnable = (): string[] => instructionSets.slice(instructionSets.indexOf(openNative().arch));
