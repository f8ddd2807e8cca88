// The configuration of a sampler, spelled as diffusers writes scheduler_config.json. Every scheduler class there has its
// own set of options and its own defaults; an option that a class does not have is dropped, as diffusers'
// `Class.from_config(other.config)` does, so one file serves every sampler.
import { didYouMean, UserError } from '../../io/errors.ts';

export interface SchedulerConfig {
  num_train_timesteps: number;
  beta_start: number;
  beta_end: number;
  beta_schedule: 'linear' | 'scaled_linear' | 'squaredcos_cap_v2';
  trained_betas: number[] | null;
  prediction_type: 'epsilon' | 'v_prediction' | 'sample';
  timestep_spacing: 'linspace' | 'leading' | 'trailing';
  steps_offset: number;
  rescale_betas_zero_snr: boolean;
  interpolation_type: 'linear' | 'log_linear';
  use_karras_sigmas: boolean;
  use_exponential_sigmas: boolean;
  use_beta_sigmas: boolean;
  use_lu_lambdas: boolean;
  sigma_min: number | null;
  sigma_max: number | null;
  final_sigmas_type: 'zero' | 'sigma_min';
  clip_sample: boolean;
  clip_sample_range: number;
  set_alpha_to_one: boolean;
  skip_prk_steps: boolean;
  variance_type: 'fixed_small' | 'fixed_large' | null;
  algorithm_type: 'dpmsolver' | 'dpmsolver++' | 'sde-dpmsolver' | 'sde-dpmsolver++';
  solver_type: 'midpoint' | 'heun' | 'bh1' | 'bh2';
  solver_order: number;
  lower_order_final: boolean;
  euler_at_final: boolean;
  predict_x0: boolean;
  disable_corrector: number[];
  original_inference_steps: number;
  timestep_scaling: number;
}

/** The options that decide the training tables, which every class has. */
const training: Partial<SchedulerConfig> = {
  num_train_timesteps: 1000,
  beta_start: 0.0001,
  beta_end: 0.02,
  beta_schedule: 'linear',
  trained_betas: null,
  prediction_type: 'epsilon',
  timestep_spacing: 'linspace',
  steps_offset: 0,
};
const spacedSigmas: Partial<SchedulerConfig> = {
  use_karras_sigmas: false,
  use_exponential_sigmas: false,
  use_beta_sigmas: false,
};
const clipping: Partial<SchedulerConfig> = { clip_sample: true, clip_sample_range: 1 };
const secondOrder: Partial<SchedulerConfig> = {
  ...training,
  ...spacedSigmas,
  beta_start: 0.00085,
  beta_end: 0.012,
};
const consistency: Partial<SchedulerConfig> = {
  ...training,
  beta_start: 0.00085,
  beta_end: 0.012,
  beta_schedule: 'scaled_linear',
  timestep_spacing: 'leading',
  rescale_betas_zero_snr: false,
  clip_sample: false,
  clip_sample_range: 1,
  set_alpha_to_one: true,
  original_inference_steps: 50,
  timestep_scaling: 10,
};
const multistep: Partial<SchedulerConfig> = {
  ...training,
  ...spacedSigmas,
  solver_order: 2,
  lower_order_final: true,
};

/** The options of each scheduler class, with its defaults. */
export const schedulerDefaults = {
  EulerDiscreteScheduler: {
    ...training,
    ...spacedSigmas,
    interpolation_type: 'linear',
    sigma_min: null,
    sigma_max: null,
    rescale_betas_zero_snr: false,
    final_sigmas_type: 'zero',
  },
  EulerAncestralDiscreteScheduler: { ...training, rescale_betas_zero_snr: false },
  HeunDiscreteScheduler: { ...secondOrder, clip_sample: false, clip_sample_range: 1 },
  KDPM2DiscreteScheduler: secondOrder,
  KDPM2AncestralDiscreteScheduler: secondOrder,
  DPMSolverSDEScheduler: secondOrder,
  LMSDiscreteScheduler: { ...training, ...spacedSigmas },
  DDIMScheduler: {
    ...training,
    ...clipping,
    timestep_spacing: 'leading',
    set_alpha_to_one: true,
    rescale_betas_zero_snr: false,
  },
  DDPMScheduler: {
    ...training,
    ...clipping,
    timestep_spacing: 'leading',
    variance_type: 'fixed_small',
    rescale_betas_zero_snr: false,
  },
  PNDMScheduler: { ...training, timestep_spacing: 'leading', skip_prk_steps: false, set_alpha_to_one: false },
  DPMSolverMultistepScheduler: {
    ...multistep,
    algorithm_type: 'dpmsolver++',
    solver_type: 'midpoint',
    euler_at_final: false,
    use_lu_lambdas: false,
    final_sigmas_type: 'zero',
    rescale_betas_zero_snr: false,
  },
  DPMSolverSinglestepScheduler: {
    ...multistep,
    algorithm_type: 'dpmsolver++',
    solver_type: 'midpoint',
    lower_order_final: false,
    final_sigmas_type: 'zero',
  },
  DEISMultistepScheduler: multistep,
  UniPCMultistepScheduler: {
    ...multistep,
    solver_type: 'bh2',
    predict_x0: true,
    disable_corrector: [],
    sigma_min: null,
    sigma_max: null,
    final_sigmas_type: 'zero',
    rescale_betas_zero_snr: false,
  },
  LCMScheduler: consistency,
  TCDScheduler: consistency,
} satisfies Record<string, Partial<SchedulerConfig>>;

