// One update: its passes through the model and back, the optimizer's step with clipped gradients, the moving average. Passes
// and norms are queued before any loss is read, and what the next pass needs is prepared meanwhile: noise and latents of a
// picture of 1024 x 1024 cost the host some 10 ms, in which the device would have nothing to do.
import { setImmediate } from 'node:timers/promises';
import type { Tensor } from '../engine/tensor.ts';
import type { MicroBatch, Turn, Update } from './data/order.ts';
import type { PassInputs } from './objective/pass_inputs.ts';
import { type GradientNorms, type Gradients, queueNorms } from './optimizers/clip.ts';
import { boundNorms } from './parts/max_norm.ts';
import { measure, moveThrough, type Walked } from './passes/fused.ts';
import { firstBadTensor } from './passes/nonfinite.ts';
import type { Task } from './passes/task.ts';
import type { Session } from './session.ts';

export interface Made {
  /** The mean over the update's samples; of one that is not finite, that of its first bad pass. */
  loss: number;
  grad_norm: number;
  /** The learning rate that the optimizer found, where it finds one. */
  dlr?: number;
  /** Why the weights were left as they were. */
  skipped?: string;
}

export interface UpdateOptions {
  lr: number;
  /** The update that follows, whose first pass is prepared meanwhile. */
  next?: Turn;
  /** Called before weights move: where an update fails after that, they are of no update, and not to be saved. */
  moving?(): void;
}

/** Inputs of passes, one of them made ahead. */
export interface Feed {
  /** Begins to prepare a pass, which is to be taken next. */
  begin(pass: MicroBatch, epoch: number): void;
  take(pass: MicroBatch, epoch: number): Promise<PassInputs>;
  /** What is still being prepared is left. */
  end(): void;
}

export function openFeed(task: Task): Feed {
  let ahead: { pass: MicroBatch; inputs: Promise<PassInputs> } | undefined;
  const leaving = new AbortController();
  const prepare = (pass: MicroBatch, epoch: number) => task.prepare(pass, epoch, leaving.signal);
  return {
    begin(pass, epoch) {
      const inputs = prepare(pass, epoch);
      inputs.catch(() => undefined); // told when it is taken
      ahead = { pass, inputs };
    },
    take(pass, epoch) {
      const inputs = ahead?.pass === pass ? ahead.inputs : prepare(pass, epoch);
      ahead = undefined;
      return inputs;
    },
    end: () => leaving.abort(),
  };
}

/**
 * Makes an update of one pass whose gradients are never all there (fused.ts). Where they are not clipped the pass is made once, and a
 * gradient that is not finite leaves the weights of its part and of those that follow.
 */
async function makeFused(
  session: Session,
  feed: Feed,
  { update: [pass], epoch }: Turn,
  { lr, next, moving }: UpdateOptions,
): Promise<Made> {
  const { run, optimizer, ema } = session;
  const inputs = await feed.take(pass, epoch);
  if (next) feed.begin(next.update[0], next.epoch);
  await setImmediate();
  const { max_grad_norm } = run.optimizer;
  const measured = max_grad_norm > 0 ? measure(session, inputs, max_grad_norm) : undefined;
  const failed = measured && (await whySkipped(session, pass, epoch, measured));
  if (failed) return failed;
  let begun: ReturnType<typeof optimizer.begin> | undefined;
  const move = (part: Gradients) => {
    moving?.();
    begun ??= optimizer.begin(lr, measured?.scale);
    begun.move(part);
  };
  const moved = moveThrough(session, inputs, move, !measured);
  if (begun) boundNorms(session);
  if (begun) ema?.step(begun.made);
  return (await whySkipped(session, pass, epoch, moved)) ?? { loss: moved.loss, grad_norm: moved.norm };
}

/**
 * Makes an update. A loss or gradient that is not finite leaves the weights. After an error the session can only be saved, if weights had
 * not begun to move, and released.
 */
export async function makeUpdate(
  session: Session,
  feed: Feed,
  turn: Turn,
  options: UpdateOptions,
): Promise<Made> {
  if (session.run.train.fused_backward_pass) return makeFused(session, feed, turn, options);
  const { update, epoch } = turn;
  const { next } = options;
  const { passes, parameters } = session;
  const shares = sharesOf(update);
  const losses: Tensor[] = [];
  let norms: GradientNorms | undefined;
  try {
    for (const [i, pass] of update.entries()) {
      losses.push(passes.queue(await feed.take(pass, epoch), shares[i]));
      if (i + 1 < update.length) feed.begin(update[i + 1], epoch);
      else {
        passes.gather();
        norms = queueNorms(parameters);
        if (next) feed.begin(next.update[0], next.epoch);
      }
      await setImmediate();
    }
    const made = await step(session, turn, { losses, norms: norms as GradientNorms }, options);
    passes.clear();
    return made;
  } finally {
    norms?.release();
    for (const loss of losses) loss.release();
  }
}

/** What part of an update's samples each pass has. */
function sharesOf(update: Update): number[] {
  const samples = update.reduce((sum, pass) => sum + pass.samples.length, 0);
  return update.map((pass) => pass.samples.length / samples);
}

/** What the passes of an update have queued: the loss of each, and the norms of the gradients of all. */
interface Queued {
  losses: readonly Tensor[];
  norms: GradientNorms;
}

/** Waits for losses and norms, and moves the weights if all are finite. */
async function step(
  session: Session,
  { update, epoch }: Turn,
  { losses, norms }: Queued,
  { lr, moving }: UpdateOptions,
): Promise<Made> {
  const { run, passes, optimizer, ema } = session;
  const values = losses.map((loss) => loss.floats()[0]);
  const shares = sharesOf(update);
  const bad = values.findIndex((value) => !Number.isFinite(value));
  const loss = bad < 0 ? values.reduce((sum, value, i) => sum + shares[i] * value, 0) : values[bad];
  const clipping = norms.read(run.optimizer.max_grad_norm);
  const failed = await whySkipped(session, update[Math.max(0, bad)], epoch, { loss, ...clipping });
  if (failed) return failed;
  moving?.();
  const { made, dlr } = optimizer.step(lr, clipping.scale);
  boundNorms(session);
  passes.broadcast();
  ema?.step(made);
  return { loss, grad_norm: clipping.norm, dlr };
}

/** What is told of an update that is not finite, of which `pass` is the first that is not. */
async function whySkipped(
  { task, device }: Session,
  pass: MicroBatch,
  epoch: number,
  { loss, norm, nonfinite }: Walked,
): Promise<Made | undefined> {
  if (!Number.isFinite(loss)) {
    const tensor = firstBadTensor(task, await task.prepare(pass, epoch), device);
    const skipped = `the loss is ${loss}; the first tensor that is not finite is ${tensor}`;
    return { loss, grad_norm: Number.NaN, skipped };
  }
  return nonfinite
    ? { loss, grad_norm: norm, skipped: `the gradient of ${nonfinite} is not finite` }
    : undefined;
}
