// The UNet's keys in the original's words (generative-models, "SGM"), which number blocks in one row: single files are spelled so, and
// what kohya's scripts train beside a UNet.
import type { UNetConfig } from './unet.ts';

const resnetWords: Record<string, string> = {
  norm1: 'in_layers.0',
  conv1: 'in_layers.2',
  time_emb_proj: 'emb_layers.1',
  norm2: 'out_layers.0',
  conv2: 'out_layers.3',
  conv_shortcut: 'skip_connection',
};

const unetWords: Record<string, string> = {
  'conv_in.': 'input_blocks.0.0.',
  'time_embedding.linear_1.': 'time_embed.0.',
  'time_embedding.linear_2.': 'time_embed.2.',
  'add_embedding.linear_1.': 'label_emb.0.0.',
  'add_embedding.linear_2.': 'label_emb.0.2.',
  'mid_block.resnets.0.': 'middle_block.0.',
  'mid_block.attentions.0.': 'middle_block.1.',
  'mid_block.resnets.1.': 'middle_block.2.',
  'conv_norm_out.': 'out.0.',
  'conv_out.': 'out.2.',
};

type BlockLayout = Pick<UNetConfig, 'layers_per_block' | 'up_block_types'>;

/**
 * A UNet key in the original's words (without its `model.diffusion_model.`), where blocks are numbered in one
 * row.
 */
export function unetKeyInSgm(key: string, { layers_per_block: layers, up_block_types }: BlockLayout): string {
  const resnetPart = (rest: string) => rest.replace(/^\w+/, (word) => resnetWords[word] ?? word);
  const found = /^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$/.exec(
    key,
  );
  if (!found) {
    const prefix = Object.keys(unetWords).find((word) => key.startsWith(word)) ?? '';
    const rest = key.slice(prefix.length);
    return (unetWords[prefix] ?? '') + (prefix.includes('resnets') ? resnetPart(rest) : rest);
  }
  const [, way, level, part, layer, rest] = found;
  const [i, j] = [Number(level), Number(layer)];
  const row =
    way === 'down'
      ? `input_blocks.${1 + i * (layers + 1) + (part === 'downsamplers' ? layers : j)}`
      : `output_blocks.${i * (layers + 1) + (part === 'upsamplers' ? layers : j)}`;
  if (part === 'resnets') return `${row}.0.${resnetPart(rest)}`;
  if (part === 'attentions') return `${row}.1.${rest}`;
  if (part === 'downsamplers') return `${row}.0.${rest.replace(/^conv/, 'op')}`;
  return `${row}.${up_block_types[i].startsWith('CrossAttn') ? 2 : 1}.${rest}`;
}
