// Samplers by name: diffusers' class names, and the short names people use for them.
import { UserError, didYouMean } from '../../io/errors.ts';
import { type SchedulerClass, type SchedulerConfig, completeConfig, schedulerClasses } from './config.ts';
import { euler } from './euler.ts';
import { eulerAncestral } from './euler_ancestral.ts';
import { type Method, type Sampler, makeSampler } from './sampler.ts';

const methods: Partial<Record<SchedulerClass, (config: SchedulerConfig) => Method>> = {
  EulerDiscreteScheduler: euler,
  EulerAncestralDiscreteScheduler: eulerAncestral,
};

interface ShortName {
  name: SchedulerClass;
  config?: Partial<SchedulerConfig>;
}

const shortNames: Record<string, ShortName> = {
  euler: { name: 'EulerDiscreteScheduler' },
  euler_a: { name: 'EulerAncestralDiscreteScheduler' },
};

/** The names to offer: short ones first, then diffusers' class names. */
export const samplerNames: readonly string[] = [...Object.keys(shortNames), ...schedulerClasses];

/**
 * The sampler of that name, in any common spelling ('DPM++ 2M Karras', 'dpmpp_2m_karras'). `config` is what a
 * scheduler_config.json gives; a short name's own settings (Karras sigmas, SDE) override it.
 */
export function createSampler(name: string, config: Partial<SchedulerConfig> = {}): Sampler {
  const found = schedulerClasses.find((known) => known === name);
  const short: ShortName | undefined = found ? { name: found } : shortNames[name];
  if (!short) throw new UserError(`unknown sampler "${name}"${didYouMean(name, samplerNames)}`);
  const complete = completeConfig(short.name, { ...config, ...short.config });
  return makeSampler(short.name, complete, methods[short.name]!(complete));
}
