// `sdxl grid`: pictures that differ in one to three settings, in one table (A1111's X/Y/Z plot). A command of its own, not flags of
// `sdxl sample`, whose answer is a picture for each prompt and seed: here it is one file, written even of a grid that is stopped.
import type { Command } from 'commander';
import { UserError } from '../io/errors.ts';
import { assertWritable, writeFileAtomic } from '../io/files.ts';
import { writePng } from '../io/image.ts';
import { type Axes, labelsOf, notOfGrids, readAxes, typedAs } from './grid/axes.ts';
import { type Cell, planCells } from './grid/cells.ts';
import { drawAll, type Hand, workOf } from './grid/draw.ts';
import { openSheet } from './grid/sheet.ts';
import { below } from './help.ts';
import { encodeAside } from './png_threads.ts';
import { progressBar, stopwatch } from './progress.ts';
import type { SampleCall } from './sample/call.ts';
import { textOf } from './sample/draw.ts';
import { addSampleFlags } from './sample/flags.ts';
import { onceOf } from './sample/models.ts';
import type { SampleOptions } from './sample/options.ts';
import { heedingSignals, Stopped, type Terminal } from './terminal.ts';

const help = `
NAME is a flag of sdxl sample without its dashes, or prompt-sr. VALUES have commas between; one that has commas itself stands in double
quotes. Of numbers there are ranges: 1-5 is 1,2,3,4,5; "1-5 (+2)" is 1,3,5; "10-20 [3]" is three from 10 to 20: 10,15,20. An empty value
leaves the flag out; karras=off,on switches one that takes none. A flag that may be given more than once, such as --lora, is added to
those that all cells have. prompt-sr=OLD,NEW,... replaces OLD in the prompt and the negative prompt, and shows OLD itself first.

All other flags are those of sdxl sample (see sdxl sample --help), and hold for every cell; all have one seed where none is given.
Each cell is what sdxl sample draws with its flags. Ctrl-C writes what is drawn, and leaves the other cells white.

Examples:
  sdxl grid --x guidance-scale=3,5,7 --y scheduler=euler,dpm++2m_karras --prompt "a castle" --model MODEL
  sdxl grid --x lora=step100.safetensors,step200.safetensors --y seed=1-4 --prompt "a castle" --model MODEL --output loras.png
  sdxl grid --x lora=,style.safetensors:0.5,style.safetensors:1 --prompt "a castle" --model MODEL
  sdxl grid --x 'prompt-sr=castle,tower,"ruin, at night"' --y "steps=10-50 [3]" --z model=MODEL,OTHER --prompt "a castle on a hill"
  sdxl grid --x "strength=0.3-0.7 (+0.2)" --image photo.png --prompt "a watercolour" --model MODEL --sub-images`;

interface GridOptions extends SampleOptions {
  x?: string;
  y?: string;
  z?: string;
  subImages?: boolean;
}

export function addGrid(command: Command, terminal: Terminal): void {
  addSampleFlags(command);
  const own = command.options.length;
  command
    .optionsGroup('Grid:')
    .option('--x <NAME=VALUES>', 'what differs from column to column, such as guidance-scale=3,5,7')
    .option('--y <NAME=VALUES>', 'from row to row')
    .option('--z <NAME=VALUES>', 'from grid to grid, which stand side by side')
    .option('--sub-images', 'write each cell too, numbered row by row: grid-0.png')
    .configureHelp({ visibleOptions: ({ options }) => options.slice(own) })
    .addHelpText('after', below(help))
    .action(async (options: GridOptions) => {
      const [stray] = command.args;
      if (stray !== undefined)
        throw new UserError(
          `"${stray}" belongs to no flag; put the values of an axis in quotes where they have spaces`,
        );
      await draw(await prepare(command, options, terminal), options, terminal);
    });
  command.setOptionValueWithSource('output', 'grid.png', 'default');
}

/** All cells, planned, and the sheet for them. @throws UserError for what cannot be drawn */
async function prepare(command: Command, { x, y, z, output, subImages }: GridOptions, terminal: Terminal) {
  const idle = command.options.find((each) => {
    const name = each.attributeName();
    return notOfGrids.includes(name) && command.getOptionValueSource(name) === 'cli';
  });
  if (idle)
    throw new UserError(`${idle.long} is not for grids, whose cells are one picture each; leave it out`);
  const axes = readAxes(command, { x, y, z });
  const cells = await planCells(command, axes, terminal);
  const [columns, rows, grids] = axes.map(labelsOf);
  const sizes = cells.map(({ at, call }) => ({ at, ...call.written }));
  const sheet = openSheet({ columns, rows, grids }, sizes);
  const numbered = (i: number) => output.replace(/\.png$/i, (end) => `-${i}${end}`);
  const files = new Map(subImages ? cells.map(({ at }, i) => [at, numbered(i)]) : []);
  for (const file of [output, ...files.values()]) assertWritable(file);
  return { axes, cells, sheet, files };
}

