// The transformer layer that CLIP's text and vision encoders are made of (Radford et al. 2021), and what their config.json says of it.
// Norms come first and sums ride in the epilogues; only text is causal.
import { layerNorm, linear } from '../../engine/layers.ts';
import { module } from '../../engine/module.ts';
import { attention } from '../../engine/ops/attention.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { isLayerCount, mostLayers } from '../checkpoint/config_values.ts';

export interface LayerConfig {
  hidden_size: number;
  intermediate_size: number;
  num_hidden_layers: number;
  num_attention_heads: number;
  hidden_act: 'quick_gelu' | 'gelu';
  layer_norm_eps: number;
}

/** Reads a number of a config.json, which errors call `what`. @throws UserError where it is absent and has no fallback */
export const numberIn =
  (json: Record<string, unknown>, what: string) =>
  (key: string, fallback?: number): number => {
    const value = json[key] ?? fallback;
    if (typeof value !== 'number')
      throw new UserError(`${what} config.json: "${key}" is missing or not a number`);
    return value;
  };

/** @throws UserError naming a field that is absent or not supported */
export function parseLayerConfig(json: Record<string, unknown>, what: string): LayerConfig {
  const number = numberIn(json, what);
  const depth = number('num_hidden_layers');
  if (!isLayerCount(depth))
    throw new UserError(
      `${what} config.json: "num_hidden_layers" is ${depth}, not a whole number from 1 to ${mostLayers}; is this a model of SDXL's?`,
    );
  const act = json.hidden_act ?? 'quick_gelu';
  if (act !== 'quick_gelu' && act !== 'gelu')
    throw new UserError(`${what} config.json: hidden_act ${JSON.stringify(act)} is not supported`);
  return {
    hidden_size: number('hidden_size'),
    intermediate_size: number('intermediate_size'),
    num_hidden_layers: depth,
    num_attention_heads: number('num_attention_heads'),
    hidden_act: act,
    layer_norm_eps: number('layer_norm_eps', 1e-5),
  };
}

const selfAttention = (c: number, heads: number, causal: boolean) =>
  module(
    { q_proj: linear(c, c), k_proj: linear(c, c), v_proj: linear(c, c), out_proj: linear(c, c) },
    (m, x: Tensor, residual: Tensor) =>
      m.out_proj(attention(m.q_proj(x), m.k_proj(x), m.v_proj(x), { heads, causal }), { residual }),
  );

const mlp = (c: number, inner: number, activation: LayerConfig['hidden_act']) =>
  module({ fc1: linear(c, inner), fc2: linear(inner, c) }, (m, x: Tensor, residual: Tensor) =>
    m.fc2(m.fc1(x, { activation }), { residual }),
  );

const encoderLayer = (config: LayerConfig, causal: boolean) => {
  const { hidden_size: c, layer_norm_eps: eps } = config;
  return module(
    {
      layer_norm1: layerNorm(c, { eps }),
      self_attn: selfAttention(c, config.num_attention_heads, causal),
      layer_norm2: layerNorm(c, { eps }),
      mlp: mlp(c, config.intermediate_size, config.hidden_act),
    },
    (m, x: Tensor) => {
      const h = m.self_attn(m.layer_norm1(x), x);
      return m.mlp(m.layer_norm2(h), h);
    },
  );
};

/** x [n, l, c] through the first `upTo` layers. */
export const encoderLayers = (config: LayerConfig, { causal }: { causal: boolean }) =>
  module(
    { layers: Array.from({ length: config.num_hidden_layers }, () => encoderLayer(config, causal)) },
    (m, x: Tensor, upTo: number) => m.layers.slice(0, upTo).reduce((h, layer) => layer(h), x),
  );
