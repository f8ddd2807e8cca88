// Perturbed-attention guidance (Ahn et al. 2024), in diffusers' words: beside the text's prediction the UNet makes another of the same
// text, whose self-attention is the identity (each pixel is given its own value) in some layers, and the picture is drawn away from
// that: + pag_scale (text - perturbed). Its rows are the last of a pass.
import { UserError } from '../../io/errors.ts';
import type { Attention } from './transformer.ts';
import { selfAttentions, type UNet } from './unet.ts';

/** The part of a request that perturbed-attention guidance heeds. */
export interface PAGRequest {
  /** How strongly to leave the perturbed prediction; 0, without it, where absent. diffusers' own pipelines have 3. */
  pag_scale?: number;
  /** How much the scale falls for each timestep below 1000, to 0 at most; 0 where absent. */
  pag_adaptive_scale?: number;
  /** The layers that are perturbed, by parts of their names in diffusers: the middle block's, `mid`, where absent. */
  pag_applied_layers?: string | readonly string[];
}

export interface PAG {
  layers: ReadonlySet<Attention['children']>;
  /** That of a timestep. */
  scaleAt(timestep: number): number;
}

/** What a request comes to for a UNet; undefined without. @throws UserError for a layer that it has not, or together with guess mode */
export function pagOf(
  {
    pag_scale: scale = 0,
    pag_adaptive_scale: adaptive = 0,
    pag_applied_layers: given = 'mid',
    guess_mode,
    control_balance,
  }: PAGRequest & { guess_mode?: boolean; control_balance?: unknown },
  unet: UNet,
): PAG | undefined {
  if (scale === 0) return undefined;
  if (guess_mode)
    throw new UserError(
      'guess_mode (--guess-mode) and pag_scale (--pag-scale) do not go together: leave one of them out',
    );
  if ([control_balance].flat().includes('more_control'))
    throw new UserError(
      'control_balance (--control-balance) more_control and pag_scale (--pag-scale) do not go together: leave one of them out',
    );
  const all = selfAttentions(unet);
  const layers = [given].flat().flatMap((part) => {
    const found = all.filter(({ path }) => path.includes(part));
    if (found.length > 0 && part !== '') return found;
    throw new UserError(
      `pag_applied_layers (--pag-applied-layers) "${part}" names no self-attention of this UNet: give a part of a name, as up or ${all[0]?.path}`,
    );
  });
  return {
    layers: new Set(layers.map(({ children }) => children)),
    scaleAt: (timestep) => Math.max(0, scale - adaptive * (1000 - timestep)),
  };
}
