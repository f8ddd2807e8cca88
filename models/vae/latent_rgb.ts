// What SDXL's latents look like without a decoder: a linear map from their four channels to RGB, one pixel per latent. The numbers
// are ComfyUI's latent_rgb_factors and latent_rgb_factors_bias of SDXL (comfy/latent_formats.py), fitted to scaled latents.
import type { Latents } from './latents.ts';

const factors = [
  [0.3651, 0.4232, 0.4341],
  [-0.2533, -0.0042, 0.1068],
  [0.1076, 0.1111, -0.0362],
  [-0.3165, -0.2492, -0.2188],
] as const;
const bias = [0.1084, -0.0175, -0.0011] as const;

/** How many channels the map takes. */
export const latentRgbChannels = factors.length;

/** Scaled latents [n, 4, h, w] → pictures [n, 3, h, w], about [-1, 1]. */
export function latentRgb({ shape: [n, c, h, w], data }: Latents): Latents {
  const area = h * w;
  const out = new Float32Array(n * 3 * area);
  for (let image = 0; image < n; image++)
    for (let colour = 0; colour < 3; colour++)
      for (let i = 0; i < area; i++) {
        let sum: number = bias[colour];
        factors.forEach((row, k) => {
          sum += row[colour] * data[(image * c + k) * area + i];
        });
        out[(image * 3 + colour) * area + i] = sum;
      }
  return { shape: [n, 3, h, w], data: out };
}
