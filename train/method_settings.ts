// What methods (`train.method`) are told beside what all runs are: for each an interface and its fields, as run.ts has them of the rest.
import { choice, type Fields, number, whole } from './fields.ts';

/** Latent consistency distillation (Luo et al. 2023; lcm.ts), in the words of diffusers' scripts. */
export interface LcmSettings {
  /** The guidance w that is distilled, drawn for each picture from here to there; in `guidance_scale` it is 1 more. */
  w_min: number;
  w_max: number;
  /** The timesteps that the student learns to draw from: an LCM sampler's `original_inference_steps`. */
  num_ddim_timesteps: number;
  /** The square of the distance, or sqrt(r^2 + huber_c^2) - huber_c. */
  loss_type: 'l2' | 'huber';
  huber_c: number;
  /** How soon above timestep 0 the prediction counts, and not the noised picture itself. */
  timestep_scaling_factor: number;
  /**
   * Of target `unet`: tell the UNet the drawn guidance, embedded in so many numbers, where the model has no such layer yet
   * (`time_cond_proj_dim`); 0 not to. Adapters are told nothing.
   */
  unet_time_cond_proj_dim: number;
}

export const lcmFields: Fields<LcmSettings> = {
  w_min: number(3, { min: 0 }),
  w_max: number(15, { min: 0 }),
  num_ddim_timesteps: whole(50, { min: 1 }),
  loss_type: choice('l2', 'l2', 'huber'),
  huber_c: number(0.001, { min: 1e-6 }),
  timestep_scaling_factor: number(10, { min: 1 }),
  unet_time_cond_proj_dim: whole(256),
};
