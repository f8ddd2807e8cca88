// The `sdxl` program: parses the command line, runs a command, and turns errors into one sentence and an exit status:
// 0 done, 2 a mistake that the user can mend, 130 interrupted. Anything else is a bug and shows its stack.
import { join } from 'node:path';
import { Command, CommanderError } from 'commander';
import { UserError } from '../io/errors.ts';
import { asUserError } from '../io/files.ts';
import { packageRoot } from '../io/package_root.ts';
import { version } from './about.ts';
import { spelledOut } from './aliases.ts';
import { errorLine, ownTerminal, Stopped, type Terminal } from './terminal.ts';

interface CommandFile {
  usage: string;
  description: string;
  /** Gives the command its options and its action. */
  load: () => Promise<(command: Command, terminal: Terminal) => void>;
}

/** In the order of the help. Only the file of the command that is called is loaded, so that help answers at once. */
const commands: readonly CommandFile[] = [
  {
    usage: 'sample',
    description: 'draw pictures from a prompt',
    load: async () => (await import('./sample.ts')).addSample,
  },
  {
    usage: 'grid',
    description: 'draw pictures that differ in one to three settings, in one table',
    load: async () => (await import('./grid.ts')).addGrid,
  },
  {
    usage: 'serve',
    description: 'keep a model loaded and draw for other programs, by HTTP, and for people, on a page',
    load: async () => (await import('./serve.ts')).addServe,
  },
  {
    usage: 'export <CHECKPOINT> <OUT>',
    description: 'write a model for diffusers and other programs, in their formats',
    load: async () => (await import('./export.ts')).addExport,
  },
  {
    usage: 'inspect <FILE|DIR>',
    description: 'tell what is in a checkpoint: kind, tensors, types, sizes, problems',
    load: async () => (await import('./inspect.ts')).addInspect,
  },
  {
    usage: 'train <RUN.ts>',
    description: 'train a model by a run file, which exports defineRun({ ... })',
    load: async () => (await import('./train.ts')).addTrain,
  },
  {
    usage: 'plan <RUN.ts>',
    description: 'tell what training by a run file would take',
    load: async () => (await import('./train.ts')).addPlan,
  },
  {
    usage: 'doctor',
    description: 'tell what this machine can run, and what would make it run better',
    load: async () => (await import('./doctor.ts')).addDoctor,
  },
  {
    usage: 'bench',
    description: 'time the models, their training or every op of theirs, with random weights',
    load: async () => (await import('./bench.ts')).addBench,
  },
];

/** Commands whose options docs/coming_from.md has under other programs' names. */
const translated = ['sample', 'grid', 'serve', 'train', 'export'];

/** A variable of a shell that is not set leaves nothing behind a flag, which is not to be as if the flag were not there. @throws UserError */
function refuseEmpty(command: Command): void {
  const empty = command.registeredArguments[command.args.indexOf('')];
  if (empty) throw new UserError(`${empty.name()} is given nothing: write it behind "${command.name()}"`);
  for (const option of command.options) {
    const [, kind] = /<(.+)>/.exec(option.flags) ?? [];
    const given = [command.getOptionValue(option.attributeName())].flat();
    if (kind !== undefined && kind !== 'TEXT' && given.includes(''))
      throw new UserError(`${option.long} is given nothing: write ${kind} behind it, or leave it out`);
  }
}

/** Runs one command line and returns the exit status. */
export async function main(argv: readonly string[], terminal: Terminal = ownTerminal()): Promise<number> {
  const program = new Command('sdxl')
    .description('Stable Diffusion XL in TypeScript: sample it, train it, export it, without Python.')
    .version(version, '--version')
    .showHelpAfterError('(run with --help to see every option)')
    .configureHelp({ minWidthToWrap: 30 }) // beside the longest flag, in 80 columns
    .exitOverride()
    .configureOutput({ writeOut: terminal.out, writeErr: terminal.err })
    .hook('preAction', (_, command) => refuseEmpty(command));
  const called = argv[0] === 'help' ? argv[1] : argv[0];
  try {
    for (const { usage, description, load } of commands) {
      const command = program.command(usage).description(description);
      if (command.name() === called) (await load())(command, terminal);
    }
    await program.parseAsync(['sample', 'grid', 'serve'].includes(argv[0]) ? spelledOut(argv) : [...argv], {
      from: 'user',
    });
    return 0;
  } catch (error) {
    if (error instanceof CommanderError) {
      if (error.code === 'commander.unknownOption' && translated.includes(argv[0]))
        terminal.err(`(${join(packageRoot, 'docs', 'coming_from.md')} has other programs' words for them)\n`);
      return error.exitCode === 0 ? 0 : 2;
    }
    if (error instanceof Stopped) return error.status;
    const told = asUserError(error, 'a file');
    if (!(told instanceof UserError)) throw error;
    terminal.err(`error: ${errorLine(told.message)}\n`);
    return 2;
  }
}
