// The io folder's types and files: halves to the bit, and files that are written whole or not at all.
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  existsSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import {
  decodeFloats,
  encodeNumbers,
  fromBfloat16,
  fromFloat16,
  toBfloat16,
  toFloat16,
} from '../../io/dtype.ts';
import {
  assertWritable,
  asUserError,
  listFolder,
  makeFolder,
  readBytes,
  readBytesAside,
  readLines,
  replaceAtomically,
  writeFileAtomic,
} from '../../io/files.ts';
import { copyFolder } from '../../io/folders.ts';
import { isGguf, openGguf } from '../../io/gguf.ts';
import { readJson, readJsonObject } from '../../io/json.ts';
import { lockFolder } from '../../io/lock.ts';
import { readPngText } from '../../io/png.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { allClose, packageRoot } from '../support/golden.ts';
import { at, exact, filesOpen, folder, messageOf, randomNumbers, refuses } from '../support/io_helpers.ts';

test('half types: every bit pattern survives', (t) => {
  let wrong = 0;
  for (let bits = 0; bits < 65536; bits++) {
    const half = fromFloat16(bits);
    const brain = fromBfloat16(bits);
    if (Number.isNaN(half) ? !Number.isNaN(fromFloat16(toFloat16(half))) : toFloat16(half) !== bits) wrong++;
    if (Number.isNaN(brain) ? !Number.isNaN(fromBfloat16(toBfloat16(brain))) : toBfloat16(brain) !== bits)
      wrong++;
  }
  t.equal(wrong, 0, 'float16 and bfloat16 round trips');
  const every = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, bits) => bits).buffer);
  const halves = decodeFloats(every, 'float16');
  const brains = decodeFloats(every, 'bfloat16');
  wrong = 0;
  for (let bits = 0; bits < 65536; bits++) {
    if (!Object.is(halves[bits], fromFloat16(bits)) || !Object.is(brains[bits], fromBfloat16(bits))) wrong++;
  }
  t.equal(wrong, 0, 'decodeFloats agrees with the scalar conversions');
  t.end();
});

/** Rounds to `significant` bits with exponents from `lowest` up by float64 arithmetic, halves to even. */
function roundedTo(value: number, significant: number, lowest: number, largest: number): number {
  if (value === 0 || !Number.isFinite(value)) return value;
  const magnitude = Math.abs(value);
  let exponent = Math.floor(Math.log2(magnitude));
  while (2 ** exponent > magnitude) exponent--;
  while (2 ** (exponent + 1) <= magnitude) exponent++;
  const unit = 2 ** (Math.max(exponent, lowest) - significant + 1);
  const scaled = magnitude / unit;
  const floor = Math.floor(scaled);
  const rest = scaled - floor;
  const rounded = (rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor) * unit;
  return Math.sign(value) * (rounded > largest ? Number.POSITIVE_INFINITY : rounded);
}

test('half types: rounding is to nearest even', (t) => {
  const random = randomNumbers(1);
  const values: number[] = [
    0,
    -0,
    65504,
    65519.996,
    65520,
    2 ** -24,
    2 ** -25,
    1.5 * 2 ** -25,
    3.4e38,
    3.3961e38,
    1e-45,
  ];
  for (let bits = 0; bits < 0x7bff; bits += 3) values.push((fromFloat16(bits) + fromFloat16(bits + 1)) / 2);
  for (let i = 0; i < 50_000; i++) values.push(Math.fround((random() - 0.5) * 2 ** (random() * 60 - 35)));
  const largestBrain = fromBfloat16(0x7f7f);
  let wrong = 0;
  for (const value of values.map(Math.fround)) {
    if (fromFloat16(toFloat16(value)) !== roundedTo(value, 11, -14, 65504)) wrong++;
    if (fromBfloat16(toBfloat16(value)) !== roundedTo(value, 8, -126, largestBrain)) wrong++;
  }
  t.equal(wrong, 0, `${values.length} values and exact halves`);
  for (const dtype of ['float32', 'bfloat16', 'float16', 'int32', 'int64', 'uint8'] as const) {
    const numbers = [0, 1, 2, 100, 7];
    allClose(
      t,
      `${dtype} encode, decode`,
      decodeFloats(encodeNumbers(numbers, dtype), dtype),
      numbers,
      exact,
    );
  }
  t.ok(
    Number.isNaN(fromFloat16(toFloat16(Number.NaN))) && Number.isNaN(fromBfloat16(toBfloat16(Number.NaN))),
    'NaN',
  );
  t.end();
});

