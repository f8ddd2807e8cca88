// From what the vision encoder says of a picture to tokens beside the prompt's (Ye et al. 2023): a projection of the picture's
// embedding, or in "plus" a Resampler (Alayrac et al. 2022), whose learnt latents attend over the encoder's states. Both are known by
// a file's shapes alone, as it has no config, and the trees spell its keys, which are not diffusers'.
import { layerNorm, linear } from '../../engine/layers.ts';
import { type Module, module, parameter } from '../../engine/module.ts';
import { attention } from '../../engine/ops/attention.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import type { Tensor } from '../../engine/tensor.ts';

export interface ProjectionConfig {
  /** How many tokens a picture becomes, and how wide each: the UNet's cross_attention_dim. */
  tokens: number;
  cross_attention_dim: number;
  /** Width of what is read: the encoder's projection_dim, or with a resampler its hidden_size. */
  inputs: number;
  /** Of "plus". */
  resampler?: { width: number; depth: number; inner: number; feedForward: number };
}

/** Of what the encoder gives, image_embeds [n, inputs] or hidden states [n, l, inputs], the tokens [n, tokens, c]. */
export type ImageProjection = Module<[x: Tensor], Tensor>;

export const imageProjection = (config: ProjectionConfig): ImageProjection =>
  config.resampler ? resampler(config, config.resampler) : projection(config);

const projection = ({ tokens, cross_attention_dim: c, inputs }: ProjectionConfig): ImageProjection =>
  module({ proj: linear(inputs, tokens * c), norm: layerNorm(c) }, (m, x: Tensor) =>
    m.norm(m.proj(x).reshape(x.shape[0], tokens, c)),
  );

/** Channels of a Resampler's head, whatever the number of heads. */
export const HEAD = 64;

/** latents + attention of latents [n, tokens, c] over x [n, l, c] and themselves. */
const perceiverAttention = (c: number, inner: number) =>
  module(
    {
      norm1: layerNorm(c),
      norm2: layerNorm(c),
      to_q: linear(c, inner, { bias: false }),
      to_kv: linear(c, 2 * inner, { bias: false }),
      to_out: linear(inner, c, { bias: false }),
    },
    (m, x: Tensor, latents: Tensor) => {
      const queries = m.norm2(latents);
      const kv = m.to_kv(concat([m.norm1(x), queries], 1));
      const [k, v] = [slice(kv, 2, 0, inner), slice(kv, 2, inner, inner)];
      const mixed = attention(m.to_q(queries), k, v, { heads: inner / HEAD });
      return m.to_out(mixed, { residual: latents });
    },
  );

/** x + W2 gelu(W1 norm(x)). The keys are of a torch Sequential, whose 2 was the gelu. */
const feedForward = (c: number, inner: number) =>
  module(
    { 0: layerNorm(c), 1: linear(c, inner, { bias: false }), 3: linear(inner, c, { bias: false }) },
    (m, x: Tensor) => m[3](m[1](m[0](x), { activation: 'gelu' }), { residual: x }),
  );

function resampler(
  { tokens, cross_attention_dim, inputs }: ProjectionConfig,
  { width, depth, inner, feedForward: wide }: NonNullable<ProjectionConfig['resampler']>,
): ImageProjection {
  const layer = () =>
    module({ 0: perceiverAttention(width, inner), 1: feedForward(width, wide) }, (m, x: Tensor, h: Tensor) =>
      m[1](m[0](x, h)),
    );
  return module(
    {
      latents: parameter([1, tokens, width]),
      proj_in: linear(inputs, width),
      layers: Array.from({ length: depth }, layer),
      proj_out: linear(width, cross_attention_dim),
      norm_out: layerNorm(cross_attention_dim),
    },
    (m, x: Tensor) => {
      const read = m.proj_in(x);
      const latents = broadcast(m.latents.tensor.reshape(tokens, width), 0, x.shape[0]);
      return m.norm_out(m.proj_out(m.layers.reduce((h, each) => each(read, h), latents)));
    },
  );
}