/** Draws what it can, and writes that. @throws what ended it */
async function draw(
  { axes, cells, sheet, files }: Awaited<ReturnType<typeof prepare>>,
  options: GridOptions,
  terminal: Terminal,
): Promise<void> {
  const { output, json, quiet = false } = options;
  const [{ call, sources }] = cells;
  const { device, dtype } = sources;
  const { width, height } = sheet.picture;
  const { seconds, timed } = stopwatch();
  if (!quiet) terminal.err(`${cells.length} cells, ${width}x${height} in all, ${dtype} on ${device.name}\n`);
  const drawn: Cell[] = [];
  const spoilt: Cell[] = [];
  const failure = await drawHeeding(cells, drawn, { timed, quiet, terminal }, async (cell, picture, text) => {
    sheet.place(picture, cell.at);
    if (!picture.finite) spoilt.push(cell);
    const file = files.get(cell.at);
    if (file) writeFileAtomic(file, await encodeAside({ pictures: [picture], text }));
  });
  if (drawn.length > 0) await timed('decode', () => writePng(output, sheet.picture, gridText(call, axes)));
  if (failure && drawn.length > 0)
    terminal.err(`${output} has the ${drawn.length} of ${cells.length} cells that were drawn\n`);
  if (failure) throw failure;
  const total = Object.values(seconds).reduce((sum, part) => sum + part, 0);
  const result = {
    ...{ files: [output, ...files.values()], width, height, seed: call.seed },
    axes: axes.filter(({ name }) => name).map(({ flag, name, values }) => ({ flag, name, values })),
    ...{ model: call.options.model, dtype, device: device.name, seconds },
    peak_bytes: device.memory.peak,
    peak_process_bytes: process.resourceUsage().maxRSS * 1024,
  };
  if (json) terminal.out(`${JSON.stringify(result)}\n`);
  else if (!quiet) terminal.err(`${output} in ${total.toFixed(1)} s\n`);
  if (spoilt.length > 0)
    throw new UserError(
      `${spoilt.length} of ${cells.length} cells show nothing, as the model gave values that are not finite: lower --guidance-scale, or use --dtype float32`,
    );
}

/** Draws until all cells are in `drawn`, or a signal or a mistake ends it, which is given. */
async function drawHeeding(
  cells: readonly Cell[],
  drawn: Cell[],
  { timed, quiet, terminal }: Pick<Hand, 'timed'> & { quiet: boolean; terminal: Terminal },
  add: Hand['add'],
): Promise<unknown> {
  const bar = progressBar(terminal, 'steps', quiet);
  const work = (some: readonly Cell[]) => some.reduce((sum, cell) => sum + workOf(cell), 0);
  const all = work(cells);
  const warn = (line: string) => {
    bar.end();
    terminal.err(`warning: ${line}\n`);
  };
  const stop: { by?: NodeJS.Signals } = {};
  const hand: Hand = {
    ...{ warn, timed, tell: onceOf(warn) },
    step(done) {
      if (stop.by) throw new Stopped(stop.by);
      const note = `cell ${drawn.length + 1} of ${cells.length}`;
      bar.update(Math.round(work(drawn) + done), all, note);
    },
    async add(cell, ...made) {
      await add(cell, ...made);
      drawn.push(cell);
    },
  };
  const ask = (signal: NodeJS.Signals) => void (stop.by = signal);
  try {
    await heedingSignals(ask, () => drawAll(cells, hand));
    return undefined;
  } catch (error) {
    return error;
  } finally {
    bar.end();
  }
}

/** The first cell's settings, for --from; and as A1111 tells it, what the axes are. */
function gridText(call: SampleCall, axes: Axes): Record<string, string> {
  const { parameters, ...text } = textOf(call, 0);
  const told = axes.map((axis) => {
    const letter = axis.flag.slice(2).toUpperCase();
    const { name } = axis;
    return name && `, ${letter} Type: ${name}, ${letter} Values: ${JSON.stringify(typedAs(axis))}`;
  });
  return { parameters: `${parameters}, Script: X/Y/Z plot${told.join('')}`, ...text };
}
