// One file from the Hugging Face hub into the cache: resumed where an earlier attempt stopped, checked
// against the hub's hash, and given its name only then. A partial file carries its process's id, so two
// processes never write the same one; whoever comes next takes over what a dead process left.
import { createHash, type Hash } from 'node:crypto';
import {
  closeSync,
  createReadStream,
  fsyncSync,
  ftruncateSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { UserError } from './errors.ts';
import { writeFully } from './files.ts';

export interface RemoteFile {
  name: string;
  size: number;
  /** The hub's etag: the SHA-256 of a large (LFS) file's bytes, or the git blob SHA-1 of a small one. */
  hash: string;
}

/** The connection failed or broke, so that trying again may help. */
export class NetworkError extends Error {
  override readonly name: string = 'NetworkError';
}

/** What fetch throws ("fetch failed", "terminated") as a NetworkError that tells the system's reason. */
export function networkError(error: unknown): NetworkError {
  const { cause, message } = error as Error & { cause?: NodeJS.ErrnoException };
  return new NetworkError(cause?.code ?? cause?.message ?? message);
}

/** Opens the file's bytes from `start` on; throws UserError where trying again is no use. */
export type OpenRemote = (file: RemoteFile, start: number) => Promise<Response>;

const attempts = 5;
const firstPause = 250; // milliseconds, doubled each time
const active = new Set<string>();

/** Downloads `file` to `target`. `onBytes` hears how many of its bytes are there. @throws UserError */
export async function downloadBlob(
  file: RemoteFile,
  target: string,
  open: OpenRemote,
  onBytes: (done: number) => void,
): Promise<void> {
  const partial = claimPartial(target);
  active.add(partial);
  try {
    for (let attempt = 1; ; attempt++) {
      try {
        await continueDownload(file, partial, open, onBytes);
        break;
      } catch (error) {
        if (!(error instanceof NetworkError)) throw error;
        if (attempt === attempts)
          throw new UserError(
            `the download of ${file.name} broke off ${attempts} times (${error.message}): ` +
              'check the network and run again, it continues where it stopped',
          );
        await delay(firstPause * 2 ** (attempt - 1));
      }
    }
    renameSync(partial, target);
  } finally {
    active.delete(partial);
  }
}

async function continueDownload(
  file: RemoteFile,
  partial: string,
  open: OpenRemote,
  onBytes: (done: number) => void,
): Promise<void> {
  const found = statSync(partial, { throwIfNoEntry: false })?.size ?? 0;
  let done = found > file.size ? 0 : found;
  let hash = await hashOf(file, partial, done);
  const response = done < file.size ? await open(file, done) : undefined;
  if (done > 0 && response && response.status !== 206) {
    [done, hash] = [0, await hashOf(file, partial, 0)]; // the server sends everything again
  }
  const fd = openSync(partial, 'a');
  try {
    ftruncateSync(fd, done);
    for await (const chunk of bodyOf(response)) {
      writeFully(fd, chunk);
      hash.update(chunk);
      onBytes((done += chunk.byteLength));
      if (done > file.size) break;
    }
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
  if (done < file.size) throw new NetworkError(`${done} of ${file.size} bytes came`);
  if (done > file.size || hash.digest('hex') !== file.hash) {
    rmSync(partial, { force: true });
    throw new UserError(
      `${file.name} arrived damaged (its hash is not the hub's): run again to download it anew`,
    );
  }
}

async function* bodyOf(response: Response | undefined): AsyncGenerator<Uint8Array> {
  try {
    for await (const chunk of response?.body ?? []) yield chunk;
  } catch (error) {
    throw networkError(error);
  }
}

// The hash of the first `length` bytes of `partial`, ready for more. Git hashes a header before the bytes.
async function hashOf(file: RemoteFile, partial: string, length: number): Promise<Hash> {
  const hash = createHash(file.hash.length === 64 ? 'sha256' : 'sha1');
  if (file.hash.length === 40) hash.update(`blob ${file.size}\0`);
  if (length > 0)
    for await (const chunk of createReadStream(partial, { end: length - 1 })) hash.update(chunk);
  return hash;
}

// A name of our own for the partial file, holding what a dead process, or Python's library, left of it if
// there is any.
function claimPartial(target: string): string {
  const mine = freeName(target);
  const prefix = `${basename(target)}.`;
  for (const name of readdirSync(dirname(target))) {
    if (!name.startsWith(prefix) || !name.endsWith('.incomplete')) continue;
    const left = join(dirname(target), name);
    if (left === mine) return mine;
    if (active.has(left) || isInUse(left, name.slice(prefix.length).split('.')[0])) continue;
    try {
      renameSync(left, mine);
      return mine;
    } catch {
      // Another process was quicker.
    }
  }
  return mine;
}

function freeName(target: string): string {
  for (let i = 0; ; i++) {
    const name = `${target}.${process.pid}.${i}.incomplete`;
    if (!active.has(name)) return name;
  }
}

// Python's library puts no process id into the name: one that grew within the last minute may still be
// written.
function isInUse(path: string, owner: string): boolean {
  if (!/^\d+$/.test(owner)) {
    const changed = statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? Date.now();
    return Date.now() - changed < 60_000;
  }
  return Number(owner) !== process.pid && isAlive(Number(owner));
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH';
  }
}
