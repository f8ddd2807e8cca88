// The configuration of a sampler, spelled as diffusers writes scheduler_config.json. Every scheduler class there has its
// own set of options and its own defaults; an option that a class does not have is dropped, as diffusers'
// `Class.from_config(other.config)` does, so one file serves every sampler.
import { didYouMean, UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import { flag, isPositive, listOf, type Rule, whole } from '../checkpoint/config_values.ts';

/**
 * Ways to lay out the noise levels of a run: the two that EDM's classes name, diffusers' third (`use_beta_sigmas`), and those of A1111,
 * Forge, ComfyUI and stable-diffusion.cpp that diffusers has not. sigma_schedules.ts has the formulas.
 */
export const sigmaSchedules = [
  ...['karras', 'exponential', 'beta'],
  ...['normal', 'simple', 'sgm_uniform', 'ddim_uniform', 'turbo', 'align_your_steps', 'ays', 'gits', 'lcm'],
  ...['kl_optimal', 'kl_optimal_zero', 'beta_timesteps', 'linear_quadratic', 'smoothstep'],
] as const;

export type SigmaSchedule = (typeof sigmaSchedules)[number];

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
  /** EDM's classes alone have this and rho: the spread of the data, which the network's input and output are scaled by. */
  sigma_data?: number;
  /** EDM's classes', with the first two; here also how the others lay out their levels, where that is none of diffusers' options. */
  sigma_schedule?: SigmaSchedule;
  rho: number;
  final_sigmas_type: 'zero' | 'sigma_min';
  clip_sample: boolean;
  clip_sample_range: number;
  set_alpha_to_one: boolean;
  skip_prk_steps: boolean;
  variance_type: 'fixed_small' | 'fixed_small_log' | 'fixed_large' | null;
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
const edm: Partial<SchedulerConfig> = {
  sigma_min: 0.002,
  sigma_max: 80,
  sigma_data: 0.5,
  sigma_schedule: 'karras',
  num_train_timesteps: 1000,
  prediction_type: 'epsilon',
  rho: 7,
  final_sigmas_type: 'zero',
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
  EDMEulerScheduler: edm,
  EDMDPMSolverMultistepScheduler: {
    ...edm,
    solver_order: 2,
    algorithm_type: 'dpmsolver++',
    solver_type: 'midpoint',
    lower_order_final: true,
    euler_at_final: false,
  },
} satisfies Record<string, Partial<SchedulerConfig>>;

export type SchedulerClass = keyof typeof schedulerDefaults;

/** Whether models that were trained under EDM's noise (Karras et al. 2022) come with this class, which draws with no others. */
export const isEDM = (name: unknown): boolean => typeof name === 'string' && name.startsWith('EDM');

export const schedulerClasses = Object.keys(schedulerDefaults) as SchedulerClass[];

/** What the options may be, in any class. */
const choices: Partial<Record<keyof SchedulerConfig, readonly (string | null)[]>> = {
  beta_schedule: ['linear', 'scaled_linear', 'squaredcos_cap_v2'],
  prediction_type: ['epsilon', 'v_prediction', 'sample'],
  timestep_spacing: ['linspace', 'leading', 'trailing'],
  interpolation_type: ['linear', 'log_linear'],
  final_sigmas_type: ['zero', 'sigma_min'],
  sigma_schedule: sigmaSchedules,
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

const positive: Rule = ['a number above 0', isPositive];
const beta: Rule = ['a number between 0 and 1', (value) => isPositive(value) && (value as number) < 1];
const nothingOr = ([want, holds]: Rule): Rule => [
  `${want}, or null`,
  (value) => value === null || holds(value),
];
/** Python takes its None for false. */
const flagOrNone: Rule = [flag[0], (value) => value === null || flag[1](value)];

/** What the options that are no choices of a few words may be, in any class. */
const rules: Partial<Record<keyof SchedulerConfig | '_class_name', Rule>> = {
  _class_name: ["the name of a scheduler's class", (value) => typeof value === 'string'],
  num_train_timesteps: whole(2, 1e6), // tables have as many rows
  beta_start: beta,
  beta_end: beta,
  trained_betas: nothingOr(
    listOf('numbers from 0 to 1', (value) => value === 0 || value === 1 || beta[1](value)),
  ),
  steps_offset: whole(0),
  rescale_betas_zero_snr: flagOrNone,
  use_karras_sigmas: flagOrNone,
  use_exponential_sigmas: flagOrNone,
  use_beta_sigmas: flagOrNone,
  use_lu_lambdas: flagOrNone,
  sigma_min: nothingOr(positive),
  sigma_max: nothingOr(positive),
  sigma_data: positive,
  rho: positive,
  clip_sample: flagOrNone,
  clip_sample_range: positive,
  set_alpha_to_one: flagOrNone,
  skip_prk_steps: flagOrNone,
  solver_order: whole(1),
  lower_order_final: flagOrNone,
  euler_at_final: flagOrNone,
  predict_x0: flagOrNone,
  disable_corrector: listOf('whole numbers', Number.isInteger),
  original_inference_steps: whole(1),
  timestep_scaling: positive,
};

/** What is said of a model that no scheduler here can draw with, whichever is named: all that comes is noise. */
const otherProcess =
  "was trained under another noise (flow matching's, or a cosine's), which no scheduler here samples: give a model of SDXL's own noise, or of EDM's";

/** The classes that such models come with. */
const ofOtherProcesses = /^(FlowMatch|CosineDPM)/;

/** Settings of the published format that change the mathematics and that no SDXL checkpoint is known to need. */
const unsupported = ['thresholding', 'use_flow_sigmas', 'use_dynamic_shifting', 'lambda_min_clipped'];

/** diffusers' options for some of the schedules, in the classes that have them. */
export const layoutOptions = {
  karras: 'use_karras_sigmas',
  exponential: 'use_exponential_sigmas',
  beta: 'use_beta_sigmas',
} as const;

/** Whether a class lays out its levels so when asked: DDIM and its kin have timesteps alone, and EDM's levels have no timesteps. */
export const takesSchedule = (name: SchedulerClass, schedule: SigmaSchedule): boolean =>
  isEDM(name)
    ? schedule === 'karras' || schedule === 'exponential'
    : 'use_karras_sigmas' in schedulerDefaults[name] || name === 'EulerAncestralDiscreteScheduler';

/** Whether a class has a use for `eta`. */
export const takesEta = (name: SchedulerClass): boolean =>
  name === 'DDIMScheduler' || name === 'TCDScheduler';

/** Whether a sampler puts noise into each step, as much as `eta_ancestral` says. */
export const takesEtaAncestral = (
  name: SchedulerClass,
  { algorithm_type }: Partial<SchedulerConfig>,
): boolean =>
  ['EulerAncestralDiscreteScheduler', 'KDPM2AncestralDiscreteScheduler', 'DPMSolverSDEScheduler'].includes(
    name,
  ) ||
  (algorithm_type === 'sde-dpmsolver++' && name !== 'DPMSolverSinglestepScheduler');

/** Whether a class reads `sigma_schedule`, and not an option of diffusers for the same. */
const readsSchedule = (name: SchedulerClass, schedule: SigmaSchedule): boolean =>
  takesSchedule(name, schedule) &&
  !(schedule in layoutOptions && 'use_karras_sigmas' in schedulerDefaults[name]);

/** Bounds of spaced sigmas: diffusers' classes heed these of another class's config too, but for some layouts of three. */
const limits = ['sigma_min', 'sigma_max'];
const limited = (name: SchedulerClass, config: Partial<SchedulerConfig>): boolean => {
  if (config.use_karras_sigmas && ['LMSDiscreteScheduler', 'DPMSolverSDEScheduler'].includes(name))
    return false;
  if (!config.use_karras_sigmas && config.use_lu_lambdas && name === 'DPMSolverMultistepScheduler')
    return false;
  return 'use_karras_sigmas' in schedulerDefaults[name];
};

/**
 * One class's full configuration: its defaults, with what `given` says about the options it has.
 * @throws UserError for options that exclude each other
 */
export function completeConfig(name: SchedulerClass, given: Partial<SchedulerConfig>): SchedulerConfig {
  const defaults: Partial<SchedulerConfig> = schedulerDefaults[name];
  const strange: Partial<Record<string, readonly unknown[]>> = foreign(name);
  const known = Object.entries(given).filter(
    ([key, value]) =>
      (Object.hasOwn(defaults, key) ||
        (limits.includes(key) && limited(name, given)) ||
        (key === 'sigma_schedule' && readsSchedule(name, value as SigmaSchedule))) &&
      value !== undefined &&
      !strange[key]?.includes(value),
  );
  const config = { ...defaults, ...Object.fromEntries(known) } as SchedulerConfig;
  const option = layoutOptions[given.sigma_schedule as keyof typeof layoutOptions];
  if (option in defaults) config[option] = true; // diffusers' word for the same
  const { use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, algorithm_type } = config;
  const named = !isEDM(name) && config.sigma_schedule;
  if ([use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, named].filter(Boolean).length > 1)
    throw new UserError(
      'the scheduler config sets several of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and sigma_schedule: keep one',
    );
  if (config.solver_order > 3 && name !== 'UniPCMultistepScheduler')
    throw unlike('solver_order', config.solver_order, `1, 2 or 3 for ${name}`);
  const epsilons =
    algorithm_type && !algorithm_type.endsWith('++')
      ? `algorithm_type "${algorithm_type}"`
      : config.predict_x0 !== undefined && !config.predict_x0 && 'predict_x0 false';
  if (epsilons && config.final_sigmas_type === 'zero')
    throw new UserError(
      `the scheduler config's ${epsilons} cannot step to sigma 0: set final_sigmas_type to "sigma_min"`,
    );
  if (isEDM(name)) checkEDM(name, config);
  return config;
}

/** @throws UserError for what EDM's classes have no formula of */
function checkEDM(name: SchedulerClass, config: SchedulerConfig) {
  const { prediction_type, algorithm_type, sigma_min, sigma_max, sigma_schedule = 'karras' } = config;
  if (!takesSchedule(name, sigma_schedule))
    throw unlike('sigma_schedule', sigma_schedule, `"karras" or "exponential" for ${name}`);
  if (prediction_type === 'sample')
    throw unlike('prediction_type', prediction_type, `"epsilon" or "v_prediction" for ${name}`);
  if (algorithm_type && !algorithm_type.endsWith('++'))
    throw unlike('algorithm_type', algorithm_type, `"dpmsolver++" or "sde-dpmsolver++" for ${name}`);
  if (!sigma_min || !sigma_max || sigma_min >= sigma_max)
    throw unlike('sigma_min', sigma_min, `above 0 and below sigma_max, which is ${sigma_max}, for ${name}`);
}

/** A long list is told by its beginning. */
function unlike(key: string, value: unknown, want: string, where = 'scheduler_config.json'): UserError {
  const text = JSON.stringify(value);
  const shown = text.length > 60 ? `${text.slice(0, 60)}...` : text;
  return new UserError(`${where}: ${key} is ${shown}, but must be ${want}`);
}

/**
 * Checks a parsed scheduler_config.json (`where` is what errors call it) and returns the options it gives, with `_class_name` where it
 * names one. Options we do not know are passed over, as diffusers does; a known option with a value we cannot honour is an error.
 */
export function parseSchedulerConfig(
  json: unknown,
  where = 'scheduler_config.json',
): Partial<SchedulerConfig> & { _class_name?: string } {
  if (!isRecord(json))
    throw new UserError(`${where} does not hold a JSON object: take the file from a diffusers folder`);
  const given = json;
  const bad = (key: string, want: string) => unlike(key, given[key], want, where);
  for (const [key, allowed] of Object.entries(choices)) {
    const value = given[key] as string | null | undefined;
    if (value === undefined || allowed.includes(value)) continue;
    const names = allowed.filter((name) => name !== null);
    throw bad(key, `one of ${allowed.join(', ')}${didYouMean(String(value), names)}`);
  }
  for (const [key, [want, holds]] of Object.entries(rules))
    if (given[key] !== undefined && !holds(given[key])) throw bad(key, want);
  const { num_train_timesteps: count = 1000, steps_offset = 0 } = given as Partial<SchedulerConfig>;
  const { trained_betas: betas } = given as Partial<SchedulerConfig>;
  if (betas && betas.length < count)
    throw bad('trained_betas', `a list of ${count} numbers, one for each of num_train_timesteps`);
  if (steps_offset >= count) throw bad('steps_offset', `below num_train_timesteps, which is ${count}`);
  const { _class_name: name } = given;
  if (typeof name === 'string' && ofOtherProcesses.test(name))
    throw new UserError(`${where}: _class_name is ${name}: the model ${otherProcess}`);
  for (const key of unsupported)
    if (given[key]) throw new UserError(`${where}: ${key} is not supported: leave it out`);
  if (given.timestep_type === 'continuous')
    throw new UserError(`${where}: timestep_type "continuous" is not supported: use "discrete"`);
  return given as Partial<SchedulerConfig> & { _class_name?: string };
}
