// What a scheduler_config.json may say, and one class's configuration made of it. An option that the class does not have is dropped, as
// diffusers' `Class.from_config(other.config)` does, so one file serves every sampler.
import { didYouMean, UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import { flag, isPositive, listOf, type Rule, whole } from '../checkpoint/config_values.ts';
import {
  isEDM,
  layoutOptions,
  type SchedulerClass,
  type SchedulerConfig,
  type SigmaSchedule,
  schedulerDefaults,
  sigmaSchedules,
  takesSchedule,
} from './config.ts';

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
