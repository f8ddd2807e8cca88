// The transformer that the UNet runs over an image's pixels (Transformer2DModel of diffusers): self-attention, attention over
// the prompt and a feed-forward layer in each of its blocks. The prompt's keys and values are the same at every step, and are
// computed once an image when the conditioning carries a ContextCache; training passes none. IP-Adapters have keys and values of
// their own for each attention over the prompt, whose result is added to the prompt's (Ye et al. 2023).
import type { checkpointed } from '../../engine/checkpointing.ts';
import { groupNorm, type Linear, layerNorm, linear } from '../../engine/layers.ts';
import { type Module, module } from '../../engine/module.ts';
import { attention as attentionOp } from '../../engine/ops/attention.ts';
import { add, mul } from '../../engine/ops/binary.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import { scaled } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { type ContextCache, once } from './context_cache.ts';
import type { FreeU } from './freeu.ts';

/**
 * A picture as keys and values [n, tokens, width] for the UNet's attentions over the prompt, or some of them, and perhaps what their result
 * is multiplied by, [n, l, width]; a ControlNet's have none.
 */
export type ImageTokens = ReadonlyMap<Attention['children'], readonly [k: Tensor, v: Tensor, mask?: Tensor]>;

/** What a ControlNet-LLLite adds to what a projection reads: `scale` times what its layer makes of that beside what it has seen. */
export interface Steer {
  layer: Module<[x: Tensor, seen: Tensor], Tensor>;
  /** [n, l, c], or of one picture for all rows [1, l, c]. */
  seen: Tensor;
  scale: number;
}

/** By the projections of the UNet's attentions; a ControlNet's have none. */
export type Steering = ReadonlyMap<Linear, readonly Steer[]>;

export interface Conditioning {
  /** encoder_hidden_states [n, tokens, cross_attention_dim] in the model's type. */
  context: Tensor;
  /** The pooled prompt [n, projection_dim] in the model's type. */
  textEmbeds: Tensor;
  /** float32 [n, 6]: original height, width, crop top, left, target height, width; refiner [n, 5]: aesthetic score last. */
  timeIds: Tensor;
  /** float32 [n]: w, which is guidance_scale - 1, for UNets that have `time_cond_proj_dim`; others do not hear it. */
  guidance?: Tensor;
  /** What is attended to beside the prompt. */
  images?: readonly ImageTokens[];
  /** What is added to what attentions read. */
  steering?: Steering;
  /** Self-attentions that are the identity for the last `rows` of the pass; a ControlNet's are not among them. */
  perturbed?: { layers: ReadonlySet<Attention['children']>; rows: number };
  /** What the way up makes of its skip connections; a ControlNet has none. */
  freeu?: FreeU;
  cache?: ContextCache;
}

/** What becomes of a transformer block: itself, or itself with gradient checkpointing. */
export type Wrap = typeof checkpointed;

const attentionChildren = (c: number, contextWidth: number) => ({
  to_q: linear(c, c, { bias: false }),
  to_k: linear(contextWidth, c, { bias: false }),
  to_v: linear(contextWidth, c, { bias: false }),
  to_out: [linear(c, c)],
});

/** x [n, l, c] as a projection reads it. */
function steered(to: Linear, x: Tensor, { steering, cache }: Conditioning): Tensor {
  const [n] = x.shape;
  const rowsOf = ({ seen }: Steer): Tensor =>
    seen.shape[0] === n
      ? seen
      : once(cache, seen, () => [broadcast(seen, 0, n).reshape(n, ...seen.shape.slice(1))])[0];
  const more = (steering?.get(to) ?? []).map((each) => scaled(each.layer(x, rowsOf(each)), each.scale));
  return more.reduce(add, x);
}

