// The names under which files and folders are written before they take their own, and the removal of those that killed programs left: a
// kill -9 of an export leaves gigabytes that are hidden. A name tells the machine and the process that writes under it, so that nothing
// goes that a living program, here or at the other end of a network share, may still be writing.
import { createHash, randomBytes } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, readlinkSync, renameSync, rmSync } from 'node:fs';
import { hostname } from 'node:os';
import { dirname, join, resolve } from 'node:path';

/** What the work gives, or nothing where the system refuses it. */
function tried<R>(work: () => R): R | undefined {
  try {
    return work();
  } catch {
    return undefined;
  }
}

/** Where a process's number means one process: this machine, and in it this container. */
const machine = createHash('sha256')
  .update(
    [
      hostname(),
      tried(() => readFileSync('/etc/machine-id', 'utf8')),
      tried(() => readlinkSync('/proc/self/ns/pid')),
    ].join('\n'),
  )
  .digest('hex')
  .slice(0, 8);

/** Something that lies under such a name. */
export interface Unfinished {
  path: string;
  machine: string;
  pid: number;
}

/** What is half-written in a folder. */
export function unfinishedIn(folder: string): Unfinished[] {
  return readdirSync(folder).flatMap((name) => {
    const [, of, pid] = /^\.sdxl-([0-9a-f]{8})-(\d+)-[0-9a-f]{12}\.tmp(?:\.old)?$/.exec(name) ?? [];
    return of === undefined ? [] : [{ path: join(folder, name), machine: of, pid: Number(pid) }];
  });
}

/** Removes what nobody writes any more; what a program had moved aside takes its name again. */
export function removeUnfinished({ path }: Unfinished): void {
  for (const former of path.endsWith('.old') ? readdirSync(path) : []) {
    const place = join(dirname(path), former);
    if (!existsSync(place)) renameSync(join(path, former), place);
  }
  rmSync(path, { recursive: true, force: true });
}

/** Whether a process of this machine has this number now. */
export function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH'; // such as one of another user
  }
}

/** Folders that were cleared: what is left in them from now on is for the next program. */
const cleared = new Set<string>();

/**
 * A name beside `path` to write under. It is not derived from the target's, which may already be as long as the file system allows.
 * First what killed programs of this machine left there is removed.
 */
export function temporaryBeside(path: string): string {
  const folder = dirname(path);
  const place = resolve(folder);
  if (!cleared.has(place)) clear(place);
  cleared.add(place);
  return join(folder, `.sdxl-${machine}-${process.pid}-${randomBytes(6).toString('hex')}.tmp`);
}

/** As far as that can be done: the write that follows tells what is the matter with the folder, and what another user left stays. */
function clear(folder: string): void {
  const left = tried(() => unfinishedIn(folder)) ?? [];
  for (const each of left)
    if (each.machine === machine && !isAlive(each.pid)) tried(() => removeUnfinished(each));
}
