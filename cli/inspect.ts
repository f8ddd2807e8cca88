// `sdxl inspect`: what is in a checkpoint, from its headers, in a second; status 2 when it would not load.
import type { Command } from 'commander';
import { gibOrMib } from '../io/byte_sizes.ts';
import { UserError } from '../io/errors.ts';
import { type Inspection, inspect } from '../models/inspect.ts';
import { printable, type Terminal } from './terminal.ts';

const examples = `
Examples:
  sdxl inspect sd_xl_base_1.0.safetensors
  sdxl inspect sdxl-Q4_K_M.gguf
  sdxl inspect ./my-model --json

Problems are what would keep it from loading; with any, the exit status is 2.`;

export function addInspect(command: Command, terminal: Terminal): void {
  command
    .option('--json', 'one JSON object on stdout')
    .addHelpText('after', examples)
    .action((path: string, { json }: { json?: boolean }) => {
      const found = inspect(path);
      terminal.out(json ? `${JSON.stringify(found)}\n` : printable(asText(found)));
      const [first, ...more] = found.problems;
      const where = first?.startsWith(path) ? '' : `${path}: `;
      if (first)
        throw new UserError(`${where}${first}${more.length ? ` (and ${more.length} more problems)` : ''}`);
    });
}

function asText({ path, kind, components, lora, metadata }: Inspection): string {
  const rows = components.map((c) => [
    c.name,
    c.class ?? '',
    `${c.tensors} tensors`,
    `${c.parameters.toLocaleString('en-US')} parameters`,
    gibOrMib(c.bytes),
    Object.keys(c.dtypes).join(' '),
  ]);
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  const lines = rows.map((row) => `  ${row.map((cell, i) => cell.padEnd(widths[i])).join('  ')}`.trimEnd());
  if (lora) {
    const layers = Object.entries(lora.layers).map(([target, count]) => `${count} in ${target}`);
    const rank = lora.ranks.length > 0 ? `rank ${lora.ranks.join(', ')}; ` : '';
    lines.push(`  ${rank}layers: ${layers.join(', ')}`);
  }
  for (const [name, text] of Object.entries(metadata)) {
    const value = text.replace(/\s+/g, ' ');
    lines.push(`  ${name}: ${value.length > 80 ? `${value.slice(0, 77)}...` : value}`);
  }
  return `${path}\n  ${kind}\n${lines.join('\n')}\n`;
}
