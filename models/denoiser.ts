// The UNet as the sampler sees it: a function of scaled latents and the number of a call, under guidance. What is
// the same for all steps of an image is computed once: the encoded prompts, their keys and values, and what the resnets add for
// each call's time. A pass is a step of the device, which a GPU replays from a recording; under DeepCache there are two, the whole one
// and the shallow one. Where prompts change with the calls, or guidance holds in some of them, all of this is made anew with each change.
import type { Step } from '../engine/capture.ts';
import { withoutSeams } from '../engine/circular.ts';
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import { update } from '../engine/op.ts';
import { concat, copy, embedding, slice } from '../engine/ops/move.ts';
import { cast } from '../engine/ops/unary.ts';
import { scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import { type PlacedControl, partsOf, residualsOf, steeringOf } from './control/multicontrolnet.ts';
import {
  type DenoiserPlan,
  type GuidanceRequest,
  type GuidedModel,
  type Inputs,
  placeInputs,
  predictionsOf,
  type Rows,
  repeatedRows,
} from './denoiser_inputs.ts';
import type { Encoded } from './text/conditioning.ts';
import { ContextCache } from './unet/context_cache.ts';
import { deepCache } from './unet/deepcache.ts';
import { finishing, guide, guidedCalls } from './unet/guidance.ts';
import { type DeepFeature, featuresMade } from './unet/unet.ts';
import { channelsFirst, channelsLast } from './vae/latents.ts';

export interface Denoiser {
  /** The network's output at latents x [n, c, h, w] and the i-th time, guided. */
  predict(x: Tensor, i: number): Tensor;
  /** Prompt text past the tokens that are read. */
  truncated: string[];
  release(): void;
}

/** The step of the i-th call. */
interface Pass {
  at(i: number): Step;
  release(): void;
}

/** Prompts as the network is told them, and what steps share as long as they hold. */
interface Told extends Encoded {
  cache: ContextCache;
}

/** A call as it is under guidance, or without. */
interface Side {
  guided: boolean;
  /** How many predictions a pass makes for each image. */
  predictions: number;
  rows: Rows;
  /** By text. */
  told: readonly Told[];
  deep?: ReturnType<typeof deepCache>;
}

/** What has a part in a call: ControlNets, what T2I-Adapters have given, the prompts, and whether it is guided. */
interface Parts {
  on: readonly PlacedControl[];
  within?: readonly Tensor[];
  told: Told;
  side: Side;
}

/** Encodes the prompts, pictures among them, and places what the steps read. The caller releases it. */
export function openDenoiser(model: GuidedModel, request: GuidanceRequest, plan: DenoiserPlan): Denoiser {
  const { device } = model;
  const { shape, calls } = plan;
  const [images] = shape;
  const [from, to] = plan.guided ? guidedCalls(request, calls) : [0, 0];
  const isCut = plan.guided && (from > 0 || to < calls);
  const inputs = withoutSeams(plan.seamless, () =>
    noGrad(() => scope(() => placeInputs(model, request, plan, isCut))),
  );
  if (request.last) unloadEncoders(model);
  const [guided, unguided] = [sideOf(plan, inputs, true), sideOf(plan, inputs, false)];
  const isGuided = (i: number): boolean => i >= from && i < to;
  const partsAt = (i: number): Parts => {
    const side = isGuided(i) ? guided : unguided;
    return {
      on: partsOf(inputs.placed, i, calls),
      within: i < plan.followedCalls ? side.rows.features : undefined,
      told: side.told[plan.told.at[i]],
      side,
    };
  };
  const pass = passOver(model, request, plan, inputs);
  const passes = passesOf(partsAt, (parts) => stepsOf(device, plan, parts, pass));
  const finish = finishing(request, shape);
  return {
    predict(x, i) {
      update([copy(inputs.latents, x)]);
      inputs.step.set([i]);
      // The next pass writes where this one's output is.
      return passes
        .at(i)
        .run((y) =>
          isGuided(i) && finish ? tensor(finish(y.floats()), shape, { device }) : slice(y, 0, 0, images),
        );
    },
    truncated: inputs.truncated,
    release() {
      passes.release();
      for (const { told, deep } of [guided, unguided]) {
        deep?.release();
        for (const { cache } of told) cache.release();
      }
      for (const t of inputs.kept) t.release();
    },
  };
}

/** Of what the steps do not run. */
function unloadEncoders({ device, text, adapter, ipAdapter }: GuidedModel): void {
  for (const { encoder } of [...text.encoders, ...ipAdapter]) unload(encoder);
  for (const { module } of [...adapter, ...ipAdapter]) unload(module);
  device.memory.trim();
}

function sideOf(plan: DenoiserPlan, inputs: Inputs, guided: boolean): Side {
  const { interval, branch } = plan.caching;
  const rows = inputs.rows[guided ? 'guided' : 'unguided'];
  return {
    ...{ guided, rows, predictions: predictionsOf(plan, guided) },
    told: rows.texts.map((each) => ({ ...each, cache: new ContextCache() })),
    deep: interval > 1 ? deepCache(branch) : undefined,
  };
}

type MakePass = (parts: Parts, deep?: DeepFeature) => Tensor;

/**
 * What the network says at the inputs' latents and step, guided, [n, c, h, w] in float32; in parts where the host is to finish it. The
 * layout changes, types are cast and the prediction is guided on the device, in the recording: it would wait for the host.
 */
function passOver(
  { dtype, unet }: GuidedModel,
  request: GuidanceRequest,
  { shape: [images], pag, imageGuidanceScale }: DenoiserPlan,
  { latents, step, pagScales }: Inputs,
): MakePass {
  const { guidance_scale, guidance_rescale = 0, adaptive_projected_guidance: apg, freeu } = request;
  const perturbed = pag && { layers: pag.layers, rows: images };
  return ({ on, within, told: { pooled, ...ofTexts }, side: { guided, predictions, rows } }, deep) => {
    const { timeIds, guidance, seen, tokens } = rows;
    const times = { times: rows.times, step };
    const conditioning = {
      timeIds,
      guidance,
      images: tokens,
      steering: steeringOf(on),
      perturbed,
      freeu,
      ...ofTexts,
      textEmbeds: pooled,
    };
    const sample = repeatedRows(cast(channelsLast(latents), dtype), predictions);
    const question = { sample, times, conditioning, count: featuresMade(deep) };
    const residuals = {
      ...residualsOf(on, question, guided),
      down_intrablock_additional_residuals: within,
    };
    const all = seen ? concat([sample, seen], 3) : sample; // ControlNets see the latents alone
    const y = cast(channelsFirst(unet(all, times, conditioning, residuals, deep)), 'float32');
    if (predictions === 1) return y;
    return guide(y, images, {
      guidanceScale: guided ? guidance_scale : undefined,
      imageGuidanceScale: guided ? imageGuidanceScale : undefined,
      textWeights: request.prompt_weights,
      pagScale: pag && embedding(step, pagScales),
      withText: guided && guidance_rescale > 0,
      apart: guided && apg !== undefined,
    });
  };
}

/** A pass with these parts as steps of the device: under DeepCache the whole one and the shallow one, which take turns. */
function stepsOf(device: Device, { caching, seamless }: DenoiserPlan, parts: Parts, pass: MakePass): Pass {
  const { deep } = parts.side;
  const reserve = deep && device.memory.openReserve();
  const [whole, shallow] = [deep?.whole, deep?.shallow].map((each) =>
    device.step(() => noGrad(() => withoutSeams(seamless, () => pass(parts, each))), reserve),
  );
  return {
    at: (i) => (i % caching.interval === 0 || !deep?.shallow.kept ? whole : shallow),
    release() {
      for (const each of [whole, shallow]) each.release();
      reserve?.release();
    },
  };
}

const isSame = (a: Parts, b: Parts): boolean =>
  a.within === b.within &&
  a.told === b.told &&
  a.on.length === b.on.length &&
  a.on.every(({ picture, scale }, k) => picture === b.on[k].picture && scale === b.on[k].scale);

/** Of each call the step. A recording is of one set of parts, and goes when the set changes: it hardly comes back. */
function passesOf(partsAt: (i: number) => Parts, passUnder: (parts: Parts) => Pass): Pass {
  let parts = partsAt(0);
  let pass = passUnder(parts);
  return {
    at(i) {
      const now = partsAt(i);
      if (!isSame(now, parts)) {
        pass.release();
        if (now.told !== parts.told) parts.told.cache.release();
        if (now.side !== parts.side) parts.side.deep?.release();
        parts = now;
        pass = passUnder(parts);
      }
      return pass.at(i);
    },
    release: () => pass.release(),
  };
}
