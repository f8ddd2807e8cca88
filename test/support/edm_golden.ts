// Models as those that were trained under EDM's noise: a tiny one's folder with the scheduler of Playground v2.5 or CosXL, and of the
// former the scale of its latents.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { goldenFolder } from './golden.ts';

export const edmSchedulers = {
  playground: { _class_name: 'EDMDPMSolverMultistepScheduler', prediction_type: 'epsilon' },
  cosxl: {
    ...{ _class_name: 'EDMEulerScheduler', prediction_type: 'v_prediction', sigma_schedule: 'exponential' },
    ...{ sigma_data: 1, sigma_min: 0.002, sigma_max: 120 },
  },
};

/** Playground's, by channel. */
export const spread = {
  latents_mean: [-1.6574, 1.886, -1.383, 2.5155],
  latents_std: [8.4927, 5.9022, 6.5498, 5.2299],
  scaling_factor: 0.5,
};

/** Changes fields of a JSON file. */
export function change(path: string, more: object): void {
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), ...more }));
}

/** Writes a copy of the model at `from` into `folder`, as one of these two. */
export function writeEDM(
  folder: string,
  like: keyof typeof edmSchedulers,
  from = join(goldenFolder, 'tiny-sdxl'),
): string {
  const scheduler = edmSchedulers[like];
  cpSync(from, folder, { recursive: true, dereference: true });
  writeFileSync(join(folder, 'scheduler', 'scheduler_config.json'), JSON.stringify(scheduler));
  change(join(folder, 'model_index.json'), { scheduler: ['diffusers', scheduler._class_name] });
  if (like === 'playground') change(join(folder, 'vae', 'config.json'), spread);
  return folder;
}
