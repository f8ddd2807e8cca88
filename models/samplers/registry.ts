// Samplers by name: diffusers' class names, and the short names people use for them.
import { didYouMean, UserError } from '../../io/errors.ts';
import {
  completeConfig,
  isEDM,
  type SchedulerClass,
  type SchedulerConfig,
  schedulerClasses,
  schedulerDefaults,
} from './config.ts';
import { ddim } from './ddim.ts';
import { ddpm } from './ddpm.ts';
import { deis } from './deis.ts';
import { dpmMultistep } from './dpm_multistep.ts';
import { dpmSde } from './dpm_sde.ts';
import { dpmSinglestep } from './dpm_singlestep.ts';
import { edmDpmMultistep, edmEuler } from './edm.ts';
import { euler } from './euler.ts';
import { eulerAncestral } from './euler_ancestral.ts';
import { heun } from './heun.ts';
import { kdpm2, kdpm2Ancestral } from './kdpm2.ts';
import { lcm } from './lcm.ts';
import { lms } from './lms.ts';
import { pndm } from './pndm.ts';
import { type Method, makeSampler, type Sampler } from './sampler.ts';
import { tcd } from './tcd.ts';
import { unipc } from './unipc.ts';

const methods: Record<SchedulerClass, (config: SchedulerConfig) => Method> = {
  EulerDiscreteScheduler: euler,
  EulerAncestralDiscreteScheduler: eulerAncestral,
  HeunDiscreteScheduler: heun,
  KDPM2DiscreteScheduler: kdpm2,
  KDPM2AncestralDiscreteScheduler: kdpm2Ancestral,
  DPMSolverSDEScheduler: dpmSde,
  LMSDiscreteScheduler: lms,
  DDIMScheduler: ddim,
  DDPMScheduler: ddpm,
  PNDMScheduler: pndm,
  DPMSolverMultistepScheduler: dpmMultistep,
  DPMSolverSinglestepScheduler: dpmSinglestep,
  DEISMultistepScheduler: deis,
  UniPCMultistepScheduler: unipc,
  LCMScheduler: lcm,
  TCDScheduler: tcd,
  EDMEulerScheduler: edmEuler,
  EDMDPMSolverMultistepScheduler: edmDpmMultistep,
};

interface Choice {
  name: SchedulerClass;
  config?: Partial<SchedulerConfig>;
}

const sde: Partial<SchedulerConfig> = { algorithm_type: 'sde-dpmsolver++' };

/** What may follow a short name where its class has such options: how its noise levels are laid out. */
const layouts = {
  karras: 'use_karras_sigmas',
  exponential: 'use_exponential_sigmas',
  beta: 'use_beta_sigmas',
} as const;

const shortNames: Record<string, Choice> = {
  euler: { name: 'EulerDiscreteScheduler' },
  euler_a: { name: 'EulerAncestralDiscreteScheduler' },
  ddim: { name: 'DDIMScheduler' },
  ddpm: { name: 'DDPMScheduler' },
  'dpm++2m': { name: 'DPMSolverMultistepScheduler' },
  'dpm++2m_sde': { name: 'DPMSolverMultistepScheduler', config: sde },
  'dpm++2m_sde_heun': { name: 'DPMSolverMultistepScheduler', config: { ...sde, solver_type: 'heun' } },
  'dpm++2s': { name: 'DPMSolverSinglestepScheduler' },
  'dpm++sde': { name: 'DPMSolverSDEScheduler' },
  dpm2: { name: 'KDPM2DiscreteScheduler' },
  dpm2_a: { name: 'KDPM2AncestralDiscreteScheduler' },
  heun: { name: 'HeunDiscreteScheduler' },
  lms: { name: 'LMSDiscreteScheduler' },
  pndm: { name: 'PNDMScheduler' },
  plms: { name: 'PNDMScheduler', config: { skip_prk_steps: true } },
  unipc: { name: 'UniPCMultistepScheduler' },
  deis: { name: 'DEISMultistepScheduler' },
  lcm: { name: 'LCMScheduler' },
  tcd: { name: 'TCDScheduler' },
  edm_euler: { name: 'EDMEulerScheduler' },
  'edm_dpm++2m': { name: 'EDMDPMSolverMultistepScheduler' },
  'edm_dpm++2m_sde': { name: 'EDMDPMSolverMultistepScheduler', config: sde },
};

/** One layout in place of what a model's config has: they exclude each other. */
export const layoutOf = (layout: keyof typeof layouts): Partial<SchedulerConfig> => ({
  ...Object.fromEntries(Object.entries(layouts).map(([each, key]) => [key, each === layout])),
  ...(layout !== 'beta' && { sigma_schedule: layout }), // EDM's word for the same
});

const hasLayout = (name: SchedulerClass, layout: keyof typeof layouts): boolean =>
  layouts[layout] in schedulerDefaults[name] || (isEDM(name) && layout !== 'beta');

const laidOut = Object.entries(shortNames).flatMap(([short, { name, config }]) =>
  (Object.keys(layouts) as (keyof typeof layouts)[])
    .filter((layout) => hasLayout(name, layout))
    .map((layout): [string, Choice] => [
      `${short}_${layout}`,
      { name, config: { ...config, ...layoutOf(layout) } },
    ]),
);

const choices: Record<string, Choice> = { ...shortNames, ...Object.fromEntries(laidOut) };

/** The short names, with nothing behind them. */
export const shortSchedulerNames: readonly string[] = Object.keys(shortNames);

/** The names to offer: short ones first, then diffusers' class names. */
export const samplerNames: readonly string[] = [...Object.keys(choices), ...schedulerClasses];

/**
 * The sampler of that name, in any common spelling ('DPM++ 2M Karras', 'dpmpp_2m_karras'). `config` is what a
 * scheduler_config.json gives; a short name's own settings (layout of sigmas, SDE) override it.
 * @throws UserError for an unknown name, with the nearest known one
 */
export function createSampler(name: string, config: Partial<SchedulerConfig> = {}): Sampler {
  const wanted = plainSpelling(name);
  const className = schedulerClasses.find((known) => plainSpelling(known) === wanted);
  const short = Object.keys(choices).find((known) => plainSpelling(known) === wanted);
  const choice = className ? { name: className, config: {} } : short ? choices[short] : undefined;
  if (!choice) {
    const hint = Object.hasOwn(layouts, wanted)
      ? `, but a layout of noise levels; put it behind a scheduler's name, as in dpm++2m_${wanted}`
      : didYouMean(name, samplerNames) || `: choose one of ${shortSchedulerNames.join(', ')}`;
    throw new UserError(`unknown scheduler "${name}"${hint}`);
  }
  const complete = completeConfig(choice.name, { ...config, ...choice.config });
  return makeSampler(choice.name, complete, methods[choice.name](complete));
}

/** Without case, spaces, punctuation, k-diffusion's `k_` and `Scheduler`; "++" and "pp" are one, "ancestral" is "a". */
export function plainSpelling(name: string): string {
  return name
    .toLowerCase()
    .replaceAll('++', 'pp')
    .replace(/^k_/, '')
    .replace(/scheduler$/, '')
    .replace(/ancestral$/, 'a')
    .replace(/[^a-z0-9]/g, '');
}
