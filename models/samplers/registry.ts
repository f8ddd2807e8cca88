// Samplers by name: diffusers' class names, k-diffusion's of what that has not, and the short names people use for them.
import { didYouMean, UserError } from '../../io/errors.ts';
import {
  isEDM,
  layoutOptions,
  type SchedulerClass,
  type SchedulerConfig,
  type SigmaSchedule,
  schedulerClasses,
  sigmaSchedules,
  takesSchedule,
} from './config.ts';
import { completeConfig } from './config_checks.ts';
import { ddim } from './ddim.ts';
import { ddpm } from './ddpm.ts';
import { deis } from './deis.ts';
import { dpmMultistep } from './dpm_multistep.ts';
import { dpmSde } from './dpm_sde.ts';
import { dpmSinglestep } from './dpm_singlestep.ts';
import { dpmpp3mSde } from './dpmpp_3m_sde.ts';
import { edmDpmMultistep, edmEuler } from './edm.ts';
import { euler } from './euler.ts';
import { eulerAncestral } from './euler_ancestral.ts';
import { heun } from './heun.ts';
import { dpmpp2sAncestral, kdpm2, kdpm2Ancestral } from './kdpm2.ts';
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
  sample_dpmpp_2s_ancestral: dpmpp2sAncestral,
  sample_dpmpp_3m_sde: dpmpp3mSde,
};

interface Choice {
  name: SchedulerClass;
  config?: Partial<SchedulerConfig>;
}

const sde: Partial<SchedulerConfig> = { algorithm_type: 'sde-dpmsolver++' };

const shortNames: Record<string, Choice> = {
  euler: { name: 'EulerDiscreteScheduler' },
  euler_a: { name: 'EulerAncestralDiscreteScheduler' },
  ddim: { name: 'DDIMScheduler' },
  ddpm: { name: 'DDPMScheduler' },
  'dpm++2m': { name: 'DPMSolverMultistepScheduler' },
  'dpm++2m_sde': { name: 'DPMSolverMultistepScheduler', config: sde },
  'dpm++2m_sde_heun': { name: 'DPMSolverMultistepScheduler', config: { ...sde, solver_type: 'heun' } },
  'dpm++3m_sde': { name: 'sample_dpmpp_3m_sde' },
  'dpm++2s': { name: 'DPMSolverSinglestepScheduler' },
  'dpm++2s_a': { name: 'sample_dpmpp_2s_ancestral' },
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

/** A1111's further names of schedules. */
const alike: Readonly<Record<string, SigmaSchedule>> = {
  uniform: 'normal',
  polyexponential: 'exponential', // with its rho, 1
  ddim: 'ddim_uniform',
};

/** How the noise levels are laid out, by what may follow a scheduler's name. */
const schedules: Readonly<Record<string, SigmaSchedule>> = {
  ...Object.fromEntries(sigmaSchedules.map((name) => [name, name])),
  ...alike,
};

/** One layout in place of what a model's config has: they exclude each other. */
export const layoutOf = (layout: SigmaSchedule): Partial<SchedulerConfig> => ({
  ...Object.fromEntries(Object.entries(layoutOptions).map(([each, key]) => [key, each === layout])),
  sigma_schedule: layout,
});

/** The short names, with nothing behind them. */
export const shortSchedulerNames: readonly string[] = Object.keys(shortNames);

/** The names to offer: short ones first, plain and with each layout that they take, then the classes' names. */
export const samplerNames: readonly string[] = [
  ...shortSchedulerNames,
  ...Object.entries(shortNames).flatMap(([short, { name }]) =>
    sigmaSchedules.filter((each) => takesSchedule(name, each)).map((each) => `${short}_${each}`),
  ),
  ...schedulerClasses,
];

/** The scheduler of a plain spelling without a layout, classes first. */
function choiceOf(wanted: string): Choice | undefined {
  const className = schedulerClasses.find((known) => plainSpelling(known) === wanted);
  const short = shortSchedulerNames.find((known) => plainSpelling(known) === wanted);
  return className ? { name: className } : short ? shortNames[short] : undefined;
}

/** What a name says: a scheduler, and the layout behind it, if any, which that scheduler may not take. */
function readName(name: string): { choice: Choice; layout?: SigmaSchedule } | undefined {
  const wanted = plainSpelling(name);
  const plain = choiceOf(wanted);
  if (plain) return { choice: plain };
  for (const [each, layout] of Object.entries(schedules)) {
    const end = plainSpelling(each);
    const choice = wanted.endsWith(end) && choiceOf(wanted.slice(0, -end.length));
    if (choice) return { choice, layout };
  }
  return undefined;
}

/** Whether `createSampler` knows the name, with the layout in it. */
export function isSamplerName(name: string): boolean {
  const { choice, layout } = readName(name) ?? {};
  return choice !== undefined && (layout === undefined || takesSchedule(choice.name, layout));
}

/**
 * The sampler of that name, in any common spelling ('DPM++ 2M Karras', 'dpmpp_2m_karras'). `config` is what a
 * scheduler_config.json gives; a name's own settings (layout of sigmas, SDE) override it.
 * @throws UserError for an unknown name, with the nearest known one, and for a layout that the scheduler has not
 */
export function createSampler(name: string, config: Partial<SchedulerConfig> = {}): Sampler {
  const read = readName(name);
  if (!read) throw new UserError(`unknown scheduler "${name}"${hintFor(name)}`);
  const { choice, layout } = read;
  if (layout && !takesSchedule(choice.name, layout)) throw noSuchLayout(name, choice.name, layout);
  const complete = completeConfig(choice.name, {
    ...config,
    ...choice.config,
    ...(layout && layoutOf(layout)),
  });
  return makeSampler(choice.name, complete, methods[choice.name](complete));
}

/** What may be meant by a name that is none. */
function hintFor(name: string): string {
  const layout = Object.keys(schedules).find((each) => plainSpelling(each) === plainSpelling(name));
  if (layout)
    return `, but a layout of noise levels; put it behind a scheduler's name, as in dpm++2m_${layout}`;
  const ofComfyUI = name.replace(/_gpu(?![a-z0-9])/i, '');
  if (readName(ofComfyUI))
    return `: where its noise comes from is no part of a name here; take ${ofComfyUI}, with --rng cuda for a GPU's`;
  return didYouMean(name, samplerNames) || `: choose one of ${shortSchedulerNames.join(', ')}`;
}

const noSuchLayout = (name: string, scheduler: SchedulerClass, layout: SigmaSchedule): UserError =>
  new UserError(
    isEDM(scheduler)
      ? `scheduler "${name}": models under EDM's noise have no timesteps, from which ${layout} lays out its levels: take karras or exponential`
      : `scheduler "${name}": ${scheduler} goes by timesteps and has no noise levels to lay out as ${layout}: leave that out, or take another, such as euler_${layout}`,
  );

/** Without case, spaces, punctuation, k-diffusion's `k_` and `Scheduler`; "++" and "pp" are one, "ancestral" is "a". */
export function plainSpelling(name: string): string {
  return name
    .toLowerCase()
    .replaceAll('++', 'pp')
    .replace(/^k_/, '')
    .replace('scheduler', '')
    .replace('ancestral', 'a')
    .replace(/[^a-z0-9]/g, '');
}
