// Files that are never half-written: bytes go to a temporary file in the same folder, are flushed to the
// disk, and take the target's name in one rename. The system's error codes become sentences that say what to
// do.
import {
  accessSync,
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  type Stats,
  statSync,
  writeSync,
} from 'node:fs';
import { readFile } from 'node:fs/promises';
import { constants as os } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { UserError } from './errors.ts';
import { temporaryBeside } from './temporary.ts';
import { atOnce } from './turns.ts';

/** Linux moves at most 2^31 - 4096 bytes per call; larger transfers are cut into pieces of this size. */
export const largestTransfer = 2 ** 30;

/** Writes all of `bytes` at the file's current position. */
export function writeFully(fd: number, bytes: Uint8Array): void {
  for (let done = 0; done < bytes.byteLength; ) {
    done += writeSync(fd, bytes, done, Math.min(largestTransfer, bytes.byteLength - done));
  }
}

/**
 * Replaces (or creates) `path` by what `write` puts into a temporary file beside it. If anything throws, the
 * temporary file is removed and `path` is as it was. Returns what `write` does.
 * @throws UserError when the disk is full, or the folder is missing or closed to us
 */
export const replaceAtomically = <R>(path: string, write: (temporaryPath: string, fd: number) => R): R =>
  atOnce(
    // biome-ignore lint/correctness/useYield: one piece
    replaceInTurns(path, function* (temporary, fd) {
      return write(temporary, fd);
    }),
  );

/** `replaceAtomically` for long work, which `write` cuts into pieces. */
export function* replaceInTurns<R>(
  path: string,
  write: (temporaryPath: string, fd: number) => Generator<void, R>,
): Generator<void, R> {
  const temporary = temporaryBeside(path);
  holdInterrupt();
  try {
    assertReplaceable(path);
    const fd = openSync(temporary, 'wx');
    let result: R;
    try {
      result = yield* write(temporary, fd);
      fsyncSync(fd);
      renameSync(temporary, path);
    } catch (error) {
      rmSync(temporary, { force: true });
      throw error;
    } finally {
      closeSync(fd);
    }
    sync(dirname(path));
    return result;
  } catch (error) {
    throw asUserError(error, path, temporary);
  }
}

/**
 * Ctrl-C (and what a service manager sends, or a terminal that is closed) ends a program at once, which is what people want,
 * except between a temporary file and its rename: this defers it to the end of the running turn, when the file stands whole.
 * A handler that is taken off while a signal waits for its turn would lose it, so each stays until a turn is short. Programs
 * with a handler of their own decide themselves.
 */
function holdInterrupt(): void {
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    if (process.listenerCount(name) > 0) continue;
    const leave = () => process.exit(128 + os.signals[name]);
    process.on(name, leave);
    afterShortTurn(() => process.off(name, leave));
  }
}

/** Signals are heard between a timer and an immediate; work of no more than a millisecond there leaves none unheard. */
function afterShortTurn(done: () => void): void {
  setTimeout(() => {
    const began = performance.now();
    setImmediate(() => (performance.now() - began < 1 ? done() : afterShortTurn(done)));
  });
}

/** Makes a folder and those above it, if they are not there. @throws UserError */
export function makeFolder(path: string): void {
  try {
    makeFolders(resolve(path));
  } catch (error) {
    throw asUserError(error, path);
  }
}

/** One by one: Node's own `recursive` calls a read-only disk a missing folder, and in /proc it never comes back. */
function makeFolders(path: string): void {
  const found = statSync(path, { throwIfNoEntry: false });
  if (found?.isDirectory()) return;
  if (found) throw new UserError(`${path} is a file, not a folder: choose another path`);
  makeFolders(dirname(path));
  try {
    mkdirSync(path);
  } catch (error) {
    // Another process may have been faster.
    if (!statSync(path, { throwIfNoEntry: false })?.isDirectory()) throw error;
  }
}

/** The names in a folder, in their order. @throws UserError when it cannot be read */
export function listFolder(path: string): string[] {
  try {
    return readdirSync(path).sort();
  } catch (error) {
    throw asUserError(error, path);
  }
}

/**
 * The files in a folder and in those that it holds, by their paths there with `/`. Hidden ones are left out, such as macOS writes beside
 * each file. Links are followed, none twice; a folder in it that cannot be read is passed over. @throws UserError when it cannot be read itself
 */
export function filesUnder(path: string): string[] {
  const seen = new Set<string>();
  const below = (names: readonly string[], at: string): string[] =>
    names.flatMap((name) => {
      if (name.startsWith('.')) return [];
      const place = join(path, at, name);
      try {
        const found = statSync(place);
        if (!found.isDirectory()) return found.isFile() ? [at + name] : [];
        const real = realpathSync(place);
        if (seen.has(real)) return [];
        seen.add(real);
        return below(readdirSync(place).sort(), `${at}${name}/`);
      } catch {
        return [];
      }
    });
  const names = listFolder(path);
  seen.add(realpathSync(path));
  return below(names, '');
}

/** Writes `bytes` to `path`, all or nothing. @throws UserError as `replaceAtomically` */
export function writeFileAtomic(path: string, bytes: Uint8Array | string): void {
  const data = typeof bytes === 'string' ? new TextEncoder().encode(bytes) : bytes;
  replaceAtomically(path, (_temporary, fd) => writeFully(fd, data));
}

/**
 * Refuses what is no file before anybody opens it: a pipe would be waited for, and a device may never end. The shell's own pipes, of
 * <(command) and of standard input, end with the program that writes into them.
 * @throws UserError where it is not there, or something else
 */