test('files: written whole or not at all', (t) => {
  const path = at('whole.txt');
  writeFileAtomic(path, 'first');
  writeFileAtomic(path, Buffer.from('second'));
  t.equal(readFileSync(path, 'utf8'), 'second');
  t.throws(
    () =>
      replaceAtomically(path, (temporary) => {
        writeFileSync(temporary, 'half');
        throw new Error('interrupted');
      }),
    /interrupted/,
  );
  const full = Object.assign(new Error('write'), { code: 'ENOSPC' });
  const outOfSpace = () => {
    throw full;
  };
  refuses(t, /disk is full while writing .*whole.txt: free some space/, () =>
    replaceAtomically(path, outOfSpace),
  );
  t.equal(readFileSync(path, 'utf8'), 'second', 'the old file stays');
  refuses(t, /none\/x.txt does not exist, or its folder/, () => writeFileAtomic(at('none/x.txt'), ''));
  refuses(t, /is a folder/, () => writeFileAtomic(folder, ''));
  refuses(t, /not a folder/, () => writeFileAtomic(join(path, 'x'), ''));
  // Not /dev/null, which a program with a fault would take away from the whole machine.
  if (process.platform !== 'win32') {
    spawnSync('mkfifo', [at('pipe')]);
    refuses(t, /pipe is not a regular file/, () => writeFileAtomic(at('pipe'), ''));
  }
  refuses(t, /too long/, () => writeFileAtomic(at('n'.repeat(256)), ''));
  writeFileAtomic(at('n'.repeat(255)), '');
  t.ok(existsSync(at('n'.repeat(255))), 'the longest name works');
  t.notOk(
    readdirSync(folder).some((name) => name.endsWith('.tmp')),
    'nothing left behind',
  );
  t.end();
});