/** residual + attention of x [n, l, c] over itself; in rows that are perturbed each pixel attends to itself alone. */
const selfAttention = (c: number, heads: number): Attention =>
  module(attentionChildren(c, c), (m, x, conditioning, residual) => {
    const { perturbed } = conditioning;
    const [ofQ, ofK, ofV] = [m.to_q, m.to_k, m.to_v].map((to) => steered(to, x, conditioning));
    const [q, k, v] = x.device.together(() => [m.to_q(ofQ), m.to_k(ofK), m.to_v(ofV)]);
    if (!perturbed?.layers.has(m)) return m.to_out[0](attentionOp(q, k, v, { heads }), { residual });
    const others = x.shape[0] - perturbed.rows;
    const [q0, k0, v0] = [q, k, v].map((t) => slice(t, 0, 0, others));
    const h = concat([attentionOp(q0, k0, v0, { heads }), slice(v, 0, others, perturbed.rows)], 0);
    return m.to_out[0](h, { residual });
  });

type AttentionChildren = ReturnType<typeof attentionChildren>;
export type Attention = Module<
  [x: Tensor, conditioning: Conditioning, residual: Tensor],
  Tensor,
  AttentionChildren
>;

/** residual + attention of x [n, l, c] over the prompt, and over each picture apart. */
const crossAttention = (c: number, contextWidth: number, heads: number): Attention =>
  module(attentionChildren(c, contextWidth), (m, x, conditioning, residual) => {
    const { context, images = [], cache } = conditioning;
    const [k, v] = once(cache, m, () => x.device.together(() => [m.to_k(context), m.to_v(context)]));
    const q = m.to_q(steered(m.to_q, x, conditioning));
    let h = attentionOp(q, k, v, { heads });
    for (const image of images) {
      const own = image.get(m);
      if (!own) continue;
      const [keys, values, mask] = own;
      const found = attentionOp(q, keys, values, { heads });
      h = add(h, mask ? mul(found, mask) : found);
    }
    return m.to_out[0](h, { residual });
  });

/** residual + W2 GEGLU(W1 x) (Shazeer 2020). The keys are net.0.proj and net.2; net.1 was dropout. */
const feedForward = (c: number) => {
  const geglu = module({ proj: linear(c, 8 * c) }, (m, x: Tensor) => m.proj(x, { activation: 'geglu' }));
  return module({ net: [geglu, undefined, linear(4 * c, c)] as const }, (m, x: Tensor, residual: Tensor) =>
    m.net[2](m.net[0](x), { residual }),
  );
};

export const transformerBlock = (c: number, contextWidth: number, heads: number) =>
  module(
    {
      norm1: layerNorm(c),
      attn1: selfAttention(c, heads),
      norm2: layerNorm(c),
      attn2: crossAttention(c, contextWidth, heads),
      norm3: layerNorm(c),
      ff: feedForward(c),
    },
    (m, x: Tensor, conditioning: Conditioning) => {
      let h = m.attn1(m.norm1(x), conditioning, x);
      h = m.attn2(m.norm2(h), conditioning, h);
      return m.ff(m.norm3(h), h);
    },
  );

export interface Level {
  width: number;
  heads: number;
  /** Transformer blocks after each resnet; 0 for none. */
  depth: number;
}

/** Transformer2DModel: channels last makes an image a token sequence without a transpose. */
export const transformer = (
  { width: c, heads, depth }: Level,
  contextWidth: number,
  groups: number,
  wrap: Wrap = (block) => block,
) =>
  module(
    {
      norm: groupNorm(groups, c, { eps: 1e-6 }),
      proj_in: linear(c, c),
      transformer_blocks: Array.from({ length: depth }, () => wrap(transformerBlock(c, contextWidth, heads))),
      proj_out: linear(c, c),
    },
    (m, x: Tensor, conditioning: Conditioning) => {
      const [n, height, width] = x.shape;
      let h = m.proj_in(m.norm(x).reshape(n, height * width, c));
      for (const block of m.transformer_blocks) h = block(h, conditioning);
      return m.proj_out(h, { residual: x.reshape(n, height * width, c) }).reshape(n, height, width, c);
    },
  );

export type Transformer = ReturnType<typeof transformer>;
