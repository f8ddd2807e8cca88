// The package's types: README's programs compile against them under `strict`, however a project resolves its modules.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import ts from 'typescript';
import { packageRoot } from './support/golden.ts';

const project = mkdtempSync(join(tmpdir(), 'sdxl-types-'));
process.on('exit', () => rmSync(project, { recursive: true, force: true }));
mkdirSync(join(project, 'node_modules'));
symlinkSync(packageRoot, join(project, 'node_modules', 'sdxl'));

const readme = readFileSync(join(packageRoot, 'README.md'), 'utf8');
const programs = [...readme.matchAll(/```(?:js|ts)\n(.*?)```/gs)].map(([, program], i) => {
  const file = join(project, `readme-${i}.mts`);
  writeFileSync(file, program);
  return file;
});

for (const [name, module, moduleResolution] of [
  ['nodenext', ts.ModuleKind.NodeNext, ts.ModuleResolutionKind.NodeNext],
  ['bundler', ts.ModuleKind.ESNext, ts.ModuleResolutionKind.Bundler],
  ['node10', ts.ModuleKind.ESNext, ts.ModuleResolutionKind.Node10],
] as const)
  test(`modules resolved as ${name}`, (t) => {
    t.ok(programs.length >= 2);
    const program = ts.createProgram(programs, {
      ...{ module, moduleResolution, target: ts.ScriptTarget.ES2022, strict: true, noEmit: true },
      ...{ types: [], lib: ['lib.es2022.d.ts'], skipLibCheck: name !== 'nodenext' },
    });
    const told = ts
      .getPreEmitDiagnostics(program)
      .map(({ messageText }) => ts.flattenDiagnosticMessageText(messageText, ' '))
      // A project has @types/node, or the DOM's types, for these.
      .filter((text) => !/Cannot find name '(console|AbortSignal)'/.test(text));
    t.same(told, []);
    t.end();
  });
