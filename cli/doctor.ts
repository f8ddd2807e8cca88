// `sdxl doctor`: what this machine offers the program, for a person or as JSON for a bug report. Each line that stands in
// the way of full speed carries its mend.
import { accessSync, constants, existsSync, readFileSync } from 'node:fs';
import { cpus, totalmem } from 'node:os';
import { dirname } from 'node:path';
import type { Command } from 'commander';
import { findLibrary } from '../engine/cpu/build.ts';
import { openCpuDriver } from '../engine/cpu/driver.ts';
import { openDevice } from '../engine/device.ts';
import { gib } from '../io/byte_sizes.ts';
import { cacheFolder } from '../io/hub.ts';
import { version } from './about.ts';
import { type Finding, gpus } from './doctor_gpu.ts';
import type { Terminal } from './terminal.ts';

const examples = `
Examples:
  sdxl doctor
  sdxl doctor --json

A line with "!" before it tells of something amiss, and the line below it what to do.`;

export function addDoctor(command: Command, terminal: Terminal): void {
  command
    .option('--json', 'one JSON object on stdout')
    .addHelpText('after', examples)
    .action(({ json }: { json?: boolean }) => {
      const findings = examine(terminal);
      if (json) terminal.out(`${JSON.stringify(asObject(findings))}\n`);
      else for (const finding of findings) terminal.out(asLine(finding));
    });
}

const asLine = ({ name, value, mend }: Finding): string =>
  `${mend ? '!' : ' '} ${`${name}:`.padEnd(14)}${value}${mend ? `\n                → ${mend}` : ''}\n`;

function asObject(findings: readonly Finding[]): Record<string, unknown> {
  const mends = findings.filter(({ mend }) => mend).map(({ name, mend }) => [name, mend]);
  return {
    ...Object.fromEntries(findings.map(({ name, value }) => [name, value])),
    mends: Object.fromEntries(mends),
  };
}

function examine(terminal: Terminal): Finding[] {
  findLibrary((line) => terminal.err(`${line}\n`));
  const found = gpus(); // first, as a device that is open takes of their memory
  return [
    { name: 'sdxl', value: version },
    node(),
    { name: 'platform', value: `${process.platform} ${process.arch}` },
    processor(),
    device(),
    ...kernels(),
    ...found,
    memory(),
    cache(),
  ];
}

function node(): Finding {
  const [major, minor] = process.versions.node.split('.').map(Number);
  const old = major < 20 || (major === 20 && minor < 19);
  return { name: 'node', value: process.version, mend: old ? 'install Node 20.19 or newer' : undefined };
}

/** The instruction sets that the kernels can use, as Linux lists them. */
function processor(): Finding {
  const model = cpus()[0]?.model ?? 'unknown';
  const flags = existsSync('/proc/cpuinfo')
    ? (/^flags\s*:(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1] ?? '').split(' ')
    : [];
  const known = ['avx2', 'fma', 'f16c', 'avx512f', 'avx512_bf16', 'amx_bf16'].filter((f) =>
    flags.includes(f),
  );
  return {
    name: 'cpu',
    value: `${model}, ${cpus().length} cores${known.length ? `, ${known.join(' ')}` : ''}`,
  };
}

/** The one that commands take where none is named; what a GPU lacks is told beside it. */
function device(): Finding {
  const { name } = openDevice('auto', () => {});
  const mend = name === 'reference' ? 'pictures take hours on it; see the next line' : undefined;
  return { name: 'device', value: name, mend };
}

/** The processor's. */
function kernels(): Finding[] {
  const library = findLibrary();
  if ('reason' in library)
    return [
      {
        name: 'kernels',
        value: `none: ${library.reason}`,
        mend: 'install make and g++, and have XDG_CACHE_HOME name a folder that can be written; then run again',
      },
    ];
  const driver = openCpuDriver(library.path);
  return [
    { name: 'instructions', value: driver.arch },
    { name: 'threads', value: driver.threads() },
    { name: 'kernels', value: `${driver.symbols.size} in ${library.path}` },
  ];
}

/** What the kernel could give to programs, which is more than what lies free. */
function memory(): Finding {
  const available = existsSync('/proc/meminfo')
    ? Number(/^MemAvailable:\s+(\d+)/m.exec(readFileSync('/proc/meminfo', 'utf8'))?.[1] ?? 0) * 1024
    : totalmem();
  return {
    name: 'memory',
    value: `${gib(available, 1)} available of ${gib(totalmem(), 1)}`,
    mend:
      available < 12 * 2 ** 30
        ? 'the full-size model wants 12 GiB in bfloat16: close programs, draw at 512x512, or with --q8, which takes 2.5 GiB less'
        : undefined,
  };
}

/** Where downloaded models are kept; shared with Python's huggingface_hub. */
function cache(): Finding {
  const folder = cacheFolder();
  let nearest = folder;
  while (!existsSync(nearest)) nearest = dirname(nearest);
  try {
    accessSync(nearest, constants.W_OK);
    return { name: 'cache', value: existsSync(folder) ? folder : `${folder} (not made yet)` };
  } catch {
    return { name: 'cache', value: folder, mend: `make it writable, or set HF_HOME to a folder that is` };
  }
}
