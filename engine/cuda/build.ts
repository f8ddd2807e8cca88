// Builds kernels/ptx from kernels/cuda with nvcc (`npm run build:kernels`): each family once per storage type, for
// compute_80, so that every card since Ampere runs it, and families for Hopper for compute_90a. The PTX is committed,
// packed with Brotli, and users need no toolkit. ptxas then assembles each file; REPORT.md tables what it makes of each kernel.
// `--check` builds elsewhere and compares. The header names the version of PTX that the text needs, not nvcc's own, so that
// older drivers take it; of the line table only the lines of our own files are kept. The history of the hard kernels
// (kernels/lab) is built beside its sources, in bfloat16 alone: no program loads it.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative } from 'node:path';
import { pathToFileURL } from 'node:url';
import { brotliCompressSync, constants } from 'node:zlib';
import { packageRoot } from '../../io/package_root.ts';
import { forHopper, labFolder, ptxFolder, ptxName, readPtx, typesOf } from './kernels.ts';

const sources = join(packageRoot, 'kernels', 'cuda');
const generations = ['sm_80', 'sm_89', 'sm_90', 'sm_120'] as const;
const hopper = ['sm_90a'] as const;
/** What mma.sync on bfloat16, cp.async and ldmatrix need: drivers since CUDA 11.0 take it. wgmma and TMA need CUDA 12.0. */
const versionFor = (family: string): string => (forHopper(family) ? '8.0' : '7.0');

const familyNames = (folder: string): string[] =>
  readdirSync(folder)
    .filter((name) => name.endsWith('.cu'))
    .map((name) => basename(name, '.cu'))
    .sort();

/** A source and the headers of ours that it includes, in order. */
function includesOf(path: string, seen = new Set<string>()): Set<string> {
  seen.add(path);
  for (const [, header] of readFileSync(path, 'utf8').matchAll(/#include "([^"]+)"/g)) {
    const included = join(dirname(path), header);
    if (!seen.has(included)) includesOf(included, seen);
  }
  return seen;
}

/** A digest of a family's source and headers, kept in its PTX: a test sees stale PTX without nvcc. */
function sourceDigest(source: string): string {
  const hash = createHash('sha256');
  for (const path of includesOf(source)) hash.update(basename(path)).update(readFileSync(path));
  return hash.digest('hex').slice(0, 16);
}

export interface PtxFile {
  readonly family: string;
  readonly dtype: string;
  readonly digest: string;
  readonly source: string;
  /** Where its PTX lies. */
  readonly folder: string;
}

const filesOf = (from: string, folder: string, types: (family: string) => readonly string[]): PtxFile[] =>
  familyNames(from).flatMap((family) => {
    const source = join(from, `${family}.cu`);
    return types(family).map((dtype) => ({ family, dtype, digest: sourceDigest(source), source, folder }));
  });

/** Every PTX file that the sources make, and the digest that it should carry. */
export const expectedFiles = (): PtxFile[] => filesOf(sources, ptxFolder, typesOf);
/** The same of the history of kernels. */
export const labFiles = (): PtxFile[] => filesOf(labFolder, labFolder, () => ['bfloat16']);

function run(command: string, args: readonly string[]): string {
  const ran = spawnSync(command, args, { encoding: 'utf8' });
  if (ran.error) throw new Error(`${command} was not found; install the CUDA toolkit`);
  if (ran.status !== 0) throw new Error(`${command} ${args.join(' ')}\n${ran.stderr}`);
  return ran.stderr + ran.stdout;
}

/** The PTX of a family in one storage type; `scratch` is for nvcc's own file. */
function compile({ family, dtype, digest, source }: PtxFile, scratch: string): string {
  const out = join(scratch, `${family}_${dtype}.ptx`);
  const arch = forHopper(family) ? '-arch=compute_90a' : '-arch=compute_80';
  const define = `-DT_${dtype.toUpperCase()}`;
  run('nvcc', ['-ptx', '-std=c++17', arch, '-lineinfo', define, '-o', out, source]);
  const body = tidy(readFileSync(out, 'utf8'), versionFor(family));
  rmSync(out);
  return `// ${relative(packageRoot, source)} as ${dtype}, sources ${digest}\n${body}`;
}

/** nvcc's PTX without comments and blank lines, with the lines of our own files and nothing else of the line table. */
function tidy(ptx: string, version: string): string {
  const ours = new Map<string, string>();
  for (const [, number, path] of ptx.matchAll(/^\s*\.file\s+(\d+)\s+"([^"]+)"/gm)) {
    const own = relative(packageRoot, path);
    if (own.startsWith('kernels')) ours.set(number, `\t.file\t${number} "${own}"`);
  }
  const lines: string[] = [];
  let place = '';
  for (const line of ptx.replace(/\.section\s+\.debug_str\s*\{[^}]*\}/g, '').split('\n')) {
    const text = line.trim();
    const [, file, row] = /^\.loc\s+(\d+)\s+(\d+)/.exec(text) ?? [];
    if (file) {
      if (ours.has(file) && row !== '0') place = `\t.loc ${file} ${row} 0`;
      continue;
    }
    if (text === '' || text.startsWith('//') || text.startsWith('.file')) continue;
    // Tells memory checkers which bytes of a wide load are used; PTX older than 8.3 has no such word.
    if (text.startsWith('.pragma "used_bytes_mask')) continue;
    if (place && /^[@a-z]/.test(text)) {
      lines.push(place);
      place = '';
    }
    const short = line
      // nvcc marks names of this file's own with a hash of the path it was called with.
      .replace(/_INTERNAL_[0-9a-f]{8}_(\d+_\w+?_cu)_[0-9a-f]{8}/g, '_INTERNAL_00000000_$1_00000000')
      .replace(/\b\w+_param_(\d+)/g, 'p$1')
      .replace(/\$L__BB\d+_/g, '$L')
      .replace(/ +\t/g, ' ')
      .replace(/, +/g, ',');
    lines.push(text.startsWith('.version') ? `.version ${version}` : short);
  }
  return `${dedupe(lines).join('\n')}\n${[...ours.values()].join('\n')}\n`;
}

