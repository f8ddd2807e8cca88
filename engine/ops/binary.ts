// Elementwise sum, difference, product and quotient of two tensors of one shape. Where b has axes of size 1 (or fewer
// axes) it is expanded first by `broadcast`, whose gradient is a sum: no kernel deals with strides.
import { apply, defineOp, type OpRecord, type RefTensors, sameFloat } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';
import { broadcast } from './reduce.ts';
import { awkwardShapes } from './samples.ts';

type None = Record<string, never>;

interface Binary {
  f(a: number, b: number): number;
  da(a: number, b: number): number;
  db(a: number, b: number): number;
  /** Whether the gradients depend on a and b, and so have a kernel of their own rather than a multiple of dy. */
  linear: { da: number; db: number } | undefined;
}

function binary(name: string, { f, da, db, linear }: Binary): (a: Tensor, b: Tensor) => Tensor {
  const record: OpRecord<None> = defineOp<None>({
    name,
    outputs(t) {
      if (t.a.shape.join() !== t.b.shape.join())
        throw new ShapeError(`${name}: [${t.a.shape}] and [${t.b.shape}] differ`);
      return { y: { shape: t.a.shape, dtype: sameFloat(name, t, 'a', 'b') } };
    },
    saves: linear ? [] : ['a', 'b'],
    passes: (['a', 'b'] as const).filter((name) => linear?.[`d${name}`] === 1),
    forward: (t, _, launch) => launch(`${name}_forward`, [t.y, t.a, t.b, t.a.size]),
    backward(t, _, launch) {
      if (!linear) return launch(`${name}_backward`, [t.da, t.db, t.dy, t.a, t.b, t.dy.size]);
      if (t.da) launch('scale_forward', [t.da, t.dy, t.dy.size, linear.da, 0]);
      if (t.db) launch('scale_forward', [t.db, t.dy, t.dy.size, linear.db, 0]);
    },
    reference: {
      forward: ({ y, a, b }) => {
        for (let i = 0; i < a.data.length; i++) y.data[i] = f(a.data[i], b.data[i]);
      },
      backward(t: RefTensors) {
        const at = (i: number): [number, number] => (linear ? [0, 0] : [t.a.data[i], t.b.data[i]]);
        for (let i = 0; i < t.dy.data.length; i++) {
          if (t.da) t.da.data[i] = t.dy.data[i] * da(...at(i));
          if (t.db) t.db.data[i] = t.dy.data[i] * db(...at(i));
        }
      },
    },
    samples: [[1], [19], [2, 3, 5, 7], [4099], ...awkwardShapes].map((s) => ({
      inputs: { a: s, b: s },
      attrs: {},
    })),
  });
  return (a, b) => apply(record, { a, b: expand(b, a.shape) }, {});
}

/** b repeated along every axis where it has size 1 (missing leading axes count as 1) to reach `shape`. */
function expand(b: Tensor, shape: readonly number[]): Tensor {
  if (b.shape.join() === shape.join()) return b;
  const from = [...Array<number>(Math.max(0, shape.length - b.shape.length)).fill(1), ...b.shape];
  let out = b.reshape(...from);
  shape.forEach((d, axis) => {
    if (from[axis] === 1 && d !== 1)
      out = broadcast(out.reshape(...out.shape.filter((_, i) => i !== axis)), axis, d);
  });
  return out;
}

export const add = binary('add', { f: (a, b) => a + b, da: () => 1, db: () => 1, linear: { da: 1, db: 1 } });
export const sub = binary('sub', {
  f: (a, b) => a - b,
  da: () => 1,
  db: () => -1,
  linear: { da: 1, db: -1 },
});
export const mul = binary('mul', { f: (a, b) => a * b, da: (_, b) => b, db: (a) => a, linear: undefined });
export const div = binary('div', {
  f: (a, b) => a / b,
  da: (_, b) => 1 / b,
  db: (a, b) => -a / (b * b),
  linear: undefined,
});
