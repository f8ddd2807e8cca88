// Run files in a folder that is gone at the end, and what holds of every mistake in one: status 2 and one sentence. train_cli.test.ts,
// train_mistakes.test.ts and resume_mistakes.test.ts share them.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { writePng } from '../../io/image.ts';
import { sdxl } from './command_line.ts';
import { goldenFolder } from './golden.ts';

export const folder = mkdtempSync(join(tmpdir(), 'sdxl-train-cli-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
export const model = join(goldenFolder, 'tiny-sdxl');

/** A folder of pictures with captions beside them. */
export function dataset(name: string, count: number): string {
  const path = join(folder, name);
  mkdirSync(path);
  for (let i = 0; i < count; i++) {
    const data = Uint8Array.from({ length: 3 * 32 * 32 }, (_, at) => (at * (i + 2)) % 255);
    writePng(join(path, `${i}.png`), { width: 32, height: 32, channels: 3, data });
    writeFileSync(join(path, `${i}.txt`), `picture ${i}`);
  }
  return path;
}

export const sound = dataset('sound', 4);

/** Writes a run file; `text` replaces its object where given. */
export function runFile(name: string, keys: object, text?: string): string {
  const run = {
    output: join(folder, `${name}-out`),
    model,
    steps: 2,
    dataset: { path: sound, resolution: 32 },
    optimizer: { lr: 1e-4 },
    ...keys,
  };
  const path = join(folder, `${name}.ts`);
  writeFileSync(
    path,
    `import { defineRun } from 'sdxl';\n${text ?? `export default defineRun(${JSON.stringify(run)});`}\n`,
  );
  return path;
}

interface Checks {
  equal(a: unknown, b: unknown, message: string): unknown;
  match(a: string, b: RegExp, message: string): unknown;
}

export async function refuses(t: Checks, what: string, sentence: RegExp, ...argv: string[]): Promise<void> {
  const { status, err } = await sdxl(...argv, '--quiet');
  const errors = err.split('\n').filter((line) => line.startsWith('error: '));
  t.equal(status, 2, `${what}: status 2`);
  t.equal(errors.length, 1, `${what}: one sentence`);
  t.match(errors[0] ?? '', sentence, `${what}: ${errors[0]}`);
}
