// The folders are the architecture: imports go one way, kernels ← engine ← models ← train ← cli, and io imports nothing
// of ours.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { packageRoot } from './golden.ts';

const allowed: Record<string, readonly string[]> = {
  io: ['io'],
  engine: ['io', 'engine'],
  models: ['io', 'engine', 'models'],
  train: ['io', 'engine', 'models', 'train'],
  bench: ['io', 'engine', 'models', 'train', 'bench'],
  cli: ['io', 'engine', 'models', 'train', 'bench', 'cli'],
};

test('imports go one way', (t) => {
  for (const [folder, targets] of Object.entries(allowed)) {
    if (!existsSync(join(packageRoot, folder))) continue;
    const files = readdirSync(join(packageRoot, folder), { recursive: true, encoding: 'utf8' });
    for (const file of files.filter((name) => name.endsWith('.ts'))) {
      const path = join(folder, file);
      for (const [, from] of readFileSync(join(packageRoot, path), 'utf8').matchAll(/from '(\.[^']+)'/g)) {
        const [target] = join(path, '..', from).split('/');
        t.ok(targets.includes(target), `${path} imports ${from}`);
      }
    }
  }
  t.end();
});
