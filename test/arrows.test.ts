// The folders are the architecture: imports go one way, kernels ← engine ← models ← train ← cli, and io imports nothing
// of ours.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { packageRoot } from './support/golden.ts';
import { nonEmpty } from './support/non_empty.ts';

const allowed: Record<string, readonly string[]> = {
  io: ['io'],
  engine: ['io', 'engine'],
  models: ['io', 'engine', 'models'],
  train: ['io', 'engine', 'models', 'train'],
  bench: ['io', 'engine', 'models', 'train', 'bench'],
  cli: ['io', 'engine', 'models', 'train', 'bench', 'cli'],
};

/** A folder's files with what they import, as paths from the root, and as the import says it. */
function* importsOf(folder: string): Generator<[path: string, imports: [target: string, from: string][]]> {
  const files = readdirSync(join(packageRoot, folder), { recursive: true, encoding: 'utf8' });
  for (const file of files.filter((name) => name.endsWith('.ts'))) {
    const path = join(folder, file);
    const found = readFileSync(join(packageRoot, path), 'utf8').matchAll(/from '(\.[^']+)'/g);
    yield [path, [...found].map(([, from]) => [join(path, '..', from), from])];
  }
}

test('imports go one way', (t) => {
  for (const [folder, targets] of Object.entries(allowed)) {
    const imports = [...importsOf(folder)].flatMap(([path, all]) => all.map((each) => [path, ...each]));
    for (const [path, target, from] of nonEmpty(imports))
      t.ok(targets.includes(target.split('/')[0]), `${path} imports ${from}`);
  }
  t.end();
});

// What a room is made of lies in the rooms before it; the files beside the rooms are made of all of them.
const rooms: Record<string, readonly string[]> = {
  models: [
    ...['random', 'checkpoint', 'samplers', 'adapters', 'text', 'unet', 'vae'],
    ...['control', 'ip_adapter', 'formats', 'lora', 'locate', 'upscaler'],
  ],
  train: [
    ...['data', 'log', 'optimizers', 'objective', 'run', 'passes'],
    ...['pictures', 'parts', 'controls', 'methods', 'tasks'],
  ],
};

for (const [house, order] of Object.entries(rooms))
  test(`rooms of ${house}/ stand on each other in one order`, (t) => {
    const roomOf = (path: string): number => {
      const [, room, file] = path.split('/');
      return file ? order.indexOf(room) : order.length;
    };
    for (const [path, imports] of importsOf(house)) {
      t.ok(roomOf(path) >= 0, `${path} is in a room of the list`);
      for (const [target, from] of imports)
        if (target.startsWith(`${house}/`)) t.ok(roomOf(target) <= roomOf(path), `${path} imports ${from}`);
    }
    t.end();
  });

// In the engine a tensor, its device and the ops know each other's types.
test('no files import each other in a circle, outside the engine', (t) => {
  for (const folder of Object.keys(allowed).filter((name) => name !== 'engine')) {
    const left = new Map(importsOf(folder));
    const isFree = ([, imports]: [string, [string, string][]]) =>
      !imports.some(([target]) => left.has(target));
    for (let free = [...left].filter(isFree); free.length; free = [...left].filter(isFree))
      for (const [path] of free) left.delete(path);
    t.same([...left.keys()], [], folder);
  }
  t.end();
});
