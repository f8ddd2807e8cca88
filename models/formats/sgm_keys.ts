// diffusers' keys in the words of the original (generative-models, "SGM"), as sd_xl_base_1.0 and sd_xl_refiner_1.0 are
// published in one file: which prefix each component has, the VAE's words, and what OpenCLIP keeps fused or transposed.
// stable-diffusion.cpp wrote text encoders under names of its own until January 2026, and does so when told (--convert-name).
// Each key is spelled in one direction alone: what is read is looked up by it, what is written is named by it.
import type { Json } from '../checkpoint/checkpoint.ts';
import { parseUNetConfig } from '../unet/unet.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';

/** Where a diffusers tensor lies: under `name`, perhaps as one third of a fused matrix, or transposed. */
export interface Origin {
  name: string;
  third?: number;
  transposed?: boolean;
}

const vaeWords: readonly (readonly [RegExp, string])[] = [
  [/mid_block\.resnets\.0\./, 'mid.block_1.'],
  [/mid_block\.resnets\.1\./, 'mid.block_2.'],
  [/mid_block\.attentions\.0\./, 'mid.attn_1.'],
  [/group_norm\./, 'norm.'],
  [/to_out\.0\./, 'proj_out.'],
  [/to_([qkv])\./, '$1.'],
  [/down_blocks\.(\d+)\./, 'down.$1.'],
  [/\.resnets\.(\d+)\./, '.block.$1.'],
  [/downsamplers\.0\./, 'downsample.'],
  [/upsamplers\.0\./, 'upsample.'],
  [/conv_shortcut\./, 'nin_shortcut.'],
  [/conv_norm_out\./, 'norm_out.'],
];

/**
 * A VAE key in the original's words (without `first_stage_model.`); decoder levels count from the picture
 * there.
 */
export function vaeKeyInSgm(key: string, levels: number): string {
  const reversed = key.replace(/up_blocks\.(\d+)\./, (_, i) => `up.${levels - 1 - Number(i)}.`);
  return vaeWords.reduce((name, [pattern, word]) => name.replace(pattern, word), reversed);
}

const openClipWords: readonly (readonly [RegExp, string])[] = [
  [/^embeddings\.token_embedding\./, 'token_embedding.'],
  [/^embeddings\.position_embedding\.weight$/, 'positional_embedding'],
  [/^final_layer_norm\./, 'ln_final.'],
  [/^encoder\.layers\.(\d+)\./, 'transformer.resblocks.$1.'],
  [/layer_norm([12])\./, 'ln_$1.'],
  [/self_attn\.out_proj\./, 'attn.out_proj.'],
  [/mlp\.fc1\./, 'mlp.c_fc.'],
  [/mlp\.fc2\./, 'mlp.c_proj.'],
];

/**
 * A CLIPTextModelWithProjection key in OpenCLIP's words: q, k and v fused, and a bare projection the other
 * way round.
 */
function openClipOrigin(key: string): Origin {
  if (key === 'text_projection.weight') return { name: 'text_projection', transposed: true };
  const name = openClipWords.reduce(
    (n, [pattern, word]) => n.replace(pattern, word),
    key.replace(/^text_model\./, ''),
  );
  const fused = /^(.+)\.self_attn\.([qkv])_proj\.(weight|bias)$/.exec(name);
  return fused ? { name: `${fused[1]}.attn.in_proj_${fused[3]}`, third: 'qkv'.indexOf(fused[2]) } : { name };
}

/** How a whole model's file spells its components. */
export interface Layout {
  /** What the names of each begin with. The refiner has OpenCLIP alone, so it stands first there. */
  prefixes: Readonly<Record<string, string>>;
  refiner: boolean;
  /** OpenCLIP in its own words, or in transformers' as stable-diffusion.cpp puts it, which later left q, k and v fused. */
  openClip: 'own' | 'renamed' | 'renamed, fused';
}

/** The original's. */
export const sgmLayout = (refiner: boolean): Layout => ({
  prefixes: {
    unet: 'model.diffusion_model.',
    vae: 'first_stage_model.',
    ...(refiner ? {} : { text_encoder: 'conditioner.embedders.0.transformer.' }),
    text_encoder_2: `conditioner.embedders.${refiner ? 0 : 1}.model.`,
  },
  refiner,
  openClip: 'own',
});

