// Folders that are written whole or not at all: a program killed at any of its calls leaves the former folder or the new one.
import { spawnSync } from 'node:child_process';
import fs, {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { basename, join } from 'node:path';
import { test } from 'tap';
import { writeFileAtomic } from '../../io/files.ts';
import {
  clearUnfinished,
  copyFolder,
  newFolderInTurns,
  removeFolder,
  replaceFolderAtomically,
} from '../../io/folders.ts';
import { atOnce, inTurns } from '../../io/turns.ts';
import { packageRoot } from '../support/golden.ts';
import { at, folder, messageOf, refuses } from '../support/io_helpers.ts';

test('a folder is replaced', (t) => {
  const inFolder = (name: string) =>
    replaceFolderAtomically(at('whole'), (temporary) => writeFileAtomic(join(temporary, name), ''));
  refuses(t, /whole\/none\/x does not exist/, () => inFolder('none/x'));
  refuses(t, /the name of .*whole\/n+ is too long/, () => inFolder('n'.repeat(300)));
  t.notOk(existsSync(at('whole')));
  inFolder('old');
  inFolder('new');
  t.same(readdirSync(at('whole')), ['new'], 'another takes its place');
  t.throws(
    () =>
      replaceFolderAtomically(at('whole'), (temporary) => {
        writeFileAtomic(join(temporary, 'half'), '');
        throw new Error('interrupted');
      }),
    /interrupted/,
  );
  t.same(readdirSync(at('whole')), ['new'], 'or it stays');
  symlinkSync('whole', at('link'));
  replaceFolderAtomically(at('link'), (temporary) => writeFileAtomic(join(temporary, 'other'), ''));
  t.same(
    [readdirSync(at('link')), readdirSync(at('whole'))],
    [['other'], ['new']],
    'a link is replaced itself',
  );
  t.same(readdirSync(folder).sort(), ['link', 'whole'], 'nothing left behind');
  t.end();
});

/**
 * Replaces a folder in a process of its own, which kills itself at the `nth` of its calls of the file system; with two renames
 * where the system is not to exchange names. Says whether it was killed.
 */
function killedAt(nth: number, path: string, exchanges: boolean): boolean {
  const module = JSON.stringify(new URL('../../io/folders.js', import.meta.url).href);
  const program = `
    import fs from 'node:fs';
    import { syncBuiltinESMExports } from 'node:module';
    import koffi from 'koffi';
    const { replaceFolderAtomically } = await import(${module});
    if (!${exchanges}) koffi.load = () => { throw new Error('none'); };
    let calls = 0;
    for (const [name, call] of Object.entries(fs).filter(([name]) => name.endsWith('Sync')))
      fs[name] = (...given) => {
        if (calls++ === ${nth}) process.kill(process.pid, 'SIGKILL');
        return call(...given);
      };
    syncBuiltinESMExports();
    replaceFolderAtomically(${JSON.stringify(path)}, (temporary) => {
      fs.writeFileSync(temporary + '/file', 'new');
    });`;
  const { status, signal, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', program], {
    cwd: packageRoot,
    encoding: 'utf8',
  });
  if (signal !== 'SIGKILL' && status !== 0) throw new Error(stderr);
  return signal === 'SIGKILL';
}

for (const [how, exchanges] of [
  ['an exchange', true],
  ['two renames', false],
] as const)
  test(`killed at every call of ${how}`, { skip: process.platform !== 'linux' && 'no exchange' }, (t) => {
    const parent = at(how);
    const path = join(parent, 'place');
    const held = () => (existsSync(path) ? readFileSync(join(path, 'file'), 'utf8') : 'missing');
    const seen: string[] = [];
    let missing = 0;
    for (let nth = 0; ; nth++) {
      rmSync(parent, { recursive: true, force: true });
      mkdirSync(path, { recursive: true });
      writeFileSync(join(path, 'file'), 'old');
      const killed = killedAt(nth, path, exchanges);
      if (held() === 'missing') missing++;
      clearUnfinished(parent);
      t.same(readdirSync(parent), ['place'], 'the rest is cleared away');
      seen.push(held());
      if (!killed) break;
    }
    const firstNew = seen.indexOf('new');
    t.ok(
      firstNew > 10 && seen.length > firstNew + 3,
      `${seen.length} runs, whole and new from ${firstNew} on`,
    );
    t.same(seen, [...Array(firstNew).fill('old'), ...Array(seen.length - firstNew).fill('new')]);
    t.equal(missing, exchanges ? 0 : 1, 'kills after which nobody could have opened it');
    t.end();
  });

