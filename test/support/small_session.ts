// A session of training without files: a model of one weight or several, whose loss is the mean square of x w - x, w a matrix or
// the sum of matrices.
import type { Device } from '../../engine/device.ts';
import { requireGrad } from '../../engine/grad.ts';
import { module, namedParameters, parameter, unload } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { linear } from '../../engine/ops/linear.ts';
import { mse } from '../../engine/ops/loss.ts';
import { unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { MicroBatch, Turn } from '../../train/data/order.ts';
import { createOptimizer, type OptimizerSettings } from '../../train/optimizers/create.ts';
import { openReplicas } from '../../train/passes/replicas.ts';
import {
  component,
  copied,
  type Substitute,
  type Task,
  trainedParameters,
  twin,
} from '../../train/passes/task.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { Run } from '../../train/run/run.ts';
import type { Session } from '../../train/session.ts';
import { makeUpdate, openFeed } from '../../train/update.ts';

const SIDE = 8;

const runWith = (name: OptimizerSettings['name']): Run =>
  resolveRun({ optimizer: { name, lr: 0.1, max_grad_norm: 0 } }, 'test', 'test');
/** An update of the first epoch. */
export const turn = (...update: MicroBatch[]): Turn => ({ update, epoch: 0 });
export const pass = (...samples: number[]): MicroBatch => ({ bucket: 0, samples });

/** A weight of the name `unread` has no part in it. */
const model = (names: readonly string[]) =>
  module(
    Object.fromEntries(names.map((name) => [name, parameter([SIDE, SIDE])])),
    ({ weight, unread: _, ...others }, x: Tensor) =>
      Object.values(others).reduce(
        (y, { tensor }) => linear(x, tensor, undefined, { residual: y }),
        linear(x, weight.tensor),
      ),
  );

/** Lets a device record nothing; gives back what undoes that. */
function withoutCapture({ driver }: Device): () => void {
  const { capture } = driver;
  Object.assign(driver, { capture: undefined });
  return () => void Object.assign(driver, { capture });
}

interface Options {
  records?: boolean;
  names?: readonly string[];
  optimizer?: OptimizerSettings['name'];
}

/** Sample i has i in all places of x; weights are 0, then 0.01, ...; `events` are what is done. Passes are recorded where wished. */
export function open(
  [device, ...further]: readonly Device[],
  { records = false, names = ['weight'], optimizer: rule = 'adamw' }: Options = {},
) {
  const events: string[] = [];
  const undo = records ? [] : [device, ...further].map(withoutCapture);
  const net = model(names);
  const weights = Object.values(net.children);
  for (const [i, weight] of weights.entries()) {
    const values = new Float32Array(SIDE * SIDE).fill(i / 100);
    weight.tensor = requireGrad(unscoped(() => tensor(values, [SIDE, SIDE], { device })));
  }
  const part = component('net', {}, net);
  const lossOf = (used: typeof net, x: Tensor) => {
    events.push('queue');
    return mse(used(x), x);
  };
  const task = {
    async prepare({ samples }: MicroBatch) {
      events.push(`prepare ${samples}`);
      if (samples[0] < 0) throw new Error('no such picture');
      const values = Float32Array.from(
        { length: samples.length * SIDE },
        (_, i) => samples[Math.floor(i / SIDE)],
      );
      return { x: { shape: [samples.length, SIDE], values, dtype: 'float32' } };
    },
    loss: ({ x }: Tensors) => lossOf(net, x),
    replicate(other: Device) {
      const copy = model(names);
      const substitute: Substitute = copied(other);
      return {
        weights: new Map(twin(part, namedParameters(copy), substitute)),
        loss: ({ x }: Tensors) => lossOf(copy, x),
        release: () => unload(copy),
      };
    },
    components: [part],
  } as unknown as Task;
  const passes = openReplicas(task, trainedParameters([part]), device, further);
  const { parameters } = passes;
  const run = runWith(rule);
  const optimizer = createOptimizer(parameters, run.optimizer, 0);
  const session = { run, task, device, parameters, passes, optimizer } as unknown as Session;
  const release = () => {
    passes.release();
    optimizer.release();
    unload(net);
    for (const each of undo) each();
  };
  return { session, weights, events, release };
}

/** The weights after each of these updates. */
export async function trained(
  { session, weights }: ReturnType<typeof open>,
  updates: readonly MicroBatch[][],
  between?: (k: number) => void,
): Promise<string[]> {
  const feed = openFeed(session.task);
  const after: string[] = [];
  for (const [k, update] of updates.entries()) {
    const next = updates[k + 1] && turn(...updates[k + 1]);
    await makeUpdate(session, feed, turn(...update), { lr: 0.1, next });
    after.push(Buffer.concat(weights.map(({ tensor }) => tensor.bytes())).toString('hex'));
    between?.(k);
  }
  return after;
}