function renamedLayout(refiner: boolean, fused: boolean): Layout {
  const { prefixes } = sgmLayout(refiner);
  const first = 'cond_stage_model.transformer.';
  const texts: Record<string, string> = refiner
    ? { text_encoder_2: first }
    : { text_encoder: first, text_encoder_2: 'cond_stage_model.1.transformer.' };
  return { prefixes: { ...prefixes, ...texts }, refiner, openClip: fused ? 'renamed, fused' : 'renamed' };
}

/** The layout of a whole model, told by where OpenCLIP stands; undefined where that is nowhere. */
export function layoutOf(names: { has(name: string): boolean }): Layout | undefined {
  // stable-diffusion.cpp puts a VAE that it was given beside the model's own.
  const vae: Record<string, string> = names.has('vae.decoder.up.0.block.0.conv1.weight')
    ? { vae: 'vae.' }
    : {};
  const withVae = (layout: Layout): Layout => ({ ...layout, prefixes: { ...layout.prefixes, ...vae } });
  for (const refiner of [false, true]) {
    const original = sgmLayout(refiner);
    if (names.has(`${original.prefixes.text_encoder_2}ln_final.weight`)) return withVae(original);
    const { text_encoder_2: prefix } = renamedLayout(refiner, false).prefixes;
    // The first encoder, which other models have too, has no projection.
    if (names.has(`${prefix}text_model.text_projection`))
      return withVae(
        renamedLayout(refiner, names.has(`${prefix}text_model.encoder.layers.0.self_attn.in_proj.weight`)),
      );
  }
  return undefined;
}

/** Where a diffusers key of a component lies in a whole model's file; `config` gives the components' configs. */
export function sgmOrigin(
  component: string,
  config: (component: string) => Json,
  { prefixes, openClip }: Layout,
): (key: string) => Origin {
  const prefix = prefixes[component];
  const named = (spell: (key: string) => string) => (key: string) => ({ name: prefix + spell(key) });
  if (component === 'unet') {
    const layout = parseUNetConfig(config('unet')); // with diffusers' defaults for what it leaves out
    return named((key) => unetKeyInSgm(key, layout));
  }
  if (component === 'vae') {
    const levels = (config('vae').block_out_channels as number[]).length;
    return named((key) => vaeKeyInSgm(key, levels));
  }
  if (component === 'text_encoder') return named((key) => key);
  const originOf = openClip === 'own' ? openClipOrigin : (key: string) => renamedOrigin(key, openClip);
  return (key) => {
    const origin = originOf(key);
    return { ...origin, name: prefix + origin.name };
  };
}

/** stable-diffusion.cpp renames the projection of an original file as it lies there, the other way round. */
function renamedOrigin(key: string, openClip: Layout['openClip']): Origin {
  if (key === 'text_projection.weight') return { name: 'text_model.text_projection', transposed: true };
  const fused = openClip === 'renamed' ? null : /^(.+\.self_attn\.)([qkv])_proj\.(weight|bias)$/.exec(key);
  return fused ? { name: `${fused[1]}in_proj.${fused[3]}`, third: 'qkv'.indexOf(fused[2]) } : { name: key };
}

/** What the names of a UNet alone begin with, and whose words they are. ComfyUI's files have no prefix. */
export function loneUNet(names: {
  has(name: string): boolean;
}): { prefix: string; original: boolean } | undefined {
  const spellings = [
    ...['', 'model.diffusion_model.', 'diffusion_model.'].map((prefix) => ({ prefix, original: true })),
    ...['', 'unet.'].map((prefix) => ({ prefix, original: false })),
  ];
  // Stable Diffusion 1 and 2 have not the second.
  return spellings.find(({ prefix, original }) =>
    (original ? ['input_blocks.0.0', 'label_emb.0.0'] : ['conv_in', 'add_embedding.linear_1']).every(
      (layer) => names.has(`${prefix}${layer}.weight`),
    ),
  );
}

/** The original's VAE keeps the linear layers of its attention as 1x1 convolutions. */
export const isVaeAttention = (name: string): boolean => /\.attn_1\.(q|k|v|proj_out)\.weight$/.test(name);
