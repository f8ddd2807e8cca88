// What the programs of this folder share: their options, and which sections of many are meant.
import { Command } from 'commander';
import { UserError } from '../../io/errors.ts';

export interface ProgramOptions {
  device: string;
  out: string;
  limit: number;
  caseLimit: number;
  only?: string;
  commit?: string;
  section?: string;
  from: number;
}

/** `more` adds a program's own options. */
export function programOptions<O extends ProgramOptions>(
  name: string,
  more: (command: Command) => Command,
): O {
  const command = new Command(name)
    .option('--device <name>', 'cuda, cuda:N, or virtual', 'cuda:0')
    .option('--out <folder>', 'where the results go', 'gpu-out')
    .option('--limit <seconds>', 'for all; what is left then is told as not run', Number, 460)
    .option('--case-limit <seconds>', 'for one case, before its process is ended', Number, 120)
    .option('--only <names>', 'sections whose names begin with one of these, comma-separated')
    .option('--commit <name>', 'for the record, where git is not at hand');
  more(command);
  // The child's own: which section, from which case on.
  command.option('--section <name>').option('--from <case>', '', Number, 0);
  for (const hidden of command.options.slice(-2)) hidden.hideHelp();
  return command.parse().opts<O>();
}

export function chosen<S extends { name: string }>(sections: readonly S[], only: string | undefined): S[] {
  const names = only?.split(',').map((name) => name.trim());
  const unknown = names?.find((prefix) => !sections.some(({ name }) => name.startsWith(prefix)));
  if (unknown !== undefined) {
    const known = sections.map(({ name }) => name).join(', ');
    throw new UserError(`no section begins with "${unknown}"; there are ${known}`);
  }
  return sections.filter(({ name }) => !names || names.some((prefix) => name.startsWith(prefix)));
}

/** Runs a program; a user's error is one sentence and status 2. */
export function main(program: () => Promise<void>): void {
  program().catch((error) => {
    console.error(error instanceof UserError ? error.message : error);
    process.exitCode = error instanceof UserError ? 2 : 1;
  });
}
