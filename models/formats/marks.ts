// What a single file says of its model's noise, as it has no scheduler's config: tensors beside the weights, in the words that ComfyUI
// and diffusers look for. Fine-tunes are marked by empty ones. Models that were trained under EDM's noise (samplers/edm.ts) have numbers:
// Playground v2.5 the mean and the spread of its latents, by channel, and CosXL the ends of its noise levels. What else is fixed with
// these is what both programs take for such a file.
import { decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import type { TensorEntry } from '../../io/safetensors.ts';
import type { TensorFile } from '../../io/tensor_file.ts';
import type { Json } from '../checkpoint/checkpoint.ts';
import { isPositive } from '../checkpoint/config_values.ts';
import { isEDM, type SchedulerClass, schedulerDefaults } from '../samplers/config.ts';
import { completeConfig, parseSchedulerConfig } from '../samplers/config_checks.ts';

const empty: Readonly<Record<string, Json>> = {
  v_pred: { prediction_type: 'v_prediction' },
  ztsnr: { rescale_betas_zero_snr: true },
};

const playground = (latents_mean: readonly number[], latents_std: readonly number[]) => ({
  scheduler: {
    _class_name: 'EDMDPMSolverMultistepScheduler',
    ...schedulerDefaults.EDMDPMSolverMultistepScheduler,
  } as Json,
  vae: { latents_mean, latents_std, scaling_factor: 0.5 } as Json,
});

const cosxl = (sigma_max: number, sigma_min: number) => ({
  scheduler: {
    _class_name: 'EDMEulerScheduler',
    ...schedulerDefaults.EDMEulerScheduler,
    prediction_type: 'v_prediction',
    sigma_schedule: 'exponential',
    sigma_data: 1,
    sigma_max,
    sigma_min,
  } as Json,
});

export interface Marked {
  /** A whole config of EDM's, or fields over another's. */
  scheduler: Json;
  /** Fields over another's config. */
  vae?: Json;
}

/** What a file's marks say. @throws UserError for numbers that are none of a model's */
export function markedIn(file: TensorFile): Marked {
  const { tensors } = file;
  if (tensors.has('edm_mean') || tensors.has('edm_std')) {
    const [mean, std] = [numbersOf(file, 'edm_mean', 4), numbersOf(file, 'edm_std', 4)];
    if (!std.every(isPositive)) throw damaged(file, 'edm_std', 'numbers above 0');
    return playground(mean, std);
  }
  if (tensors.has('edm_vpred.sigma_max')) {
    const [max] = numbersOf(file, 'edm_vpred.sigma_max', 1);
    const [min] = tensors.has('edm_vpred.sigma_min') ? numbersOf(file, 'edm_vpred.sigma_min', 1) : [0.002];
    if (!(min > 0 && max > min))
      throw damaged(file, 'edm_vpred.sigma_max', 'a number above sigma_min, and both above 0');
    return cosxl(max, min);
  }
  return {
    scheduler: Object.assign({}, ...Object.keys(empty).map((name) => tensors.has(name) && empty[name])),
  };
}

/** As they were written in decimals, where float32 holds them. */
function numbersOf(file: TensorFile, name: string, count: number): number[] {
  const stored = file.tensors.get(name);
  if (!stored) throw damaged(file, name, 'there too');
  const values = [...decodeFloats(file.read(name), stored.dtype)].map((value) =>
    Number(value.toPrecision(7)),
  );
  if (values.length === count && values.every(Number.isFinite)) return values;
  throw damaged(file, name, `${count === 1 ? 'one number' : `${count} numbers`}, finite`);
}

const damaged = ({ path }: TensorFile, name: string, want: string): UserError =>
  new UserError(
    `${path}: ${name}, which tells of the model's noise, must be ${want}; download the file again`,
  );

/** The marks of a model with these configs. @throws UserError where there are none that say it */
export function marksFor(scheduler: Json, vae: Json = {}): TensorEntry[] {
  const { latents_mean: mean, latents_std: std, scaling_factor } = vae;
  if (isEDM(scheduler._class_name)) {
    const config = completeConfig(scheduler._class_name as SchedulerClass, parseSchedulerConfig(scheduler));
    const { prediction_type, sigma_data, sigma_max, sigma_min } = config;
    const isV = prediction_type === 'v_prediction';
    if (isV && sigma_data === 1 && !mean)
      return [
        mark('edm_vpred.sigma_max', [Number(sigma_max)]),
        mark('edm_vpred.sigma_min', [Number(sigma_min)]),
      ];
    const isUsual = sigma_data === 0.5 && sigma_max === 80 && sigma_min === 0.002 && scaling_factor === 0.5;
    if (!isV && isUsual && mean && std)
      return [mark('edm_mean', mean as number[]), mark('edm_std', std as number[])];
  } else if (!mean)
    return Object.keys(empty)
      .filter((name) => Object.entries(empty[name]).every(([key, value]) => scheduler[key] === value))
      .map((name) => mark(name, []));
  throw new UserError(
    "a single file can say of a model's noise and of how its latents are scaled what Playground v2.5's and CosXL's say, and this model has others: export a folder",
  );
}

const mark = (name: string, values: readonly number[]): TensorEntry => ({
  name,
  dtype: 'float32',
  shape: [values.length],
  bytes: encodeNumbers(Float32Array.from(values), 'float32'),
});
