// Adapters for the tiny model, with numbers that a formula gives.
import { encodeNumbers } from '../../io/dtype.ts';
import { writeSafetensors } from '../../io/safetensors.ts';

export interface TinyAdapter {
  size?: number;
  /** Of the UNet's it changes this convolution and its bias, of each text encoder one layer. */
  conv?: string;
  parts?: readonly ('unet' | 'texts')[];
  metadata?: Record<string, string>;
}

/** Writes one, and gives its path. */
export function writeAdapter(path: string, tiny: TinyAdapter = {}): string {
  const { size = 1, conv = 'down_blocks_0_resnets_0_conv1', parts = ['unet', 'texts'], metadata } = tiny;
  const entry = (name: string, shape: readonly number[]) => {
    const count = shape.reduce((a, b) => a * b, 1);
    const values = Float32Array.from({ length: count }, (_, i) => size * Math.sin(i + count));
    return { name, dtype: 'float32' as const, shape, bytes: encodeNumbers(values, 'float32') };
  };
  const text = 'text_model_encoder_layers_0_self_attn_q_proj';
  const unet = [
    entry(`lora_unet_${conv}.lora_down.weight`, [2, 16, 3, 3]),
    entry(`lora_unet_${conv}.lora_up.weight`, [16, 2, 1, 1]),
    entry(`lora_unet_${conv}.diff_b`, [16]),
  ];
  const texts = [['te1', 32] as const, ['te2', 48] as const].flatMap(([encoder, width]) => [
    entry(`lora_${encoder}_${text}.lora_down.weight`, [2, width]),
    entry(`lora_${encoder}_${text}.lora_up.weight`, [width, 2]),
  ]);
  writeSafetensors(
    path,
    parts.flatMap((part) => ({ unet, texts })[part]),
    metadata,
  );
  return path;
}
