// Folders that are never half-written: all of one is written under another name beside its place, flushed to the disk, and takes
// the name in one call. Where a folder has that name already the two exchange names, so that at every moment there is a whole one
// to be opened. A system that cannot do that (NFS, or any but Linux) takes two renames; killed between them, a program leaves the
// former folder aside, and `clearUnfinished` gives it its name back.
import {
  copyFileSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  realpathSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import koffi from 'koffi';
import { assertFile, asUserError, listFolder, makeFolder, sync } from './files.ts';
import { isAlive, removeUnfinished, temporaryBeside, unfinishedIn } from './temporary.ts';

/**
 * Makes the folder `path` (or replaces it) from what `write` puts into a temporary folder beside it, and flushes all of that to
 * the disk. If anything throws, the temporary folder is removed and `path` is as it was. Returns what `write` does.
 * @throws UserError when the disk is full, or the parent is missing or closed to us
 */
export function replaceFolderAtomically<R>(path: string, write: (temporaryPath: string) => R): R {
  const temporary = temporaryBeside(path);
  try {
    makeFolder(temporary);
    const result = write(temporary);
    syncTree(temporary);
    const former = takeName(temporary, path);
    sync(dirname(path));
    if (former !== undefined) removeAll(former);
    return result;
  } catch (error) {
    removeAll(temporary);
    throw asUserError(error, path, temporary);
  }
}

/** Moves a folder to `path`. What had that name is then where this says, if anything had it. */
function takeName(temporary: string, path: string): string | undefined {
  if (!lstatSync(path, { throwIfNoEntry: false })) {
    renameSync(temporary, path);
    return undefined;
  }
  if (exchange(temporary, path)) return temporary;
  const aside = `${temporary}.old`;
  const former = join(aside, basename(path));
  mkdirSync(aside);
  try {
    renameSync(path, former);
    renameSync(temporary, path);
  } catch (error) {
    if (existsSync(former)) renameSync(former, path);
    rmdirSync(aside);
    throw error;
  }
  return aside;
}

/** AT_FDCWD of fcntl.h: a relative path is the program's own. */
const atWorkingFolder = -100;

/** Exchanges the names of two folders in one call (RENAME_EXCHANGE, rename(2)); false where that cannot be done. */
function exchange(a: string, b: string): boolean {
  let renameat2: (folderOfA: number, a: string, folderOfB: number, b: string, flags: number) => number;
  try {
    renameat2 = koffi.load(null).func('int renameat2(int, const char *, int, const char *, unsigned int)');
  } catch {
    return false;
  }
  return renameat2(atWorkingFolder, a, atWorkingFolder, b, 2) === 0;
}

/**
 * Copies what is in a folder, links as what they lead to. Folders are made anew rather than with the rights of the first, which may be
 * closed to writing: such a copy could not be removed later. @throws UserError
 */
export function copyFolder(from: string, to: string): void {
  makeFolder(to);
  for (const name of listFolder(from)) {
    const [source, target] = [join(from, name), join(to, name)];
    try {
      if (statSync(source).isDirectory()) copyFolder(source, target);
      else {
        assertFile(source);
        copyFileSync(source, target);
      }
    } catch (error) {
      throw asUserError(error, target);
    }
  }
}

/** Removes a folder, all of it at once for those who look for it by its name. @throws UserError */
export function removeFolder(path: string): void {
  const temporary = temporaryBeside(path);
  try {
    renameSync(path, temporary);
  } catch (error) {
    throw asUserError(error, path);
  }
  removeAll(temporary);
}

function removeAll(path: string): void {
  try {
    rmSync(path, { recursive: true, force: true });
  } catch (error) {
    throw asUserError(error, path);
  }
}

/**
 * Clears away what killed programs left half-written in a folder where this program alone works (lock.ts), whatever machine they ran on:
 * in a container, a program that is started again has another name for its machine, and at times its number. What a program that runs
 * is writing there, such as an export, stays.
 * @throws UserError
 */
export function clearUnfinished(folder: string): void {
  try {
    for (const each of unfinishedIn(folder))
      if (each.pid === process.pid || !isAlive(each.pid)) removeUnfinished(each);
  } catch (error) {
    throw asUserError(error, folder);
  }
}

/**
 * Makes a new folder as `replaceFolderAtomically` does, by work that `write` cuts into pieces. It takes the place of an empty folder,
 * and of no other.
 * @throws UserError as that does, and when `path` has come to hold files meanwhile
 */
export function* newFolderInTurns<R>(
  path: string,
  write: (temporaryPath: string) => Generator<void, R>,
): Generator<void, R> {
  const place = existsSync(path) ? realpathSync(path) : path; // a link to a folder stays one
  const temporary = temporaryBeside(place);
  try {
    makeFolder(temporary);
    const result = yield* write(temporary);
    syncTree(temporary);
    renameSync(temporary, place);
    sync(dirname(place));
    return result;
  } catch (error) {
    removeAll(temporary);
    throw asUserError(error, path, temporary);
  }
}

/** Flushes a folder and all in it, however that came there: the system's copies are not flushed. */
function syncTree(folder: string): void {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) syncTree(path);
    else if (entry.isFile()) sync(path);
  }
  sync(folder);
}
