// The configuration of a sampler, spelled as diffusers writes scheduler_config.json. Every scheduler class there has its
// own set of options and its own defaults.

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
  // k-diffusion's functions, where diffusers has no class.
  sample_dpmpp_2s_ancestral: secondOrder,
  sample_dpmpp_3m_sde: secondOrder,
} satisfies Record<string, Partial<SchedulerConfig>>;

export type SchedulerClass = keyof typeof schedulerDefaults;

/** Whether models that were trained under EDM's noise (Karras et al. 2022) come with this class, which draws with no others. */
export const isEDM = (name: unknown): boolean => typeof name === 'string' && name.startsWith('EDM');

export const schedulerClasses = Object.keys(schedulerDefaults) as SchedulerClass[];

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
  /Ancestral|SDE|^sample_/.test(name) ||
  (algorithm_type === 'sde-dpmsolver++' && name !== 'DPMSolverSinglestepScheduler');
