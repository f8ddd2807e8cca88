// `sdxl doctor`: what this machine offers the program, for a person or as JSON for a bug report.
import { freemem, totalmem } from 'node:os';
import type { Command } from 'commander';
import { findLibrary } from '../engine/cpu/build.ts';
import { openCpuDriver } from '../engine/cpu/driver.ts';
import { version } from './about.ts';
import type { Terminal } from './main.ts';

export function addDoctor(program: Command, terminal: Terminal): void {
  program
    .command('doctor')
    .description('tell what devices and kernels this machine has')
    .option('--json', 'one JSON object on stdout')
    .action(({ json }: { json?: boolean }) => {
      const report = examine();
      if (json) terminal.out(`${JSON.stringify(report)}\n`);
      else
        for (const [name, value] of Object.entries(report))
          terminal.out(`${`${name}:`.padEnd(18)}${value}\n`);
    });
}

function examine(): Record<string, string | number> {
  const gib = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const library = findLibrary();
  const base = { sdxl: version, node: process.version, platform: `${process.platform} ${process.arch}` };
  const memory = `${gib(freemem())} free of ${gib(totalmem())}`;
  if ('reason' in library)
    return { ...base, memory, device: 'reference', kernels: `none: ${library.reason}` };
  const driver = openCpuDriver(library.path);
  return {
    ...base,
    memory,
    device: 'cpu',
    instructions: driver.arch,
    threads: driver.threads(),
    kernels: `${driver.symbols.size} in ${library.path}`,
  };
}
