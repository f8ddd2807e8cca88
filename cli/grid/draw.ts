// The drawing of a grid's cells: a model is opened for all cells that it draws, with all their prompts encoded ahead, and a cell that has other
// LoRAs than the last has them put into it.
import { MemoryError } from '../../engine/memory.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, type Pipeline } from '../../models/pipeline.ts';
import type { Request } from '../../models/request.ts';
import type { DecodedPicture, Latents } from '../../models/vae/latents.ts';
import { drawCall, type Studio } from '../sample/draw.ts';
import { type onceOf, openFor, type Wanted } from '../sample/models.ts';
import { refinerRequest } from '../sample/request.ts';
import { openUpscalers } from '../sample/upscale_options.ts';
import { type Cell, groupsOf } from './cells.ts';

/** The steps of all passes of a cell, of each as many as were asked for. */
const passSteps = ({ call }: Cell): number => call.requests[0].num_inference_steps;
export const workOf = (cell: Cell): number =>
  passSteps(cell) *
  (1 + Number(cell.call.larger !== undefined) + Number(cell.sources.refinerSource !== undefined));

/** What the drawing of cells tells of, and where it leaves them. */
export interface Hand extends Pick<Studio, 'warn' | 'timed'> {
  tell: ReturnType<typeof onceOf>;
  /** So many steps of a cell are done. May leave by throwing. */
  step(done: number): void;
  add(cell: Cell, picture: DecodedPicture, text: Record<string, string>): Promise<void>;
}

/** Draws what one opened model draws together, and the next. @throws what `step` throws, too */
export async function drawAll(cells: readonly Cell[], hand: Hand): Promise<void> {
  const left = groupsOf(cells);
  for (let group = left.shift(); group; group = left.shift()) {
    const undone = await drawGroup(group, hand);
    left.unshift(...undone.map((cell) => [cell]));
  }
}

/** Opens the model of a group and draws. Gives the cells that have to be drawn alone: there is no memory to decode beside the UNet. */
async function drawGroup(group: readonly Cell[], hand: Hand): Promise<readonly Cell[]> {
  const [{ options, sources }] = group;
  const { device, dtype, vaeSource, source, refinerSource, under } = sources;
  const place = { options, device, dtype, vaeSource, tell: hand.tell, timed: hand.timed };
  const base = await openFor(
    source,
    group.map(({ call }) => call),
    place,
    under,
  );
  let refiner: Pipeline | undefined;
  const openRefiner = async (from: ModelSource, isLast: boolean) => {
    if (isLast) base.release();
    refiner ??= await openFor(from, group.map(refined), place);
    return refiner;
  };
  try {
    for (const [i, cell] of group.entries()) {
      const isLast = i === group.length - 1;
      try {
        await drawCell(cell, isLast, base, refinerSource && (() => openRefiner(refinerSource, isLast)), hand);
      } catch (error) {
        if (!(error instanceof MemoryError) || group.length === 1) throw error;
        hand.warn('there is no memory to decode beside the UNet, so the model is loaded for each cell');
        return group.slice(i).map((each) => ({ ...each, call: each.again() }));
      }
    }
    return [];
  } finally {
    base.release();
    refiner?.release();
  }
}

/** What a refiner is told of a cell. */
const refined = ({ options, call }: Cell): Wanted => ({
  options,
  requests: call.requests.map((each) =>
    refinerRequest(options, each, { shape: [], data: new Float32Array() }),
  ),
});

/** Draws a cell; after the last one of a group its model may go. */
async function drawCell(
  cell: Cell,
  isLast: boolean,
  base: Pipeline,
  refiner: Studio['refiner'],
  { warn, timed, tell, step: stepped, add }: Hand,
): Promise<void> {
  const { call, options, sources } = cell;
  const upscalers = await timed('load', () => openUpscalers(sources.upscalers, options, sources.device));
  let before = 0;
  const run = async (pipeline: Pipeline, request: Request): Promise<Latents> => {
    const asked = { ...request, last: request.last && isLast };
    const { latents } = await denoiseToEnd(pipeline, asked, ({ step, steps, truncated }) => {
      tell(truncated);
      stepped(before + (passSteps(cell) * step) / steps);
    });
    before += passSteps(cell);
    return latents;
  };
  try {
    await drawCall(call, {
      ...{ base, refiner, upscalers, warn, timed },
      stage: () => run,
      onTile: () => stepped(before),
      add: ([picture], _, text) => add(cell, picture, text),
    });
  } finally {
    upscalers.release();
  }
}
