// A folder that one program at a time may work in: the system's own lock (flock) on the folder, which ends with the program
// however that ends, so that nothing is left behind to be cleared away. Where a system has none, nothing is locked.
import { closeSync, existsSync, fstatSync, openSync, rmdirSync, statSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import koffi from 'koffi';
import { UserError } from './errors.ts';
import { asUserError, makeFolder } from './files.ts';

/** LOCK_EX | LOCK_NB: for us alone, and without waiting. */
const exclusive = 2 | 4;

/**
 * Makes the folder `path` if need be and locks it. What is returned unlocks it, and removes folders that were made and stayed empty.
 * @throws UserError when another program has it
 */
export function lockFolder(path: string): () => void {
  const made = absentFolders(resolve(path));
  makeFolder(path);
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (error) {
    throw asUserError(error, path);
  }
  if (isTaken(fd)) {
    closeSync(fd);
    throw new UserError(
      `another program is at work in ${path}: wait until it ends, or choose another folder`,
    );
  }
  if (!isAt(path, fd)) {
    // Whoever had the lock has removed the folder since it was opened here.
    closeSync(fd);
    return lockFolder(path);
  }
  return () => {
    made.forEach(removeEmpty); // while nobody else has the lock
    closeSync(fd);
  };
}

/** Those of a folder and the ones above it that are not there, the innermost first. */
const absentFolders = (path: string): string[] =>
  existsSync(path) ? [] : [path, ...absentFolders(dirname(path))];

/** Whether `path` still is the folder that is open. */
function isAt(path: string, fd: number): boolean {
  const found = statSync(path, { bigint: true, throwIfNoEntry: false });
  const open = fstatSync(fd, { bigint: true });
  return found?.ino === open.ino && found.dev === open.dev;
}

function isTaken(fd: number): boolean {
  let flock: (fd: number, operation: number) => number;
  try {
    flock = koffi.load(null).func('int flock(int fd, int operation)');
  } catch {
    return false;
  }
  return flock(fd, exclusive) !== 0 && koffi.errno() === koffi.os.errno.EAGAIN;
}

function removeEmpty(path: string): void {
  try {
    rmdirSync(path);
  } catch {
    // It has files, or is gone.
  }
}
