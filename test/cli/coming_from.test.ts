// docs/coming_from.md says true names: every flag, key and name in its right columns exists.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Command } from 'commander';
import { test } from 'tap';
import { spelledOut } from '../../cli/aliases.ts';
import { addExport } from '../../cli/export.ts';
import { addGrid } from '../../cli/grid.ts';
import { addSampleOptions } from '../../cli/sample/flags.ts';
import { addServe } from '../../cli/serve.ts';
import { addTrain } from '../../cli/train.ts';
import * as sdxl from '../../index.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { packageRoot } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const text = readFileSync(join(packageRoot, 'docs', 'coming_from.md'), 'utf8');
/** By heading, the cells of each row of its table; a bar in a cell is none of ours. */
const tables = text
  .split(/^## /m)
  .slice(1)
  .map((section) => {
    const rows = section
      .split('\n')
      .filter((line) => line.startsWith('|'))
      .slice(2);
    return { heading: section.split('\n')[0], rows: rows.map((row) => row.slice(1, -1).split('|')) };
  });
/** What stands in backticks. */
const named = (cell: string): string[] => [...cell.matchAll(/`([^`]+)`/g)].map(([, name]) => name);

const sampling = addSampleOptions(new Command('sample'));
const terminal = { out() {}, err() {}, live: false };
const flags = [addTrain, addExport, addServe, addGrid].flatMap((add) => {
  const command = new Command();
  add(command, terminal);
  return command.options;
});
const known = [...sampling.options, ...flags].flatMap(({ short, long }) => [short, long]);

/** Every key of a run, `optimizer.lr`. */
const keysOf = (table: object, path = ''): string[] =>
  Object.entries(table).flatMap(([key, value]) =>
    typeof value === 'object' && !Array.isArray(value) ? keysOf(value, `${path}${key}.`) : [`${path}${key}`],
  );
const keys = keysOf(resolveRun({}, 'the defaults', 'x'));
const groups = new Set(keys.filter((key) => key.includes('.')).map((key) => key.split('.')[0]));

test('flags and keys', (t) => {
  t.same(
    tables.map(({ rows }) => rows.length > 10),
    [true, true, true, true, true, true],
  );
  for (const { heading, rows } of tables) {
    let held = 0;
    const holds = (names: readonly (string | undefined)[], name: string, where: string) => {
      t.ok(names.includes(name), where);
      held++;
    };
    for (const [theirs, ...ours] of rows)
      for (const name of ours.flatMap(named)) {
        const where = `${heading}: ${theirs.trim()}: ${name}`;
        for (const [flag] of name.matchAll(/(?<![\w-])--?[a-z][a-z0-9-]*/gi)) holds(known, flag, where);
        const isKey = groups.has(name.split('.')[0]) && name.includes('.');
        if (isKey || (/training|diffengine/i.test(heading) && /^[a-z_]+$/.test(name)))
          holds(keys, name, where);
      }
    t.ok(held > 5, `${heading}: ${held} names`);
  }
  t.end();
});

test('flags that are taken as they are', (t) => {
  const rows = tables
    .flatMap((table) => table.rows)
    .filter(([, ours]) => /^ (the same|taken for)/.test(ours));
  const names = rows.flatMap(([theirs]) => named(theirs)).flatMap((each) => each.split(' '));
  for (const name of nonEmpty(names)) t.ok(known.includes(spelledOut([name])[0]), `${name} is taken`);
  t.end();
});

test('names in a program', (t) => {
  const parts = [
    'load_options',
    'request',
    'denoiser',
    'start',
    'text/conditioning',
    'control/control_request',
    'ip_adapter/image_prompt',
  ];
  const request = parts
    .map((name) => readFileSync(join(packageRoot, 'models', `${name}.ts`), 'utf8'))
    .join('\n');
  for (const [theirs, , ours] of tables[0].rows)
    for (const name of named(ours))
      t.ok(name in sdxl || new RegExp(`^  ${name}\\??: `, 'm').test(request), `${theirs.trim()}: ${name}`);
  t.end();
});

test('schedulers by the names that are told', (t) => {
  for (const [, name] of nonEmpty(text.matchAll(/--scheduler "?([^"`]+?)"?`/g)))
    if (name !== 'karras') t.ok(createSampler(name).name, name);
  t.end();
});
