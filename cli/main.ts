// The `sdxl` program: parses the command line, runs a command, and turns errors into one sentence and an exit status:
// 0 done, 2 a mistake that the user can mend, 130 interrupted. Anything else is a bug and shows its stack.
import { Command, CommanderError } from 'commander';
import { UserError } from '../io/errors.ts';
import { version } from './about.ts';
import { addBench } from './bench.ts';
import { addDoctor } from './doctor.ts';
import { addExport } from './export.ts';
import { addInspect } from './inspect.ts';
import { addSample } from './sample.ts';
import { spelledOut } from './sample_options.ts';
import { Stopped, type Terminal } from './terminal.ts';
import { addTrain } from './train.ts';

const processTerminal: Terminal = {
  out: (text) => void process.stdout.write(text),
  err: (text) => void process.stderr.write(text),
  live: process.stderr.isTTY === true,
};

/** Runs one command line and returns the exit status. */
export async function main(argv: readonly string[], terminal: Terminal = processTerminal): Promise<number> {
  const program = new Command('sdxl')
    .description('Stable Diffusion XL in TypeScript: sample it, train it, export it, without Python.')
    .version(version, '--version')
    .showHelpAfterError('(run with --help to see every option)')
    .exitOverride()
    .configureOutput({ writeOut: terminal.out, writeErr: terminal.err });
  addSample(program, terminal);
  addExport(program, terminal);
  addInspect(program, terminal);
  addTrain(program, terminal);
  addDoctor(program, terminal);
  addBench(program, terminal);
  inherit(program);
  try {
    await program.parseAsync(argv[0] === 'sample' ? spelledOut(argv) : [...argv], { from: 'user' });
    return 0;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
    if (error instanceof Stopped) return error.status;
    if (!(error instanceof UserError)) throw error;
    terminal.err(`error: ${error.message}\n`);
    return 2;
  }
}

/** Errors of subcommands are thrown and written as the program's own are. */
function inherit(command: Command): void {
  for (const child of command.commands) {
    child.copyInheritedSettings(command);
    inherit(child);
  }
}
