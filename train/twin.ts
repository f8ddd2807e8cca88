// Twins: pipelines of a run's shape with other weights in what is trained and in what a pass reads beside it. Previews of the
// moving averages are drawn by them, and further devices train on them. Adapters are put on here, as each twin has its own; a
// ControlNet (controlnet.ts) is put beside the UNet.
import { type AnyModule, namedParameters, type Parameter, unload } from '../engine/module.ts';
import { built } from '../engine/scope.ts';
import { UserError } from '../io/errors.ts';
import { addLora, isLarge, type LoraSizes, sizesFor, type Uniforms } from '../models/adapters.ts';
import type { Json } from '../models/checkpoint.ts';
import { parseTextConfig, textEncoder } from '../models/clip.ts';
import type { LoraTargets } from '../models/lora_file.ts';
import { startFromLora } from '../models/lora_start.ts';
import { peftEntries } from '../models/peft_config.ts';
import type { Pipeline } from '../models/pipeline.ts';
import { unet } from '../models/unet.ts';
import { keyOf } from './data/source.ts';
import { draws } from './draws.ts';
import type { Run } from './run.ts';
import { type Component, type Substitute, twin } from './task.ts';

/** What a run may train of a pipeline, in the order of its text encoders; each with the weights that the model was loaded with. */
export interface Networks {
  net: Component;
  texts: readonly Component[];
}

/** What a run trains on a pipeline or beside it, of which the model itself has nothing. */
export interface Added {
  component: Component;
  /** The twin of a pipeline with the same on it, and its parameters by the component's keys. They are to be filled. */
  putOn(twin: Pipeline): { other: Pipeline; parameters: ReadonlyMap<string, Parameter> };
}

/** What new weights are drawn from, each by its name. */
export const uniformsOf =
  (seed: number): Uniforms =>
  (name, count) => {
    const source = draws(seed, 0, keyOf(name), 'weights');
    return Float32Array.from({ length: count }, () => source.uniform());
  };

/** LoRA adapters on the loaded pipeline: peft's keys, and its config in the file's metadata as diffusers reads it. */
export function adapters(run: Run, pipeline: Pipeline, networks: Networks, resumed: boolean): Added {
  const { lora } = run;
  const parameters = adapt(run, pipeline, networks, uniformsOf(run.seed));
  if ((lora.conv_rank || lora.conv_alpha) && ![...parameters.values()].some(({ shape }) => isLarge(shape)))
    throw new UserError(
      'lora.conv_rank and lora.conv_alpha are of convolutions larger than 1x1, and lora.targets names none; add conv1, conv2 and conv to it, or leave them out',
    );
  // A resumed run has numbers of its own, and the file may be gone.
  if (lora.network_weights && !resumed)
    startFromLora(targetsOf(run, pipeline, networks), lora.network_weights, parameters, lora);
  const config = placesOf(run, pipeline, networks).map(({ name, targets }) =>
    peftEntries(name, layersOf(name, parameters, lora), lora, { target_modules: targets }),
  );
  return {
    component: {
      name: 'lora',
      metadata: { lora_adapter_metadata: JSON.stringify(Object.assign({}, ...config)) },
      parameters,
      trained: [...parameters.keys()],
    },
    putOn: (other) => ({
      other,
      parameters: adapt(run, other, networks, (_, count) => new Float32Array(count)),
    }),
  };
}

/** A network's adapted layers with their ranks and alphas. A has the kernel of the layer that it is put on. */
const layersOf = (network: string, parameters: ReadonlyMap<string, Parameter>, sizes: LoraSizes) =>
  [...parameters].flatMap(([key, { shape }]) => {
    const path = key.startsWith(`${network}.`) && /^[^.]+\.(.*)\.lora_A\.weight$/.exec(key)?.[1];
    return path ? [{ path, ...sizesFor(shape, sizes) }] : [];
  });

interface Place {
  /** The network's component. */
  name: string;
  root: AnyModule;
  targets: readonly string[];
  option: string;
}

/** The networks that a run puts adapters on. */
function placesOf({ lora, train }: Run, { unet: root, text }: Pipeline, { texts }: Networks): Place[] {
  const encoders = text.encoders.map(({ encoder }, i) => ({
    name: texts[i].name,
    root: encoder,
    targets: lora.text_encoder_targets,
    option: 'lora.text_encoder_targets',
  }));
  const own = { name: 'unet', root, targets: lora.targets, option: 'lora.targets' };
  return train.text_encoders ? [own, ...encoders] : [own];
}

/** The same as a LoRA file's names are matched against. */
const targetsOf = (run: Run, pipeline: Pipeline, networks: Networks): LoraTargets => ({
  unetConfig: pipeline.unetConfig,
  ...(Object.fromEntries(placesOf(run, pipeline, networks).map(({ name, root }) => [name, root])) as {
    unet: AnyModule;
  }),
});

/** Puts adapters on a pipeline's networks; gives their parameters by `network.key`. */
function adapt(run: Run, pipeline: Pipeline, networks: Networks, uniforms: Uniforms): Map<string, Parameter> {
  const added = placesOf(run, pipeline, networks).flatMap(({ name, root, targets, option }) => {
    // Layers of two encoders have the same names, but not the same numbers to begin with.
    const drawn: Uniforms = (key, count) => uniforms(name === 'unet' ? key : `${name}.${key}`, count);
    const parameters = addLora(root, { ...run.lora, targets }, drawn, option);
    return [...parameters].map(([key, parameter]) => [`${name}.${key}`, parameter] as const);
  });
  return new Map(added);
}

interface Twin {
  other: Pipeline;
  weights: ReadonlyMap<string, Parameter>;
}

/** The pipeline with other weights in the UNet and in what else is trained, and these by `component.key`. */
export const twinPipeline = (...parts: Parameters<typeof makeTwin>): Twin => built(() => makeTwin(...parts));

function makeTwin(
  run: Run,
  pipeline: Pipeline,
  networks: Networks,
  added: Added | undefined,
  substitute: Substitute,
): Twin {
  const { gradient_checkpointing: gradientCheckpointing, text_encoders } = run.train;
  const weights = new Map<string, Parameter>();
  const replace = (from: Component, to: ReadonlyMap<string, Parameter>) => {
    for (const [name, parameter] of twin(from, to, substitute)) weights.set(name, parameter);
  };
  const { net, texts } = networks;
  const own = unet(pipeline.unetConfig, { gradientCheckpointing });
  replace(net, namedParameters(own));
  const encoders = pipeline.text.encoders.map((pair, i) => {
    if (!text_encoders) return pair;
    const encoder = textEncoder(parseTextConfig(texts[i].config as Json));
    replace(texts[i], namedParameters(encoder));
    return { ...pair, encoder };
  });
  const model = { ...pipeline, unet: own, text: { ...pipeline.text, encoders } };
  if (!added) return { other: model, weights };
  const { other, parameters } = added.putOn(model);
  replace(added.component, parameters);
  return { other, weights };
}

export function releaseTwin(twin: Pipeline, owner: Pipeline): void {
  if (twin === owner) return;
  unload(twin.unet);
  twin.text.encoders.forEach(({ encoder }, i) => {
    if (encoder !== owner.text.encoders[i].encoder) unload(encoder);
  });
  for (const net of twin.controlnet) if (!owner.controlnet.includes(net)) unload(net);
}
