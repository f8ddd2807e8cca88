// Loading a run file: TypeScript (or JavaScript) that needs no build step, run through jiti because Node before 22 does not
// strip types. `import { defineRun } from 'sdxl'` works in any folder: the module is handed in, not looked up.
import { existsSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { UserError } from '../../io/errors.ts';
import { assertFile } from '../../io/files.ts';
import { packageRoot } from '../../io/package_root.ts';
import { presets } from '../../models/formats/presets.ts';
import { resolveRun } from './resolve_run.ts';
import { defineRun, type Run } from './run.ts';

/** What a run file sees as the package. */
const sdxl = { defineRun, presets, UserError };

/**
 * The runs of a file, in order, with defaults and `--set` assignments applied; that of the name `only` where it is given.
 * @throws UserError
 */
export async function loadRuns(
  path: string,
  assignments: readonly string[] = [],
  only?: string,
): Promise<Run[]> {
  const recipes = join(packageRoot, 'configs');
  if (!existsSync(path)) throw new UserError(`no run file ${path}; there are some in ${recipes}`);
  if (assertFile(path).isDirectory())
    throw new UserError(`${path} is a folder; give a run file, such as one of ${recipes}`);
  if (/\.(toml|ya?ml|py)$/i.test(path))
    throw new UserError(
      `${path} is no .ts file; write a run as those in ${recipes} (docs/coming_from.md has other programs' keys)`,
    );
  const given = await evaluate(path);
  const stages = Array.isArray(given) ? given : [given];
  if (stages.length === 0 || stages[0] === undefined)
    throw new UserError(`${path} exports no run; write export default defineRun({ ... })`);
  const stem = basename(path).replace(/\.[^.]*$/, '');
  const all = stages.map((stage, i) =>
    resolveRun(stage, path, stages.length === 1 ? stem : `${stem}-${i + 1}`, assignments),
  );
  const runs = only === undefined ? all : all.filter(({ name }) => name === only);
  if (runs.length === 0)
    throw new UserError(
      `--only ${only}: ${path} has no such run, it has ${all.map(({ name }) => name).join(', ')}`,
    );
  const twice = runs.find((run, i) =>
    runs.some((other, j) => j < i && resolve(other.output) === resolve(run.output)),
  );
  if (twice) throw new UserError(`${path}: two runs write to ${twice.output}; give each its own name`);
  return runs;
}

async function evaluate(path: string): Promise<unknown> {
  // Loaded here, as only run files need it and every command would wait for it.
  const { createJiti } = await import('jiti');
  const jiti = createJiti(import.meta.url, {
    virtualModules: { sdxl },
    fsCache: false,
    moduleCache: false,
    tryNative: false,
    interopDefault: false, // a default export and nothing else is a run
  });
  try {
    const exported = jiti.import<{ default?: unknown }>(resolve(path)).then((m) => m.default);
    const given = await beforeTheEnd(exported);
    askAll(given);
    return given;
  } catch (error) {
    if (error instanceof UserError) throw error;
    const reason = spelled(error)
      .replace(/\s+/g, ' ')
      .replace(/\(0 , \w+\.(\w+)\)/g, '$1') // how jiti calls what a file imports
      .trim();
    throw new UserError(`${path} cannot be loaded: ${reason}`);
  }
}

/**
 * What `work` gives. Where the program has nothing left to do before it does, it would end without a word; where something is thrown
 * beside it, such as by a timer, with a stack.
 */
async function beforeTheEnd<R>(work: Promise<R>): Promise<R> {
  let fail: (error: unknown) => void = () => {};
  const over = new Promise<never>((_, reject) => {
    fail = reject;
  });
  const end = () => fail(new Error('it waits for a promise that nothing keeps; export the run itself'));
  process.once('beforeExit', end);
  process.once('uncaughtException', fail);
  try {
    const given = await Promise.race([work, over]);
    await Promise.race([setImmediate(), over]); // a promise that nobody waited for is told of now
    return given;
  } finally {
    process.off('beforeExit', end);
    process.off('uncaughtException', fail);
  }
}

/** Asks for every value once: a getter that throws is to do so here, where it is the file's mistake. */
function askAll(value: unknown, asked = new Set<unknown>()): void {
  if (typeof value !== 'object' || asked.has(value)) return;
  asked.add(value);
  for (const each of Object.values(value ?? {})) askAll(each, asked);
}

/** What was thrown, which may be anything; not every object has a text. */
function spelled(thrown: unknown): string {
  if (thrown instanceof Error) return thrown.message;
  return typeof thrown === 'object' && thrown ? 'it throws an object that is no Error' : String(thrown);
}
