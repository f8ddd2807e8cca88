// What of the loaded model a run trains, or what it puts on it, beside it or into it: weights of the UNet and the text encoders
// themselves, adapters (adapters.ts), a ControlNet, T2I- or IP-Adapter (controls/), or a token's vectors (textual_inversion.ts).
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { textParts } from '../../models/load_options.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { withControlNet } from '../controls/controlnet.ts';
import { type IPAdapterBegin, withIPAdapter } from '../controls/ip_adapter.ts';
import { withT2IAdapter } from '../controls/t2i_adapter.ts';
import { adapters } from '../parts/adapters.ts';
import type { Added, Networks } from '../parts/added.ts';
import { blockRates, textEncoderRate } from '../parts/rates.ts';
import { withToken } from '../parts/textual_inversion.ts';
import { type Component, component } from '../passes/task.ts';
import type { Pictures } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';

/** Where a run's weights begin. */
export interface Sources {
  source: ModelSource;
  vaeSource: ModelSource;
  /** Another UNet than the model's for the teacher of a method that asks one. */
  teacherSource?: ModelSource;
  /** A ControlNet or T2I-Adapter to go on with. */
  controlSource?: ModelSource;
  /** What an IP-Adapter is made from. */
  ipAdapter?: IPAdapterBegin;
  /** The checkpoint that the run goes on from, if it does. */
  checkpoint?: string;
}

export interface TrainedParts {
  /** With what the run puts on it. */
  pipeline: Pipeline;
  /** The model alone. */
  networks: Networks;
  /** What is trained, and saved. */
  components: readonly Component[];
  added?: Added;
}

/** @throws UserError for what does not fit the model */
export function trainedParts(
  run: Run,
  pipeline: Pipeline,
  sources: Sources,
  { samples }: Pictures,
): TrainedParts {
  const { source, controlSource, ipAdapter, checkpoint } = sources;
  const { parts, text_encoders, target } = run.train;
  const { encoders } = pipeline.text;
  const names = textParts(source);
  const lr = blockRates(run, pipeline.unetConfig);
  const isTrained = (key: string) =>
    lr(key) !== 0 && (parts.length === 0 || parts.some((part) => key.includes(part)));
  const net = component('unet', source.config('unet'), pipeline.unet, { isTrained, lr });
  const texts = encoders.map(({ encoder }, i) =>
    component(names[i], source.config(names[i]), encoder, { lr: () => textEncoderRate(run, names[i]) }),
  );
  const networks = { net, texts };
  if (target === 'unet') {
    const along = text_encoders ? texts.filter(({ name }) => textEncoderRate(run, name) !== 0) : [];
    return { pipeline, networks, components: [net, ...along] };
  }
  // Made last: what is listed above is the model alone.
  if (target === 'controlnet' || target === 't2i_adapter') {
    const put = target === 'controlnet' ? withControlNet : withT2IAdapter;
    const { other, added } = put(run, pipeline, source, controlSource);
    return { pipeline: other, networks, added, components: [added.component] };
  }
  if (ipAdapter) {
    const { other, added } = withIPAdapter(run, pipeline, source, ipAdapter);
    return { pipeline: other, networks, added, components: [added.component] };
  }
  const resumed = checkpoint !== undefined;
  const added =
    target === 'lora'
      ? adapters(run, pipeline, networks, resumed)
      : withToken(run, pipeline, samples, resumed);
  return { pipeline, networks, added, components: [added.component] };
}
