// Proof that the whole of SDXL fits a small machine: writes the base model with random weights as a diffusers folder in
// bfloat16 (7 GB, removed after) and samples from it with the program itself, two steps at 512x512 under guidance.
//   node dist/bench/full_checkpoint.js [FOLDER]
import { spawnSync } from 'node:child_process';
import { cpSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { namedParameters } from '../engine/module.ts';
import { packageRoot } from '../io/package_root.ts';
import { saveComponent, writeJson } from '../models/checkpoint/save.ts';
import { buildComponent, type Component } from '../models/formats/components.ts';
import { componentConfigs, modelIndex } from '../models/formats/diffusers_config.ts';
import { presets } from '../models/formats/presets.ts';
import { randomBytes } from './pool_weights.ts';

const base = presets['sdxl-base'];
const dtype = 'bfloat16';

function writeModel(folder: string): void {
  const bytes = randomBytes(0, dtype);
  writeJson(join(folder, 'model_index.json'), modelIndex(base));
  const { scheduler, ...configs } = componentConfigs(base);
  writeJson(join(folder, 'scheduler', 'scheduler_config.json'), scheduler);
  for (const [name, config] of Object.entries(configs)) {
    const { module } = buildComponent(config) as Component;
    const weights = [...namedParameters(module)].map(([key, p]) => {
      return { name: key, dtype, shape: p.shape, bytes: () => bytes(key, p) } as const;
    });
    saveComponent(join(folder, name), { name, config, weights });
  }
  // Any tokenizer of CLIP's kind serves; the tests' small one is at hand.
  for (const name of ['tokenizer', 'tokenizer_2'])
    cpSync(join(packageRoot, 'test', 'golden', 'tiny-sdxl', name), join(folder, name), { recursive: true });
}

const bytesIn = (folder: string): number =>
  readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .map((name) => statSync(join(folder, name)))
    .reduce((sum, each) => sum + (each.isFile() ? each.size : 0), 0);

const folder = mkdtempSync(join(process.argv[2] ?? tmpdir(), 'sdxl-full-'));
try {
  const began = Date.now();
  writeModel(folder);
  const written = (Date.now() - began) / 1000;
  console.log(`wrote ${(bytesIn(folder) / 1e9).toFixed(2)} GB in ${written.toFixed(1)} s to ${folder}`);
  const program = join(packageRoot, 'bin', 'sdxl.js');
  const size = ['--width', '512', '--height', '512', '--steps', '2', '--seed', '1'];
  const output = ['--output', join(folder, 'out.png'), '--json', '--dtype', dtype];
  const made = spawnSync(
    process.execPath,
    [program, 'sample', '--model', folder, '--prompt', 'a red fox', ...size, ...output],
    { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] },
  );
  if (made.status !== 0) throw new Error(`sdxl sample ended with status ${made.status}`);
  console.log(made.stdout.trim());
} finally {
  rmSync(folder, { recursive: true, force: true });
}