export type SchedulerClass = keyof typeof schedulerDefaults;

export const schedulerClasses = Object.keys(schedulerDefaults) as SchedulerClass[];

/** What the options may be, in any class. */
const choices: Partial<Record<keyof SchedulerConfig, readonly (string | null)[]>> = {
  beta_schedule: ['linear', 'scaled_linear', 'squaredcos_cap_v2'],
  prediction_type: ['epsilon', 'v_prediction', 'sample'],
  timestep_spacing: ['linspace', 'leading', 'trailing'],
  interpolation_type: ['linear', 'log_linear'],
  final_sigmas_type: ['zero', 'sigma_min'],
  variance_type: [
    ...['fixed_small', 'fixed_small_log', 'fixed_large', 'fixed_large_log'],
    ...['learned', 'learned_range', null],
  ],
  algorithm_type: ['dpmsolver', 'dpmsolver++', 'sde-dpmsolver', 'sde-dpmsolver++', 'deis'],
  solver_type: ['midpoint', 'heun', 'bh1', 'bh2', 'logrho'],
};

/** Values that a config saved by another class may have: diffusers puts the class's own default in their place. */
const foreign = (name: SchedulerClass): Partial<Record<keyof SchedulerConfig, readonly string[]>> => ({
  algorithm_type: ['deis'],
  solver_type: ['logrho', ...(name === 'UniPCMultistepScheduler' ? ['midpoint', 'heun'] : ['bh1', 'bh2'])],
});

/** Settings of the published format that change the mathematics and that no SDXL checkpoint is known to need. */
const unsupported = ['thresholding', 'use_flow_sigmas', 'use_dynamic_shifting', 'lambda_min_clipped'];

/** Bounds of spaced sigmas: diffusers' classes heed these of another class's config too, but for two in Karras' spacing. */
const limits = ['sigma_min', 'sigma_max'];
const limited = (name: SchedulerClass, { use_karras_sigmas }: Partial<SchedulerConfig>): boolean =>
  'use_karras_sigmas' in schedulerDefaults[name] &&
  !(use_karras_sigmas && ['LMSDiscreteScheduler', 'DPMSolverSDEScheduler'].includes(name));

/**
 * One class's full configuration: its defaults, with what `given` says about the options it has.
 * @throws UserError for options that exclude each other
 */
export function completeConfig(name: SchedulerClass, given: Partial<SchedulerConfig>): SchedulerConfig {
  const defaults: Partial<SchedulerConfig> = schedulerDefaults[name];
  const strange: Partial<Record<string, readonly unknown[]>> = foreign(name);
  const known = Object.entries(given).filter(
    ([key, value]) =>
      (key in defaults || (limits.includes(key) && limited(name, given))) &&
      value !== undefined &&
      !strange[key]?.includes(value),
  );
  const config = { ...defaults, ...Object.fromEntries(known) } as SchedulerConfig;
  const { use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, algorithm_type } = config;
  if ([use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas].filter(Boolean).length > 1)
    throw new UserError(
      'the scheduler config sets several of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas: keep one',
    );
  if (algorithm_type && !algorithm_type.endsWith('++') && config.final_sigmas_type === 'zero')
    throw new UserError(
      `the scheduler config's algorithm_type "${algorithm_type}" cannot step to sigma 0: set final_sigmas_type to "sigma_min"`,
    );
  return config;
}

/**
 * Checks a parsed scheduler_config.json and returns the options it gives, with `_class_name` where it names one.
 * Options we do not know are passed over, as diffusers does; a known option with a value we cannot honour is an error.
 */
export function parseSchedulerConfig(json: unknown): Partial<SchedulerConfig> & { _class_name?: string } {
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    throw new UserError(
      'scheduler_config.json does not hold a JSON object: take the file from a diffusers folder',
    );
  const given = json as Record<string, unknown>;
  for (const [key, allowed] of Object.entries(choices)) {
    const value = given[key] as string | null | undefined;
    if (value !== undefined && !allowed.includes(value))
      throw new UserError(
        `scheduler config: ${key} is ${JSON.stringify(value)}, but must be one of ${allowed.join(', ')}${didYouMean(
          String(value),
          allowed.filter((name) => name !== null),
        )}`,
      );
  }
  for (const key of ['num_train_timesteps', 'beta_start', 'beta_end', 'steps_offset'])
    if (given[key] !== undefined && typeof given[key] !== 'number')
      throw new UserError(`scheduler config: ${key} is ${JSON.stringify(given[key])}, but must be a number`);
  for (const key of unsupported)
    if (given[key]) throw new UserError(`scheduler config: ${key} is not supported: leave it out`);
  if (given.timestep_type === 'continuous')
    throw new UserError('scheduler config: timestep_type "continuous" is not supported: use "discrete"');
  return given as Partial<SchedulerConfig> & { _class_name?: string };
}
