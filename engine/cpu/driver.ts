// The native CPU library behind the Driver interface, through koffi. The library is its own manifest: it lists each
// kernel's symbol and signature, and a call that does not match is refused here.
import koffi, { type TypeObject } from 'koffi';
import type { Block, Driver } from '../driver.ts';
import { checkArguments } from '../signature.ts';

type Native = (...args: readonly unknown[]) => unknown;

export interface CpuDriver extends Driver {
  /** avx512, avx2 or portable. */
  readonly arch: string;
  readonly symbols: ReadonlyMap<string, string>;
  threads(): number;
  setThreads(count: number): void;
}

const parameterTypes: Record<string, string> = { p: 'void *', i: 'int', f: 'float', d: 'double' };
const prototypes = new Map<string, TypeObject>();

function prototypeOf(signature: string): TypeObject {
  const known = prototypes.get(signature);
  if (known) return known;
  const made = koffi.proto(
    `sdxl_kernel_${signature}`,
    'void',
    [...signature].map((letter) => parameterTypes[letter]),
  );
  prototypes.set(signature, made);
  return made;
}

/** The library's kernels for an instruction set, with their signatures. */
const symbolsOf = (manifest: string): Map<string, string> =>
  new Map(
    manifest
      .trim()
      .split('\n')
      .map((line) => line.split(' ') as [string, string]),
  );

/** Loads the library at `path` for the best instruction set of this machine, or for `arch`. */
export function openCpuDriver(path: string, arch?: string): CpuDriver {
  const library = koffi.load(path);
  const alloc = library.func('void *sdxl_alloc(int64_t bytes)') as Native;
  const free = library.func('void sdxl_free(void *memory)') as Native;
  const upload = library.func('void sdxl_copy(void *target, const void *source, int64_t bytes)') as Native;
  const read = library.func('int sdxl_read(int fd, void *target, int64_t position, int64_t bytes)') as Native;
  const download = library.func('sdxl_copy', 'void', ['_Out_ void *', 'void *', 'int64_t']) as Native;
  const zero = library.func('void sdxl_zero(void *target, int64_t bytes)') as Native;
  const lookup = library.func('void *sdxl_kernel(const char *arch, const char *symbol)') as Native;
  const chosen = arch ?? String((library.func('const char *sdxl_best_arch()') as Native)());
  const manifest = library.func('const char *sdxl_manifest(const char *arch)') as Native;
  const symbols = symbolsOf(String(manifest(chosen)));
  const kernels = new Map<string, Native>();

  const kernel = (symbol: string, signature: string): Native => {
    const known = kernels.get(symbol);
    if (known) return known;
    const made = koffi.decode(lookup(chosen, symbol), prototypeOf(signature)) as Native;
    kernels.set(symbol, made);
    return made;
  };

  return {
    arch: chosen,
    symbols,
    threads: library.func('int sdxl_threads()') as () => number,
    setThreads: library.func('void sdxl_set_threads(int count)') as (count: number) => void,
    allocate(bytes): Block | undefined {
      const address = alloc(bytes) as bigint | null;
      return address ? { bytes, address } : undefined;
    },
    free: (block) => void free(block.address),
    upload: (block, offset, source) => void upload(block.address + BigInt(offset), source, source.byteLength),
    read: (block, bytes, fd, position) => read(fd, block.address, position, bytes) === 1,
    download: (block, offset, target) =>
      void download(target, block.address + BigInt(offset), target.byteLength),
    clear: (block, bytes) => void zero(block.address, bytes),
    launch(symbol, args) {
      const signature = symbols.get(symbol);
      if (signature === undefined) throw new Error(`the CPU library has no kernel ${symbol} for ${chosen}`);
      checkArguments(symbol, signature, args);
      kernel(symbol, signature)(...args);
    },
  };
}
