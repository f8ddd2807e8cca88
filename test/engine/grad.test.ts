// The tape: gradients that are dy itself share its storage on the way, and are each leaf's own at the end.
import { test } from 'tap';
import { checkpointed } from '../../engine/checkpointing.ts';
import { openDevice } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { module, parameter } from '../../engine/module.ts';
import { add, mul, sub } from '../../engine/ops/binary.ts';
import { linear } from '../../engine/ops/linear.ts';
import { scale } from '../../engine/ops/unary.ts';
import { built, keep, scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';

const device = openDevice('reference');
const leaf = (...values: number[]): Tensor => requireGrad(tensor(values, [values.length], { device }));
const gradient = (t: Tensor): number[] => {
  const found = [...(gradOf(t) as Tensor).floats()];
  clearGrad(t);
  return found;
};

/** Runs backward from `make()` with this dy and gives the leaves' gradients. */
function gradients(leaves: readonly Tensor[], make: () => Tensor, dy: readonly number[]): number[][] {
  return scope(() => {
    backward(make(), tensor(dy, [dy.length], { device }));
    return leaves.map(gradient);
  });
}

test('a sum passes dy on, and each leaf has a gradient of its own', (t) => {
  scope(() => {
    const [a, b] = [leaf(1, 2), leaf(3, 4)];
    scope(() => {
      const dy = tensor([5, 7], [2], { device });
      backward(add(a, b), dy);
      const [da, db] = [a, b].map((x) => gradOf(x) as Tensor);
      da.set([0, 0]);
      t.same([...db.floats()], [5, 7], "what is done to one leaf's gradient is not done to the other's");
      t.same([...dy.floats()], [5, 7], "nor to the caller's dy");
      backward(add(a, b), dy);
      t.same([...(gradOf(a) as Tensor).floats()], [5, 7], 'a second walk adds');
      t.same([...(gradOf(b) as Tensor).floats()], [10, 14]);
      t.same([...dy.floats()], [5, 7]);
    });
    for (const x of [a, b]) clearGrad(x);
  });
  t.end();
});

test('dy that several take is not summed in place', (t) => {
  scope(() => {
    const [a, b] = [leaf(1, 2), leaf(3, 4)];
    // d/da of (a + b) + a * b + (a - b), and the like: each of the sums hands the same dy to two.
    const sums = () => add(add(add(a, b), mul(a, b)), sub(a, b));
    t.same(gradients([a, b], sums, [1, 10]), [
      [1 + 3 + 1, 10 * (1 + 4 + 1)],
      [1 + 1 - 1, 10 * (1 + 2 - 1)],
    ]);
    t.same(
      gradients([a], () => add(a, a), [3, 5]),
      [[6, 10]],
      'twice to one',
    );
    // A residual stream: h = h + 2 h, three times.
    const stream = () => [1, 2, 3].reduce((h) => add(h, scale(h, 2)), scale(a, 1));
    t.same(gradients([a], stream, [1, 2]), [[27, 54]]);
  });
  t.end();
});

test("a layer's residual has dy for its gradient, also where nothing else wants one", (t) => {
  scope(() => {
    const [x, residual] = [leaf(1, 2), leaf(0, 0)];
    const weight = tensor([1, 2, 3, 4], [2, 2], { device });
    const y = () =>
      linear(x.reshape(1, 2), weight, undefined, { residual: residual.reshape(1, 2) }).reshape(2);
    t.same(gradients([x, residual], y, [1, 10]), [
      [31, 42],
      [1, 10],
    ]);
    const alone = () =>
      linear(tensor([1, 2], [1, 2], { device }), weight, undefined, { residual: residual.reshape(1, 2) });
    t.same(
      scope(() => {
        backward(alone(), tensor([1, 10], [1, 2], { device }));
        return gradient(residual);
      }),
      [1, 10],
    );
  });
  t.equal(device.memory.storages, 0, 'nothing is left behind');
  t.end();
});

test('asking again for a gradient that is wanted already changes nothing', (t) => {
  scope(() => {
    const a = leaf(1, 2);
    backward(add(a, a), tensor([1, 1], [2], { device }));
    t.same(gradient(requireGrad(a)), [2, 2]);
  });
  t.end();
});

test('a checkpointed module trains its weights, whether its input wants a gradient or not', (t) => {
  const weight = parameter([2]);
  const layer = checkpointed(module({ weight }, (own, x: Tensor) => mul(x, own.weight.tensor)));
  scope(() => {
    weight.tensor = leaf(3, 4);
    const [x, wanted] = [tensor([5, 6], [2], { device }), leaf(5, 6)];
    t.same(
      gradients([weight.tensor], () => layer(x), [1, 2]),
      [[5, 12]],
    );
    const both = [
      [5, 12],
      [3, 8],
    ];
    t.same(
      gradients([weight.tensor, wanted], () => layer(wanted), [1, 2]),
      both,
    );
    t.equal(device.memory.storages, 3, 'live tensors');
  });
  t.equal(device.memory.storages, 0);
  t.end();
});

test('an error frees what was made, kept and saved for the gradient', (t) => {
  const made = () => tensor([1, 2], [2], { device });
  const fails = (fn: () => unknown) => {
    t.throws(fn, /no more/);
    t.equal(device.memory.storages, 0);
  };
  const error = new Error('no more');
  const throws = (...before: unknown[]) => {
    throw before.length ? error : new Error('nothing was made before');
  };
  fails(() => built(() => throws(made())));
  fails(() => built(() => throws(scope(() => void keep(made())))));
  fails(() => built(() => throws(scope(made)))); // what a scope returns where none is around it
  fails(() => built(() => throws(built(made)))); // what it built belongs to whoever called it
  fails(() =>
    built(() => {
      t.throws(() => built(() => throws(made())), /no more/);
      throws(made()); // after one that failed
    }),
  );
  fails(() => scope(() => throws(scope(() => mul(leaf(1, 2), made())))));
  const whole = built(() => scope(() => keep(made())));
  t.equal(device.memory.storages, 1, 'where there is none it stays');
  whole.release();
  t.end();
});
