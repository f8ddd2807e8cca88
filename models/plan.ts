// Which steps a request comes to, and what each is told of its prompts, before anything is loaded: the sampler by the request's name
// over the model's own scheduler config, the part of its schedule that is done, and prompts that change with the calls.
import { UserError } from '../io/errors.ts';
import { isInstructPix2Pix } from './control/instruct_pix2pix.ts';
import type { Request } from './request.ts';
import { isEDM, type SchedulerConfig } from './samplers/config.ts';
import { parseSchedulerConfig } from './samplers/config_checks.ts';
import { createSampler } from './samplers/registry.ts';
import type { Sampler } from './samplers/sampler.ts';
import { strengthOf } from './start.ts';
import { type Scheduled, scheduled } from './text/prompt_schedule.ts';
import type { UNetConfig } from './unet/unet.ts';

/** What of a model decides its steps. */
export interface Planned {
  scheduler: Partial<SchedulerConfig> & { _class_name?: string };
  unetConfig: UNetConfig;
}

/** The sampler that a request names, over the checkpoint's scheduler config. @throws UserError for one of another noise than the model's */
export function samplerFor(
  pipeline: Pick<Planned, 'scheduler'>,
  request: Pick<Request, 'scheduler'>,
): Sampler {
  const { _class_name: own = 'EulerDiscreteScheduler', ...config } = pipeline.scheduler;
  const asked = parseSchedulerConfig(request.scheduler?.config ?? {}, "the request's scheduler.config");
  const sampler = createSampler(request.scheduler?.name ?? own, { ...config, ...asked });
  if (isEDM(own) && !isEDM(sampler.name))
    throw new UserError(
      `the model was trained under EDM's noise (${own}), from which ${sampler.name} draws nothing but noise: leave the scheduler out, or take edm_euler, edm_dpm++2m or edm_dpm++2m_sde`,
    );
  if (isEDM(sampler.name) && !isEDM(own))
    throw new UserError(
      `${sampler.name} draws with models that were trained under EDM's noise, such as Playground v2.5 and CosXL, and this is none: leave the scheduler out, or take another, such as euler`,
    );
  return sampler;
}

/** The steps that a request comes to. @throws UserError where the scheduler cannot do them, or none are left */
export function planOf(pipeline: Planned, request: Request) {
  const sampler = samplerFor(pipeline, request);
  const { base_scheduler: base } = request;
  const { order } = base ? samplerFor(pipeline, { scheduler: base }) : sampler;
  const options = planOptions(request, beginsWith(pipeline, request));
  return { sampler, plan: sampler.plan(request.num_inference_steps, options), baseOrder: order };
}

/**
 * What each call of a plan is told of a request's prompts. Calls count from the first one done, as A1111 counts them, and a refiner's go
 * on from the base's.
 */
export function promptsThrough(
  request: Request,
  { sampler: { order }, plan, baseOrder }: ReturnType<typeof planOf>,
): Scheduled {
  const { base_steps, denoising_start, num_inference_steps } = request;
  const { begin, steps } = plan;
  const first = denoising_start === undefined ? 0 : begin;
  const calls = Array.from({ length: steps }, (_, i) => first + i);
  if (base_steps === undefined) return scheduled(request, { calls: num_inference_steps * order }, calls);
  const pass = { calls: Math.ceil(steps / order) * order, before: base_steps * baseOrder };
  return scheduled(request, pass, calls);
}

/** Whether the picture is begun with, and not edited by a model that sees it. */
const beginsWith = ({ unetConfig }: Pick<Planned, 'unetConfig'>, { image }: Request): boolean =>
  image !== undefined && !isInstructPix2Pix(unetConfig);

function planOptions(request: Request, begun: boolean) {
  return {
    strength: begun && request.denoising_start === undefined ? strengthOf(request) : undefined,
    denoisingStart: request.denoising_start,
    denoisingEnd: request.denoising_end,
    timesteps: request.timesteps,
    sigmas: request.sigmas,
    // Diffusers' pipelines hand every sampler that takes eta a 0, and so overrule TCD's own default of 0.3.
    eta: request.eta ?? 0,
    etaAncestral: request.eta_ancestral,
  };
}
