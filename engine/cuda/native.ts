// A native library's calls through koffi, as CUDA's driver makes them: a call returns a code, and one that is not CUDA_SUCCESS
// throws CudaError. Handles and device addresses cross as 64-bit integers. What a call writes through pointers comes back from one
// small scratch block, which libcuda.ts lays out for what it hands in as well.
import koffi from 'koffi';
import { UserError } from '../../io/errors.ts';
import { CudaError, resultName } from './errors.ts';

type Native = (...args: readonly unknown[]) => number;

/** h handle or device address, i int, z size, b host bytes, o scratch address. */
const types: Record<string, string> = {
  h: 'uint64_t',
  i: 'int',
  z: 'size_t',
  b: 'void *',
  o: 'uint64_t',
};

export const SCRATCH_BYTES = 8192;
/** Of a CUtensorMap in cuda.h; the driver asks for 64. */
const SCRATCH_ALIGNMENT = 128n;

export interface NativeLibrary {
  /** A function by its parameters' letters, whose code the caller looks at. @throws UserError of a driver without it */
  functionOf(symbol: string, signature: string): Native;
  /** Calls `symbol`, whose public name may lack its version suffix. @throws CudaError */
  call(symbol: string, signature: string, ...args: readonly unknown[]): void;
  /** A call that writes one handle or address to its first parameter. */
  made(symbol: string, signature: string, ...args: readonly unknown[]): bigint;
  /** The error for a code. */
  failed(code: number, symbol: string): CudaError;
  /** The scratch block: its address, and what lies there. */
  readonly scratch: bigint;
  readonly memory: DataView<ArrayBuffer>;
  /** What a call wrote: an integer at the block's begin, a 64-bit one, or a text. */
  int(): number;
  word(at?: number): bigint;
  text(at: number, length: number): string;
}

/** Opens the library at `path`. @throws UserError where there is none */
export function openNative(path: string): NativeLibrary {
  const library = loaded(path);
  const begin = koffi.alloc('uint8', SCRATCH_BYTES + Number(SCRATCH_ALIGNMENT)) as bigint;
  const scratch = (begin + SCRATCH_ALIGNMENT - 1n) & -SCRATCH_ALIGNMENT;
  const memory = new DataView(koffi.view(scratch, SCRATCH_BYTES));
  const known = new Map<string, Native>();
  const functionOf = (symbol: string, signature: string): Native => {
    const found = known.get(symbol);
    if (found) return found;
    const parameters = [...signature].map((letter) => types[letter]);
    try {
      const made = library.func(symbol, 'int', parameters) as unknown as Native;
      known.set(symbol, made);
      return made;
    } catch {
      throw new UserError(`${path} has no ${symbol}: the NVIDIA driver is too old; install r535 or later`);
    }
  };
  const describe = (code: number): string | undefined => {
    if (resultName(code) !== 'CUDA_ERROR_UNKNOWN') return undefined;
    const told = functionOf('cuGetErrorName', 'io')(code, scratch) === 0;
    return told ? `code ${code}, ${koffi.decode(scratch, 'char *')}` : `code ${code}`;
  };
  const failed = (code: number, symbol: string) => new CudaError(resultName(code), symbol, describe(code));
  const call = (symbol: string, signature: string, ...args: readonly unknown[]): void => {
    const code = functionOf(symbol, signature)(...args);
    if (code !== 0) throw failed(code, symbol.replace(/_v\d$/, ''));
  };
  const word = (at = 0): bigint => memory.getBigUint64(at, true);
  return {
    ...{ functionOf, call, failed, scratch, memory, word },
    made(symbol, signature, ...args) {
      call(symbol, `o${signature}`, scratch, ...args);
      return word();
    },
    int: () => memory.getInt32(0, true),
    text: (at, length) => koffi.decode(scratch + BigInt(at), 'char', length).replace(/\0[\s\S]*$/, ''),
  };
}

function loaded(path: string): ReturnType<typeof koffi.load> {
  try {
    return koffi.load(path);
  } catch {
    throw new UserError(
      `${path} was not found: the cuda device needs the NVIDIA driver, r535 or later; or use --device cpu`,
    );
  }
}