export function assertFile(path: string): Stats {
  const found = statSync(path);
  const isShells = found.isFIFO() && /^\/dev\/(stdin|fd\/\d+)$/.test(path);
  if (found.isFile() || found.isDirectory() || isShells) return found;
  throw new UserError(`${path} is no file but a pipe, a socket or a device: give the path of a file`);
}

/** More than any picture or text has that is held whole in memory; a string can be no longer. */
const mostBytes = 2 ** 29;

function assertShort(path: string): void {
  const { size } = assertFile(path);
  if (size > mostBytes)
    throw new UserError(
      `${path} has ${size} bytes, more than the ${mostBytes} of any file of its kind: give another`,
    );
}

/** The bytes of `path`. @throws UserError when it cannot be read */
export function readBytes(path: string): Buffer {
  try {
    assertShort(path);
    return readFileSync(path);
  } catch (error) {
    throw asUserError(error, path);
  }
}

/** `readBytes`, while other work goes on. */
export async function readBytesAside(path: string): Promise<Buffer> {
  try {
    assertShort(path);
    return await readFile(path);
  } catch (error) {
    throw asUserError(error, path);
  }
}

/** The text in `path`, without the mark that some editors begin it with. @throws UserError when it cannot be read */
export function readText(path: string): string {
  const bytes = readBytes(path);
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
    // UTF-16 without a mark has a zero beside each letter, which UTF-8 would let pass.
    if (!text.includes('\0')) return text;
  } catch {
    // Told below.
  }
  throw new UserError(`${path} is not text in UTF-8: save it in that encoding`);
}

/** The lines of a text that say something, trimmed. @throws UserError as `readText` */
export const readLines = (path: string): string[] =>
  readText(path)
    .split(/\r\n|\n|\r/)
    .map((line) => line.trim())
    .filter((line) => line !== '');

/** Finds out before the long work starts that `path` could not be written at its end. @throws UserError */
export function assertWritable(path: string): void {
  try {
    assertReplaceable(path);
    accessSync(dirname(path), constants.W_OK | constants.X_OK);
  } catch (error) {
    throw asUserError(error, path);
  }
}

// A rename would put a regular file in the place of a device such as /dev/null.
function assertReplaceable(path: string): void {
  const found = statSync(path, { throwIfNoEntry: false });
  if (found?.isDirectory()) throw new UserError(`${path} is a folder: give the path of a file`);
  if (found && !found.isFile()) throw new UserError(`${path} is not a regular file: give the path of a file`);
}

/** Flushes a file, or a folder where its file system can: some that are of other machines cannot, and need not stop the work. */
export function sync(path: string): void {
  if (process.platform === 'win32') return; // Windows cannot open a folder, and flushes no file that is open to be read.
  const fd = openSync(path, 'r');
  try {
    fsyncSync(fd);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (!(code === 'EINVAL' || code === 'ENOTSUP') || !fstatSync(fd).isDirectory()) throw error;
  } finally {
    closeSync(fd);
  }
}

const reasons: Record<string, (path: string) => string> = {
  ENOENT: (path) => `${path} does not exist, or its folder does not: check the path, or create the folder`,
  ENOTDIR: (path) => `${path} lies under something that is not a folder, or is none itself: check the path`,
  ENOTEMPTY: (path) =>
    `${path} holds files by now, which nothing writes over: remove them, or choose another folder`,
  EBUSY: (path) =>
    `${path} is in use by the system, as a mount point is: choose another path, such as one in it`,
  EISDIR: (path) => `${path} is a folder: give the path of a file`,
  EACCES: (path) => `no permission for ${path}: change its permissions, or choose another folder`,
  EPERM: (path) => `no permission for ${path}: change its permissions, or choose another folder`,
  EROFS: (path) => `${path} is on a read-only disk: choose another folder`,
  ENOSPC: (path) => `the disk is full while writing ${path}: free some space, or choose another disk`,
  EDQUOT: (path) =>
    `the disk quota is used up while writing ${path}: free some space, or choose another disk`,
  EFBIG: (path) => `${path} would be larger than its file system or a limit allows: choose another disk`,
  ENAMETOOLONG: (path) => `the name of ${path} is too long: choose a shorter one`,
  ELOOP: (path) => `${path} is a symbolic link that leads back to itself: mend the link`,
  EMFILE: (path) => `too many files are open to open ${path}: raise the limit with "ulimit -n"`,
  ENFILE: (path) => `the system has too many files open to open ${path}: end other programs`,
  EIO: (path) => `the disk failed at ${path}: check the disk`,
};

const isOfWriting = /^(ENOSPC|EDQUOT|EFBIG|EROFS)$/;

/**
 * A system error as one sentence about `path` (or the file the system named); any other error as it was. What lies at
 * `temporaryPath` is called by the name that it would have had.
 */
export function asUserError(error: unknown, path: string, temporaryPath?: string): unknown {
  const meant = (text: string): string => (temporaryPath ? text.replaceAll(temporaryPath, path) : text);
  if (error instanceof UserError) {
    const said = meant(error.message);
    return said === error.message ? error : new UserError(said);
  }
  const { code, syscall, path: source, dest } = error as NodeJS.ErrnoException & { dest?: string };
  if (code === undefined) return error;
  // Of a copy, what is read comes first.
  const named = (isOfWriting.test(code) ? (dest ?? source) : source) ?? path;
  const reason = reasons[code]?.(named);
  if (reason !== undefined) return new UserError(meant(reason));
  // EBADF is a mistake of ours.
  if (syscall === undefined || code === 'EBADF') return error;
  return new UserError(
    meant(`the system refused to ${syscall} ${named} (${code}): check the path and the disk`),
  );
}
