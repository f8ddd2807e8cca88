// Finding the native library: the one built in this checkout or shipped in the package, else one compiled earlier into
// the user's cache, else compiled there now with make and g++ (about a minute). Nothing happens at install, because package
// managers may forbid install scripts. Run as a program it builds build/libsdxl_cpu.so in the checkout, and never fails.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { availableParallelism, homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { pathToFileURL } from 'node:url';
import koffi from 'koffi';
import { makeFolder } from '../../io/files.ts';
import { packageRoot } from '../../io/package_root.ts';

const sources = join(packageRoot, 'kernels', 'cpu');
const packaged = join(packageRoot, 'build', 'libsdxl_cpu.so');

export type Found = { path: string } | { reason: string };
let found: Found | undefined;

/** The library's path, or why there is none. Compiles at most once per process, which takes its time and is told before. */
export function findLibrary(tell: (line: string) => void = () => {}): Found {
  found ??= locate(tell);
  return found;
}

function locate(tell: (line: string) => void): Found {
  if (process.platform !== 'linux')
    return { reason: `no kernel library is built for ${process.platform} yet` };
  if (loads(packaged)) return { path: packaged };
  const cached = join(cacheFolder(), `libsdxl_cpu-${sourceHash()}-${process.arch}.so`);
  if (loads(cached)) return { path: cached };
  tell('compiling the kernels for this machine, once, which takes a minute or a few');
  return compile(cached);
}

/** A package may have been built for another processor, or against a newer C library than this machine has. */
function loads(path: string): boolean {
  if (!existsSync(path)) return false;
  try {
    koffi.load(path);
    return true;
  } catch {
    return false;
  }
}

function cacheFolder(): string {
  return join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'sdxl', 'kernels');
}

function sourceHash(): string {
  const hash = createHash('sha256');
  for (const name of readdirSync(sources).sort()) hash.update(name).update(readFileSync(join(sources, name)));
  return hash.digest('hex').slice(0, 16);
}

/** Builds into a folder of this process's own and renames, so that two programs starting at once do not collide. */
function compile(target: string): Found {
  const work = `${target}.${process.pid}`;
  try {
    makeFolder(work);
  } catch (error) {
    return { reason: `${dirname(target)} cannot be written (${(error as Error).message})` };
  }
  try {
    const made = make(join(work, 'libsdxl_cpu.so'));
    if (!('path' in made)) return made;
    renameSync(made.path, target);
    return loads(target) ? { path: target } : { reason: `${target} was compiled and cannot be loaded` };
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

/** Of g++, each of which takes some hundred megabytes. */
const jobs = Math.min(8, availableParallelism());

/** Brings the library `out` up to date, its objects beside it. */
function make(out: string): Found {
  const made = spawnSync('make', ['-C', sources, `-j${jobs}`, `OUT=${out}`], { encoding: 'utf8' });
  if (made.error)
    return { reason: 'the kernel library is not built and make was not found; install make and g++' };
  if (made.status !== 0)
    return { reason: `compiling the kernel library failed (${lastLine(made.stderr)}); install make and g++` };
  return { path: out };
}

const lastLine = (text: string): string => text.trim().split('\n').at(-1) ?? '';

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  makeFolder(dirname(packaged));
  const built = make(packaged);
  if ('reason' in built)
    console.warn(`sdxl: no native kernels: ${built.reason}. The slow reference device will be used.`);
}