test('a folder whose file system cannot flush folders is written, but a file that cannot be flushed is told', (t) => {
  const { fsyncSync } = fs;
  const failing = (code: string, isMeant: (entry: fs.Stats) => boolean) => {
    fs.fsyncSync = (fd) => {
      if (isMeant(fs.fstatSync(fd))) throw Object.assign(new Error(code), { code });
      fsyncSync(fd);
    };
    syncBuiltinESMExports();
    try {
      return messageOf(() =>
        replaceFolderAtomically(at('flushed'), (temporary) => writeFileAtomic(join(temporary, 'file'), code)),
      );
    } finally {
      Object.assign(fs, { fsyncSync });
      syncBuiltinESMExports();
    }
  };
  const isFolder = (entry: fs.Stats) => entry.isDirectory();
  t.equal(failing('EINVAL', isFolder), 'no error');
  t.equal(failing('ENOTSUP', isFolder), 'no error');
  t.match(failing('EIO', isFolder), /the disk failed at .*flushed/);
  t.match(
    failing('EINVAL', (entry) => entry.isFile()),
    /EINVAL/,
  );
  t.equal(readFileSync(at('flushed/file'), 'utf8'), 'ENOTSUP', 'what was there stays');
  t.end();
});

test('all of a folder is flushed before it takes its name', (t) => {
  const { fsyncSync } = fs;
  const flushed = new Set<number>();
  fs.fsyncSync = (fd) => {
    flushed.add(fs.fstatSync(fd).ino);
    fsyncSync(fd);
  };
  syncBuiltinESMExports();
  const names = ['file', 'deep', 'deep/er', 'deep/er/file'];
  try {
    replaceFolderAtomically(at('tree'), (temporary) => {
      mkdirSync(join(temporary, 'deep', 'er'), { recursive: true });
      for (const name of ['file', 'deep/er/file']) writeFileSync(join(temporary, name), name);
    });
  } finally {
    Object.assign(fs, { fsyncSync });
    syncBuiltinESMExports();
  }
  const paths = [folder, at('tree'), ...names.map((name) => at(`tree/${name}`))];
  t.same(
    paths.filter((path) => !flushed.has(lstatSync(path).ino)),
    [],
    'with its parent',
  );
  removeFolder(at('tree'));
  t.notOk(
    readdirSync(folder).some((name) => name === 'tree' || name.startsWith('.sdxl')),
    'and is removed',
  );
  refuses(t, /tree does not exist/, () => removeFolder(at('tree')));
  t.end();
});

test('a copy can be written to, whatever it is of', (t) => {
  const from = at('closed');
  mkdirSync(join(from, 'deep'), { recursive: true });
  writeFileSync(join(from, 'deep', 'file'), 'text');
  symlinkSync('deep', join(from, 'link'));
  for (const closed of [join(from, 'deep'), from]) chmodSync(closed, 0o555);
  copyFolder(from, at('copied'));
  for (const closed of [from, join(from, 'deep')]) chmodSync(closed, 0o755);
  const copied = ['', 'deep', 'link'].map((name) => lstatSync(at(`copied/${name}`)));
  t.ok(copied.every((entry) => entry.isDirectory() && entry.mode & 0o200));
  t.same(readFileSync(at('copied/link/file'), 'utf8'), 'text');
  refuses(t, /none does not exist/, () => copyFolder(at('none'), at('copied')));
  symlinkSync('nowhere', join(from, 'deep', 'broken'));
  refuses(t, /deep\/broken does not exist/, () => copyFolder(from, at('copied')));
  t.end();
});

