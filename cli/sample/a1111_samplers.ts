// A1111's names of samplers and of schedule types, its own way to lay out noise levels, in ours and back. stable-diffusion.cpp's are read too.
import { layoutOptions, type SigmaSchedule, sigmaSchedules } from '../../models/samplers/config.ts';
import { isSamplerName, plainSpelling } from '../../models/samplers/registry.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';

/** Its names of our schedulers, where it has them. */
export const samplerLabels: Readonly<Record<string, string>> = {
  EulerDiscreteScheduler: 'Euler',
  EulerAncestralDiscreteScheduler: 'Euler a',
  HeunDiscreteScheduler: 'Heun',
  KDPM2DiscreteScheduler: 'DPM2',
  KDPM2AncestralDiscreteScheduler: 'DPM2 a',
  DPMSolverSDEScheduler: 'DPM++ SDE',
  DPMSolverMultistepScheduler: 'DPM++ 2M',
  sample_dpmpp_3m_sde: 'DPM++ 3M SDE',
  sample_dpmpp_2s_ancestral: 'DPM++ 2S a',
  LMSDiscreteScheduler: 'LMS',
  DDIMScheduler: 'DDIM',
  PNDMScheduler: 'PLMS',
  UniPCMultistepScheduler: 'UniPC',
  LCMScheduler: 'LCM',
};

/** Its schedule types with our names of them. Two of them are others of its own, under further names. */
const typesByLabel: Readonly<Record<string, SigmaSchedule>> = {
  Uniform: 'normal',
  Karras: 'karras',
  Exponential: 'exponential',
  Polyexponential: 'exponential',
  'SGM Uniform': 'sgm_uniform',
  'KL Optimal': 'kl_optimal',
  'Align Your Steps': 'align_your_steps',
  Simple: 'simple',
  Normal: 'normal',
  DDIM: 'ddim_uniform',
  Beta: 'beta',
  Turbo: 'turbo', // Forge's
};

/** The schedule types to offer: what stands for its choice, its own, and ours that it has not, under our names. */
export const scheduleTypes: readonly string[] = [
  'Automatic',
  ...Object.keys(typesByLabel),
  ...sigmaSchedules.filter((each) => !Object.values(typesByLabel).includes(each)),
];

/** The schedule types that its samplers take by themselves ("Automatic"), where it is not Uniform. */
const ownTypes: Readonly<Record<string, string>> = {
  'DPM++ 2M': 'Karras',
  'DPM++ SDE': 'Karras',
  'DPM++ 2M SDE': 'Exponential',
  'DPM++ 2M SDE Heun': 'Exponential',
  'DPM++ 3M SDE': 'Exponential',
  'DPM++ 2S a': 'Karras',
  DPM2: 'Karras',
  'DPM2 a': 'Karras',
};

/** Its samplers that have a schedule type; the others go by the model's timesteps. */
const hasScheduleType = (sampler: string): boolean => /^(euler|heun|lms|dpm)/i.test(sampler);

export function samplerFields({ name, config }: Sampler): string[] {
  const sde = config.algorithm_type?.startsWith('sde') ? ' SDE' : '';
  const heun = sde && config.solver_type === 'heun' ? ' Heun' : '';
  const label = name in samplerLabels ? `${samplerLabels[name]}${sde}${heun}` : name;
  const type = scheduleType(config) ?? (hasScheduleType(label) ? spacingType(config) : undefined);
  return [`Sampler: ${label}`, ...(type ? [`Schedule type: ${type}`] : [])];
}

function scheduleType({ sigma_data, sigma_schedule, ...config }: Sampler['config']): string | undefined {
  if (sigma_data) return undefined; // EDM's are none of its
  const options = Object.keys(layoutOptions) as (keyof typeof layoutOptions)[];
  const schedule = sigma_schedule ?? options.find((each) => config[layoutOptions[each]]);
  return Object.keys(typesByLabel).find((label) => typesByLabel[label] === schedule) ?? schedule;
}

/** The nearest to diffusers' spacings, from which it is a rounding away. */
const spacingType = ({ timestep_spacing }: Sampler['config']): string | undefined =>
  ({ trailing: 'SGM Uniform', linspace: 'Uniform', leading: undefined })[timestep_spacing];

/**
 * The sampler with its layout of noise levels behind it. Its samplers begin at the last training step, as from `linspace`, and where no
 * type is said go evenly down from there; `ours` go by the model's spacing then: SDXL's published scheduler begins lower.
 */
export function schedulerOf(
  text: string | undefined,
  given = '',
  ours = false,
): {
  scheduler?: string;
  timestepSpacing?: 'linspace';
  /** A type that is not there. */
  unheeded?: string;
} {
  const [sampler, type = given] = withType(text);
  if (sampler === undefined || !(ours ? type : hasScheduleType(sampler))) return { scheduler: sampler };
  const label = Object.keys(ownTypes).find((each) => plainSpelling(each) === plainSpelling(sampler));
  const own = type === 'Automatic' && label ? ownTypes[label] : 'Uniform';
  const isSaid = !['', 'Automatic'].includes(type);
  const named = `${sampler} ${isSaid ? type : own}`;
  const isKnown = isSamplerName(named);
  // Before 1.9 the sampler's name ended with the type.
  const isUnheeded = isSaid && !isKnown && !sampler.endsWith(type);
  return {
    scheduler: isKnown ? named : sampler,
    timestepSpacing: 'linspace',
    unheeded: isUnheeded ? type : undefined,
  };
}

/** stable-diffusion.cpp's names of layouts that are other levels here, or none. */
const theirLayouts: Readonly<Record<string, string>> = {
  discrete: 'normal',
  kl_optimal: 'kl_optimal_zero',
  beta: 'beta_timesteps',
};

/** stable-diffusion.cpp puts a layout behind its sampler, where it names one: `euler_a discrete`. */
function withType(text: string | undefined): [sampler: string | undefined, type?: string] {
  const [, sampler, layout] = /^([a-z0-9+_]+) (\w+)$/.exec(text ?? '') ?? [];
  return sampler === undefined ? [text] : [sampler, theirLayouts[layout] ?? layout];
}
