// softmax(scale q k^T) v per head, on [n, l, heads * d] as the projections leave it: no transposes, and the scores are
// never stored (FlashAttention, Dao 2022). Backward computes them again from the saved log-sum-exp.
import { apply, defineOp, type RefTensors, sameFloat, type Tensors } from '../op.ts';
import { empty, ShapeError, type Tensor } from '../tensor.ts';
import { addScaled, dotAt } from './runs.ts';
import { awkwardSizes } from './samples.ts';

interface AttentionAttrs {
  heads: number;
  causal: boolean;
  scale: number;
}

function dims(q: readonly number[], k: readonly number[], { heads }: AttentionAttrs) {
  return { n: q[0], heads, lq: q[1], lk: k[1], d: q[2] / heads };
}

const integers = ({ q, k }: Tensors, attrs: AttentionAttrs) => [
  ...Object.values(dims(q.shape, k.shape, attrs)),
  Number(attrs.causal),
];

const attentionOp = defineOp<AttentionAttrs>({
  name: 'attention',
  outputs(t, attrs) {
    const { q, k, v } = t;
    if (
      q.shape.length !== 3 ||
      k.shape.join() !== v.shape.join() ||
      q.shape[0] !== k.shape[0] ||
      q.shape[2] !== k.shape[2]
    ) {
      throw new ShapeError(`attention: q [${q.shape}], k [${k.shape}] and v [${v.shape}] do not fit`);
    }
    if (q.shape[2] % attrs.heads)
      throw new ShapeError(`attention: ${q.shape[2]} channels do not divide into ${attrs.heads} heads`);
    const dtype = sameFloat('attention', t, 'q', 'k', 'v');
    return {
      y: { shape: q.shape, dtype },
      lse: { shape: [q.shape[0], attrs.heads, q.shape[1]], dtype: 'float32' },
    };
  },
  saves: ['q', 'k', 'v', 'y', 'lse'],
  flops: ({ q, k }, { causal }) => (4 * q.size * k.shape[1]) / (causal ? 2 : 1),
  forward: (t, attrs, launch) =>
    launch('attention_forward', [t.y, t.lse, t.q, t.k, t.v, ...integers(t, attrs), attrs.scale]),
  backward(t, attrs, launch) {
    // The kernel computes all three together; what nobody wants goes to scratch in its place.
    const spare = (name: 'q' | 'k' | 'v') => t[`d${name}`] ?? empty(t[name].shape, t[name]);
    const gradients = [spare('q'), spare('k'), spare('v')];
    launch('attention_backward', [
      ...gradients,
      t.dy,
      t.y,
      t.lse,
      t.q,
      t.k,
      t.v,
      ...integers(t, attrs),
      attrs.scale,
    ]);
  },
  reference: {
    forward(t, attrs) {
      t.y.data.fill(0);
      eachRow(t, attrs, ({ row, p, iq, keyAt, lse, d }) => {
        t.lse.data[row] = lse;
        for (let j = 0; j < p.length; j++) addScaled(t.y.data, iq, p[j], t.v.data, keyAt(j), d);
      });
    },
    backward(t, attrs) {
      const { dq, dk, dv, dy, y, q, k, v } = t;
      for (const gradient of [dq, dk, dv]) gradient?.data.fill(0);
      eachRow(t, attrs, ({ p, iq, keyAt, d }) => {
        // The mean of dp under p, which is what dy has of y.
        const mean = dotAt(dy.data, iq, y.data, iq, d);
        for (let j = 0; j < p.length; j++) {
          const key = keyAt(j);
          const dp = dotAt(dy.data, iq, v.data, key, d);
          const ds = p[j] * (dp - mean) * attrs.scale;
          if (dq) addScaled(dq.data, iq, ds, k.data, key, d);
          if (dk) addScaled(dk.data, key, ds, q.data, iq, d);
          if (dv) addScaled(dv.data, key, p[j], dy.data, iq, d);
        }
      });
    },
  },
  samples: [
    sample([1, 1, 1, 8], 1),
    sample([2, 5, 7, 24], 3),
    sample([1, 17, 77, 16], 1),
    sample([1, 33, 33, 64], 1),
    sample([2, 9, 9, 32], 2, true),
    sample([1, 20, 13, 96], 2),
    sample([1, 33, 17, 512], 1),
    // Heads of 64 with more keys than the text has.
    sample([1, 70, 130, 64], 1),
    sample([2, 5, 81, 128], 2),
    sample([1, 65, 90, 64], 1, true),
    sample([1, 66, 130, 256], 4),
    ...awkwardSizes.map(([lq, lk], i) => {
      const [heads, d] = [1 + (i % 2), [64, 8, 40, 24, 80, 17, 128][i % 7]];
      return sample([1 + (i % 3 > 1 ? 1 : 0), lq, lk, heads * d], heads, i % 5 === 4);
    }),
  ],
});

function sample([n, lq, lk, c]: readonly number[], heads: number, causal = false) {
  const inputs = { q: [n, lq, c], k: [n, lk, c], v: [n, lk, c] };
  return { inputs, attrs: { heads, causal, scale: (c / heads) ** -0.5 } };
}

interface Row {
  /** Index into lse; start of this query's head in q and y; the probabilities; where key j's head starts. */
  row: number;
  iq: number;
  p: Float64Array;
  keyAt: (j: number) => number;
  lse: number;
  d: number;
}

function eachRow(t: RefTensors, attrs: AttentionAttrs, visit: (row: Row) => void): void {
  const { n, heads, lq, lk, d } = dims(t.q.shape, t.k.shape, attrs);
  const c = heads * d;
  for (let image = 0; image < n; image++)
    for (let head = 0; head < heads; head++)
      for (let i = 0; i < lq; i++) {
        const iq = (image * lq + i) * c + head * d;
        const keyAt = (j: number) => (image * lk + j) * c + head * d;
        const seen = attrs.causal ? Math.min(i + 1, lk) : lk;
        const scores = new Float64Array(seen);
        for (let j = 0; j < seen; j++) scores[j] = attrs.scale * dotAt(t.q.data, iq, t.k.data, keyAt(j), d);
        const max = scores.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
        const lse = max + Math.log(scores.reduce((total, s) => total + Math.exp(s - max), 0));
        visit({
          row: (image * heads + head) * lq + i,
          iq,
          p: scores.map((s) => Math.exp(s - lse)),
          keyAt,
          lse,
          d,
        });
      }
}

/** q [n, lq, heads*d], k and v [n, lk, heads*d] → [n, lq, heads*d]. `causal`: query i sees keys up to i. Scale d^-½. */
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  { heads, causal = false }: { heads: number; causal?: boolean },
): Tensor {
  return apply(attentionOp, { q, k, v }, { heads, causal, scale: (q.shape[2] / heads) ** -0.5 });
}
