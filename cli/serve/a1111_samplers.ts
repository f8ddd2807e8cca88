// Which sampler a request in A1111's words means, for its picture and for a second pass: by a name, perhaps with the schedule type behind it
// as before A1111's 1.9, and a schedule type. How much noise its steps get is the request's `eta`, in both.
import { UserError } from '../../io/errors.ts';
import { takesEtaAncestral } from '../../models/samplers/config.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import { readFor } from '../option_values.ts';
import { schedulerOf, scheduleTypes } from '../sample/a1111_samplers.ts';
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

/** @throws UserError for another scale of the noise in each step where its sampler reads it, which its Euler a does not */
function checkNoise(name: string, body: Body): void {
  const sampler = createSampler(name);
  const [noise, eta] = ['s_noise', 'eta'].map((key) => numberOf(body[key] ?? 1, key));
  const isRead = takesEtaAncestral(sampler.name, sampler.config) && !/^EulerA/.test(sampler.name);
  if (noise !== 1 && eta !== 0 && isRead)
    throw new UserError(`s_noise ${noise} is not there; leave s_noise out, or say how much noise by eta`);
}

/** A sampler, and how its noise levels lie. @throws UserError */
function laidOut(body: Body, { key, text: name }: Said, schedule: Said): Settings {
  const type = labelled(schedule.key, schedule.text ?? 'Automatic', scheduleTypes);
  if (name === undefined && type === 'Automatic') return {};
  if (name === undefined)
    throw new UserError(
      `${schedule.key} "${type}" is how a sampler's noise levels lie; give its sampler_name, too`,
    );
  readFor(`${key} "${name}"`, () => checkNoise(name, body));
  const { unheeded: left, ...scheduler } = schedulerOf(name, type);
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
