// What to set for a run to fit into a GPU's memory: settings that save some are tried one after the other on stand-ins, those first that
// change nothing of what is learnt, until the plan is small enough; then those go that were not needed.
import type { Device } from '../engine/device.ts';
import { standInFor } from '../engine/profile.ts';
import { gib } from '../io/byte_sizes.ts';
import { UserError } from '../io/errors.ts';
import type { Materials } from './materials.ts';
import { requirePasses } from './passes/replicas.ts';
import type { Plan } from './plan.ts';
import { estimate } from './rehearsal.ts';
import { resolveRun } from './run/resolve_run.ts';
import type { Run } from './run/run.ts';

export interface Fit {
  /** As --set takes them; empty where the run fits as it is. */
  set: readonly string[];
  /** What it then takes, on the GPU that takes the most. */
  bytes: number;
  fits: boolean;
}

/** What the driver keeps of a GPU for itself: the context, the kernels' code and what its own pool wastes. */
export const DRIVERS_SHARE = 0.75 * 2 ** 30;

/** What saves memory, a step at a time. */
function savings({ batch_size, gradient_accumulation_steps: passes, previews }: Run): string[][] {
  const halves: string[][] = [];
  for (let batch = batch_size / 2, times = 2; Number.isInteger(batch); batch /= 2, times *= 2)
    halves.push([`batch_size=${batch}`, `gradient_accumulation_steps=${passes * times}`]);
  return [
    // The same updates, for more work.
    ['train.gradient_checkpointing=true'],
    ['train.fused_backward_pass=true'],
    // The same draws.
    ...halves,
    ['previews.prompts=[]', ...(previews.validation_image.length ? ['previews.validation_image=[]'] : [])],
    // Less exact.
    ['dtype=bfloat16'],
    ['train.q8=true'],
    ['optimizer.stochastic_rounding=true'],
    ['optimizer.moments_dtype=bfloat16'],
    // Another way to learn.
    ['optimizer.name=adamw8bit', 'optimizer.moments_dtype=float32'],
    ['optimizer.name=adafactor', 'optimizer.moments_dtype=float32'],
    ...(batch_size * passes > 1 ? [['batch_size=1', 'gradient_accumulation_steps=1']] : []),
  ];
}

/**
 * The settings by which a run, of which its plan is told, takes no more than `room` of each device; or the least of them all that can
 * be had.
 */
export function fitInto(
  materials: Materials,
  devices: readonly Device[],
  { memory_bytes }: Pick<Plan, 'memory_bytes'>,
  room: number,
): Fit {
  const taken = (set: readonly string[]): number => {
    try {
      const run = resolveRun(materials.run, 'the run', materials.run.name, set);
      requirePasses(run, devices.length);
      return Math.max(...estimate({ ...materials, run }, devices.map(standInFor)).bytes);
    } catch (error) {
      // What does not go together, would not fit this model, or leaves a GPU without a pass, is no way.
      if (error instanceof UserError) return Number.POSITIVE_INFINITY;
      throw error;
    }
  };
  let steps: string[][] = [];
  let bytes = Math.max(...memory_bytes);
  for (const step of savings(materials.run)) {
    if (bytes <= room) break;
    const more = [...steps, step];
    const least = taken(more.flat());
    if (least < 0.99 * bytes) [steps, bytes] = [more, least];
  }
  for (const step of bytes <= room ? steps : []) {
    const fewer = steps.filter((other) => other !== step);
    const most = taken(fewer.flat());
    if (most <= room) [steps, bytes] = [fewer, most];
  }
  return { set: changes(materials.run, steps.flat()), bytes, fits: bytes <= room };
}

/** What of these is otherwise in the run; of several settings of a key the last counts. */
function changes(run: Run, set: readonly string[]): string[] {
  const last = new Map(set.map((each) => [each.slice(0, each.indexOf('=')), each]));
  const own = (key: string): unknown =>
    key.split('.').reduce<unknown>((value, name) => (value as Record<string, unknown>)[name], run);
  return [...last].flatMap(([key, each]) => (`${key}=${own(key)}` === each ? [] : [each]));
}

/** The same in words. */
export function tellFit({ set, bytes, fits }: Fit): string {
  if (set.length === 0)
    return fits ? 'it fits' : 'it does not fit, and nothing that could be set makes it smaller';
  const flags = set.map((each) => `--set ${each}`).join(' ');
  return fits
    ? `it fits with ${flags}: ${gib(bytes)}`
    : `it does not fit; the least it takes is ${gib(bytes)}, with ${flags}`;
}