/** Drops a place that repeats the last one within an entry. */
function dedupe(lines: readonly string[]): string[] {
  let last = '';
  return lines.filter((line) => {
    if (line.includes('.entry')) last = '';
    if (!line.startsWith('\t.loc')) return true;
    const fresh = line !== last;
    last = line;
    return fresh;
  });
}

interface Resources {
  registers: number;
  shared: number;
  stack: number;
  spills: number;
}

/** What ptxas says of every entry of a module, for one generation. */
function assemble(ptx: string, generation: string, scratch: string): Map<string, Resources> {
  const path = join(scratch, `${generation}.ptx`);
  writeFileSync(path, ptx);
  const log = run('ptxas', ['-v', `-arch=${generation}`, path, '-o', join(scratch, `${generation}.cubin`)]);
  // What it could not do as told: wgmma one after another, setmaxnreg left out.
  const told = /^.*Potential Performance Loss.*$/m.exec(log);
  if (told) throw new Error(`${generation}: ${told[0]}`);
  const found = new Map<string, Resources>();
  const pattern =
    /Compiling entry function '(\w+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads[\s\S]*?Used (\d+) registers([^\n]*)/g;
  for (const [, entry, stack, stores, loads, registers, rest] of log.matchAll(pattern)) {
    const shared = Number(/(\d+) bytes smem/.exec(rest)?.[1] ?? 0);
    found.set(entry, {
      registers: Number(registers),
      shared,
      stack: Number(stack),
      spills: Number(stores) + Number(loads),
    });
  }
  return found;
}

const worst = (each: readonly Resources[], pick: (r: Resources) => number) => Math.max(...each.map(pick));

/** A row per kernel: registers in each generation, then the most that any of them needs of the rest. */
function rowsOf(family: string, dtype: string, arches: readonly string[], scratch: string): string[] {
  const ptx = readPtx(family, dtype);
  const tables = arches.map((arch) => assemble(ptx, arch, scratch));
  return [...tables[0].keys()].map((entry) => {
    const each = tables.map((table) => table.get(entry) as Resources);
    const cells = [
      ...each.map((r) => r.registers),
      worst(each, (r) => r.shared),
      worst(each, (r) => r.spills),
    ];
    const matrix = forHopper(family) ? ` ${hopperInstructions(ptx, entry)} |` : '';
    return `| ${entry} | ${cells.join(' | ')} | ${worst(each, (r) => r.stack)} |${matrix}`;
  });
}

