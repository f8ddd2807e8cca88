// Which sampler a request in A1111's words means, for its picture and for a second pass: by a name, a schedule type, and the noise that each
// step gets. There is all of that noise here or none: with A1111's `eta` of 0 an ancestral sampler is the plain one.
import { UserError } from '../../io/errors.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import { readFor } from '../option_values.ts';
import { schedulerOf, scheduleTypes } from '../sample/a1111.ts';
import { type Body, labelled, numberOf, said } from './fields.ts';
import type { Settings } from './messages.ts';

/** A text of a request, by the key that says it. */
interface Said {
  key: string;
  text?: string;
}

/** What the first of these keys says that says something. */
const firstSaid = (body: Body, ...keys: readonly string[]): Said => {
  const key = keys.find((each) => said(body, each)) ?? keys[0];
  return { key, text: said(body, key) };
};

/** What draws without its noise as another. */
const noiseless: Readonly<Record<string, string>> = {
  EulerAncestralDiscreteScheduler: 'Euler',
  KDPM2AncestralDiscreteScheduler: 'DPM2',
};

/** The sampler of that name with as much noise in each step as a request wants. @throws UserError for other amounts than there are */
function noised(name: string, body: Body): string {
  const { name: kind, config } = createSampler(name);
  const isSDE = kind === 'DPMSolverSDEScheduler' || config.algorithm_type?.startsWith('sde');
  if (!isSDE && !(kind in noiseless)) return name;
  const asked = (key: string) => numberOf(body[key] ?? 1, key);
  const [eta, noise] = [asked('eta'), asked('s_noise')];
  if (eta === 0 && kind in noiseless) {
    const [, layout = ''] = /^.*?(?:[\s_]?a|ancestral)(?:[\s_](.*))?$/i.exec(name) ?? []; // "DPM2 a Karras", as before 1.9
    return `${noiseless[kind]} ${layout}`.trim();
  }
  if (eta !== 1)
    throw new UserError(`eta ${eta} is not there; leave eta out, or take ${isSDE ? 'DPM++ 2M' : 'eta 0'}`);
  // Its Euler a does not read s_noise.
  if (noise !== 1 && kind !== 'EulerAncestralDiscreteScheduler')
    throw new UserError(`s_noise ${noise} is not there; leave s_noise out`);
  return name;
}

/** A sampler, and how its noise levels lie. @throws UserError */
function laidOut(body: Body, { key, text: name }: Said, schedule: Said): Settings {
  const type = labelled(schedule.key, schedule.text ?? 'Automatic', scheduleTypes);
  if (name === undefined && type === 'Automatic') return {};
  if (name === undefined)
    throw new UserError(
      `${schedule.key} "${type}" is how a sampler's noise levels lie; give its sampler_name, too`,
    );
  const sampler = readFor(`${key} "${name}"`, () => noised(name, body));
  const { unheeded: left, ...scheduler } = schedulerOf(sampler, type);
  if (left) throw new UserError(`${schedule.key} "${left}" is not there for ${name}; take Automatic`);
  return scheduler;
}

const samplerKeys = ['sampler_name', 'sampler_index'];

export const samplerOf = (body: Body): Settings =>
  laidOut(body, firstSaid(body, ...samplerKeys), firstSaid(body, 'scheduler'));

/** That of a second pass which has another, or lays its noise levels out otherwise. */
export function hiresSamplerOf(body: Body): Settings {
  const own = (key: string, same: string, ...others: readonly string[]): Said =>
    body[key] === same || said(body, key) === undefined ? firstSaid(body, ...others) : firstSaid(body, key);
  const { scheduler, timestepSpacing } = laidOut(
    body,
    own('hr_sampler_name', 'Use same sampler', ...samplerKeys),
    { ...own('hr_scheduler', 'Use same scheduler', 'scheduler'), key: 'hr_scheduler' },
  );
  if (scheduler === samplerOf(body).scheduler) return {};
  return { hiresScheduler: scheduler, hiresTimestepSpacing: timestepSpacing };
}