test('what is being written stays', (t) => {
  const parent = at('shared');
  const unfinished = (pid: number) => join(parent, `.sdxl-0123abcd-${pid}-00ff00ff00ff.tmp`);
  for (const pid of [process.pid, process.ppid, 99999999]) mkdirSync(unfinished(pid), { recursive: true });
  for (const name of ['.sdxl-x-00ff.tmp', '.sdxl-0123abcd-99999999-00ff00ff00ff.tmp.more'])
    writeFileSync(join(parent, name), '');
  clearUnfinished(parent);
  t.same(
    readdirSync(parent).sort(),
    [
      basename(unfinished(process.ppid)),
      '.sdxl-0123abcd-99999999-00ff00ff00ff.tmp.more',
      '.sdxl-x-00ff.tmp',
    ].sort(),
    'by a program that runs, or under a name that is not of ours',
  );
  t.end();
});

/** Begins to write in a process of its own, which is then killed; gives the hidden name that is left. */
function killedWriting(parent: string, write: string): string {
  const program = `
    import { writeFileSync } from 'node:fs';
    const io = (name) => import(new URL(name, ${JSON.stringify(new URL('../../io/', import.meta.url).href)}).href);
    const [files, folders] = [await io('files.js'), await io('folders.js')];
    ${write}`;
  const before = readdirSync(parent);
  const { signal, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', program], {
    cwd: packageRoot,
    encoding: 'utf8',
  });
  if (signal !== 'SIGKILL') throw new Error(stderr);
  const [left, ...more] = readdirSync(parent).filter((name) => !before.includes(name));
  if (left === undefined || more.length > 0)
    throw new Error(`one name should be left, not ${[left, ...more]}`);
  return left;
}

test('the next write beside it clears what a killed one left, and nothing that may be of a living one', (t) => {
  const kinds = {
    file: 'files.replaceAtomically(PATH, (temporary) => { writeFileSync(temporary, "half"); process.kill(process.pid, "SIGKILL"); });',
    folder:
      'folders.replaceFolderAtomically(PATH, (temporary) => { writeFileSync(temporary + "/a", "half"); process.kill(process.pid, "SIGKILL"); });',
  };
  for (const [kind, write] of Object.entries(kinds)) {
    const parent = at(`left-${kind}`);
    mkdirSync(parent);
    const path = join(parent, 'made');
    const left = killedWriting(parent, write.replace('PATH', JSON.stringify(path)));
    const [machine, pid] = left.replace('.sdxl-', '').split('-');
    const kept = [
      left.replace(`-${pid}-`, `-${process.ppid}-`), // of a program that runs
      left.replace(`-${pid}-`, `-${process.pid}-`), // of this one
      left.replace(machine, machine === '0123abcd' ? '0123abce' : '0123abcd'), // of a machine whose programs nobody here knows
      left.replace('.tmp', '.more'),
    ];
    for (const name of kept) writeFileSync(join(parent, name), 'at work');
    writeFileAtomic(path, 'whole');
    t.same(readdirSync(parent).sort(), [...kept, 'made'].sort(), kind);
  }
  t.end();
});

test('a new folder in turns', async (t) => {
  function* write(temporary: string): Generator<void, string> {
    mkdirSync(join(temporary, 'deep'));
    for (const name of ['a', 'deep/b']) {
      writeFileSync(join(temporary, name), name);
      yield;
    }
    return 'made';
  }
  const place = at('turns/new');
  mkdirSync(at('turns'));
  const left = () => readdirSync(at('turns'));
  const heard: string[] = [];
  setImmediate(() => heard.push('another'));
  t.equal(await inTurns(newFolderInTurns(place, write), () => heard.push('piece')), 'made');
  t.same(heard, ['another', 'piece', 'piece'], 'others have their turn');
  t.same([left(), readdirSync(place)], [['new'], ['a', 'deep']]);
  refuses(t, /turns\/new holds files by now/, () => atOnce(newFolderInTurns(place, write)));
  const leave = inTurns(newFolderInTurns(at('turns/left'), write), () => {
    throw new Error('enough');
  });
  await t.rejects(leave, /enough/);
  t.same(left(), ['new'], 'nothing of either is left');
  rmSync(place, { recursive: true });
  mkdirSync(place);
  symlinkSync('new', at('turns/link'));
  atOnce(newFolderInTurns(at('turns/link'), write));
  t.same(readdirSync(place), ['a', 'deep'], 'an empty folder gives way, by a link too');
  t.same(left(), ['link', 'new']);
});