/** How often an entry's text has wgmma and TMA. */
function hopperInstructions(ptx: string, entry: string): string {
  const body = ptx.slice(ptx.indexOf(`.entry ${entry}(`)).split('\n.visible .entry')[0];
  const count = (pattern: RegExp) => [...body.matchAll(pattern)].length;
  return `${count(/wgmma\.mma_async/g)} | ${count(/cp\.async\.bulk\.tensor/g)}`;
}

function table(columns: readonly string[], rows: readonly string[]): string[] {
  return [`| kernel | ${columns.join(' | ')} |`, `|---|${columns.map(() => '---|').join('')}`, ...rows];
}

/** Of all sources: a test sees a report that was made of others. */
export function sourcesDigest(): string {
  const hash = createHash('sha256');
  for (const { digest } of expectedFiles()) hash.update(digest);
  return hash.digest('hex').slice(0, 16);
}

function report(scratch: string): string {
  const rows = (arches: readonly string[], wanted: (family: string) => boolean) =>
    expectedFiles()
      .filter(({ family }) => wanted(family))
      .flatMap(({ family, dtype }) => rowsOf(family, dtype, arches, scratch));
  const resources = ['shared', 'spills', 'stack'];
  const ours = rows(hopper, forHopper);
  const hopperTable = [
    '',
    '## For Hopper alone',
    '',
    ...table([...hopper, ...resources, 'wgmma', 'TMA'], ours),
  ];
  return [
    '# What ptxas makes of the kernels',
    '',
    'Written by `npm run build:kernels`. Registers per thread in each generation; static shared memory, spilled bytes and',
    'stack in bytes, the most of all. Dynamic shared memory is given at launch (engine/cuda/plan*.ts).',
    `Sources: ${sourcesDigest()}.`,
    '',
    ...table(
      [...generations, ...resources],
      rows(generations, (family) => !forHopper(family)),
    ),
    ...(ours.length ? hopperTable : []),
    '',
  ].join('\n');
}

function readIfThere({ family, dtype, folder }: PtxFile): string | undefined {
  try {
    return readPtx(family, dtype, folder);
  } catch {
    return undefined;
  }
}

/** Half of gzip's bytes: entries of a family differ in little, and lie further apart than gzip looks back. */
const pack = (text: string): Buffer =>
  brotliCompressSync(text, { params: { [constants.BROTLI_PARAM_LGWIN]: constants.BROTLI_MAX_WINDOW_BITS } });

/** Builds the families named, or all; gives the files whose text has changed. Only then are they written, if at all. */
function buildAll(check: boolean, only: readonly string[], scratch: string): string[] {
  const changed: string[] = [];
  for (const file of [...expectedFiles(), ...labFiles()]) {
    if (only.length && !only.includes(file.family)) continue;
    const text = compile(file, scratch);
    const name = ptxName(file.family, file.dtype);
    console.log(`${name} ${(text.length / 1024).toFixed(0)} KiB of text`);
    if (readIfThere(file) === text) continue;
    changed.push(name);
    if (!check) writeFileSync(join(file.folder, name), pack(text));
  }
  return changed;
}

function main(check: boolean, only: readonly string[]): void {
  const scratch = mkdtempSync(join(tmpdir(), 'sdxl-ptx-'));
  try {
    const changed = buildAll(check, only, scratch);
    if (check && changed.length) {
      console.error(`stale: ${changed.join(', ')}; run npm run build:kernels`);
      process.exitCode = 1;
    }
    if (check || only.length) return;
    const names = expectedFiles().map(({ family, dtype }) => ptxName(family, dtype));
    for (const name of readdirSync(ptxFolder)) {
      if (name.includes('.ptx') && !names.includes(name)) rmSync(join(ptxFolder, name));
    }
    writeFileSync(join(ptxFolder, 'REPORT.md'), report(scratch));
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const args = process.argv.slice(2);
  main(
    args.includes('--check'),
    args.filter((name) => !name.startsWith('--')),
  );
}