test('files: Ctrl-C waits for the rename', { skip: process.platform === 'win32' && 'no signals' }, (t) => {
  const path = at('held.txt');
  const module = JSON.stringify(new URL('../../io/files.js', import.meta.url).href);
  const interrupted = (handler: string, signal = 'SIGINT') => {
    const program = `
      const { replaceAtomically } = await import(${module});
      const { writeFileSync } = await import('node:fs');
      ${handler}
      replaceAtomically(${JSON.stringify(path)}, (temporary) => {
        process.kill(process.pid, '${signal}');
        for (const until = Date.now() + 50; Date.now() < until; );
        writeFileSync(temporary, 'whole');
      });
      setTimeout(() => console.log('went on'), 300);`;
    const { status, stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', program]);
    t.equal(readFileSync(path, 'utf8'), 'whole');
    return [status, String(stdout)];
  };
  t.same(interrupted(''), [130, ''], 'and then ends the program');
  t.same(interrupted('', 'SIGHUP'), [129, ''], 'as a terminal that is closed does');
  const own = "process.on('SIGINT', () => console.log('heard'));";
  t.same(interrupted(own), [0, 'heard\nwent on\n'], 'unless it hears signals itself');
  t.notOk(
    readdirSync(folder).some((name) => name.endsWith('.tmp')),
    'nothing left behind',
  );
  t.end();
});

test('files: Ctrl-C is heard in long turns after a write', {
  skip: process.platform === 'win32' && 'no signals',
}, (t) => {
  const module = JSON.stringify(new URL('../../io/files.js', import.meta.url).href);
  // Two turns after the write: there a handler that goes after a count of turns would take the signal along.
  const program = `
    const { writeFileAtomic } = await import(${module});
    const turn = (n) => {
      if (n === 2) process.kill(process.pid, 'SIGINT');
      for (const until = Date.now() + 20; Date.now() < until; );
      if (n < 20) setImmediate(turn, n + 1);
      else console.log('went on');
    };
    setImmediate(turn, 1);
    writeFileAtomic(${JSON.stringify(at('heard.txt'))}, '');`;
  const { status, stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', program]);
  t.same([status, String(stdout)], [130, '']);
  t.end();
});

test('files: folders', (t) => {
  makeFolder(at('deep/er/folder'));
  makeFolder(at('deep/er/folder'));
  t.ok(existsSync(at('deep/er/folder')));
  writeFileSync(at('deep/file'), '');
  refuses(t, /file is a file, not a folder/, () => makeFolder(at('deep/file')));
  refuses(t, /file\/x lies under something that is not a folder/, () => makeFolder(at('deep/file/x')));
  // Where Node's own `recursive` goes round for ever.
  if (process.platform === 'linux') refuses(t, /\/proc\/x /, () => makeFolder('/proc/x/y'));
  t.end();
});

test('files: what is in a folder, and which of two files could not be written', (t) => {
  for (const name of ['b', 'a', '.c']) writeFileAtomic(at(`deep/er/${name}`), '');
  t.same(listFolder(at('deep/er')), ['.c', 'a', 'b', 'folder']);
  refuses(t, /deep\/none does not exist/, () => listFolder(at('deep/none')));
  refuses(t, /deep\/file lies under .* or is none itself/, () => listFolder(at('deep/file')));
  const copying = (code: string) => Object.assign(new Error(code), { code, path: '/from', dest: '/to' });
  const told = (code: string) => (asUserError(copying(code), 'the folder') as Error).message;
  t.match(told('ENOSPC'), /disk is full while writing \/to:/);
  t.match(told('EACCES'), /no permission for \/from:/);
  const stale = { code: 'ESTALE', syscall: 'open', path: '/far/x' };
  const others = /^the system refused to open \/far\/x \(ESTALE\): check the path and the disk$/;
  t.match((asUserError(Object.assign(new Error(), stale), 'it') as Error).message, others);
  const ours = Object.assign(new Error(), { ...stale, code: 'EBADF' });
  t.equal(asUserError(ours, 'it'), ours, 'a mistake of ours keeps its stack');
  t.end();
});

/** What a process prints that locks a folder which goes just as it is opened, and unlocks it again. */
const locking = (path: string): string =>
  spawnSync(
    process.execPath,
    [
      '--input-type=module',
      '-e',
      `import fs from 'node:fs';
      import { syncBuiltinESMExports } from 'node:module';
      const { lockFolder } = await import(${JSON.stringify(new URL('../../io/lock.js', import.meta.url).href)});
      const path = ${JSON.stringify(path)};
      const { openSync, closeSync } = fs;
      const tell = (what) => console.log(what, fs.existsSync(path));
      fs.openSync = (...given) => {
        const fd = openSync(...given);
        fs.openSync = openSync;
        fs.rmdirSync(path);
        syncBuiltinESMExports();
        return fd;
      };
      fs.closeSync = (fd) => {
        tell('closed');
        closeSync(fd);
      };
      syncBuiltinESMExports();
      const unlock = lockFolder(path);
      tell('locked');
      unlock();`,
    ],
    { encoding: 'utf8' },
  ).stdout;

test('a lock is on the folder that has the name, and holds until an empty one is removed', (t) => {
  t.equal(locking(at('locked')), 'closed false\nlocked true\nclosed false\n');
  const unlock = lockFolder(at('locked'));
  const before = filesOpen();
  refuses(t, /another program is at work in .*locked/, () => lockFolder(at('locked')));
  t.equal(filesOpen(), before);
  unlock();
  lockFolder(at('runs/mine'))();
  t.notOk(existsSync(at('runs')), 'nor does the folder above stay');
  t.end();
});

test('files: assertWritable and readJson', (t) => {
  assertWritable(at('fresh.txt'));
  t.notOk(existsSync(at('fresh.txt')), 'the check writes nothing');
  refuses(t, /create the folder/, () => assertWritable(at('none/x.txt')));
  refuses(t, /create the folder/, () => assertWritable(`${at('none')}/../x.txt`));
  refuses(t, /is a folder/, () => assertWritable(folder));
  writeFileSync(at('lone'), '');
  refuses(t, /lone\/x\.txt lies under .* not a folder/, () => assertWritable(at('lone/x.txt')));
  symlinkSync('loop', at('loop'));
  refuses(t, /leads back to itself/, () => assertWritable(at('loop')));
  if (process.getuid?.() !== 0) {
    chmodSync(folder, 0o500);
    refuses(t, /no permission/, () => assertWritable(at('x')));
    chmodSync(folder, 0o700);
  }
  writeFileSync(at('good.json'), '{"a": [1]}');
  t.strictSame(readJson(at('good.json')), { a: [1] });
  writeFileSync(at('lines.txt'), '\uFEFF caf\u00e9 \r\n\n \ttwo\rthree\n');
  t.strictSame(readLines(at('lines.txt')), ['caf\u00e9', 'two', 'three']);
  for (const encoding of ['utf16le', 'latin1'] as const) {
    writeFileSync(at('lines.txt'), 'caf\u00e9\n', encoding);
    refuses(t, /lines\.txt is not text in UTF-8: save it/, () => readLines(at('lines.txt')));
  }
  writeFileSync(at('python.json'), '{"a": -Infinity, "b": ["Infinity", {"c": NaN}], "d": "\\"NaN"}');
  t.strictSame(readJson(at('python.json')), { b: ['Infinity', {}], d: '"NaN' }, "Python's bare words");
  writeFileSync(at('bad.json'), '{"a": \n[1}');
  const message = messageOf(() => readJson(at('bad.json')));
  t.ok(/bad.json is not valid JSON/.test(message) && !message.includes('\n'), message);
  for (const lone of ['[{}]', 'null', '"text"']) {
    writeFileSync(at('lone.json'), lone);
    refuses(t, /lone\.json does not hold a JSON object/, () => readJsonObject(at('lone.json')));
  }
  refuses(t, /does not exist/, () => readJson(at('absent.json')));
  refuses(t, /is a folder/, () => readJson(folder));
  t.end();
});

test('a pipe is not waited for, a device is not read to its end, and a file not into all memory', {
  skip: process.platform === 'win32' && 'no pipes among files',
}, async (t) => {
  makeFolder(at('odd'));
  spawnSync('mkfifo', [at('odd/pipe')]);
  for (const path of [at('odd/pipe'), '/dev/zero']) {
    const says = new RegExp(`${path} is no file but a pipe, a socket or a device: give the path of a file`);
    for (const read of [readBytes, readJson, readLines, readPngText, openSafetensors, openGguf])
      refuses(t, says, () => read(path));
    await t.rejects(readBytesAside(path), { name: 'UserError', message: says });
    t.notOk(isGguf(path));
  }
  refuses(t, /odd\/pipe is no file/, () => copyFolder(at('odd'), at('odd-copy')));
  const lines = `import { readLines } from './dist/io/files.js'; console.log(readLines('/dev/stdin'));`;
  const shell = `printf 'a\\nb\\n' | "$0" --input-type=module -e "$1"`;
  const { stdout } = spawnSync('sh', ['-c', shell, process.execPath, lines], { cwd: packageRoot });
  t.equal(String(stdout), "[ 'a', 'b' ]\n", "but the shell's own pipes are");
  writeFileSync(at('large'), '');
  truncateSync(at('large'), 2 ** 29 + 1);
  refuses(t, /large has 536870913 bytes, more than the 536870912/, () => readBytes(at('large')));
});
