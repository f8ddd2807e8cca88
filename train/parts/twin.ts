// Twins: pipelines of a run's shape with other weights in what is trained and in what a pass reads beside it. Previews of the
// moving averages are drawn by them, and further devices train on them.
import { type AnyModule, namedParameters, type Parameter, placeOf, unload } from '../../engine/module.ts';
import { built } from '../../engine/scope.ts';
import type { Json } from '../../models/checkpoint/checkpoint.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { parseTextConfig, textEncoder } from '../../models/text/clip.ts';
import { unet } from '../../models/unet/unet.ts';
import { type Component, type Substitute, twin } from '../passes/task.ts';
import { type Run, trainsTexts } from '../run/run.ts';
import type { Added, Networks } from './added.ts';

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
  const { gradient_checkpointing: gradientCheckpointing } = run.train;
  const weights = new Map<string, Parameter>();
  const replace = (from: Component, to: ReadonlyMap<string, Parameter>) => {
    for (const [name, parameter] of twin(from, to, substitute)) weights.set(name, parameter);
  };
  const { net, texts } = networks;
  const own = unet(pipeline.unetConfig, { gradientCheckpointing });
  replace(net, namedParameters(own));
  // Encoders in which nothing is trained are shared, but on another device, where a pass that runs them has them beside the rest.
  const isElsewhere = placeOf(own).device !== pipeline.device;
  const encoders = pipeline.text.encoders.map((pair, i) => {
    const runs = trainsTexts(run) || (isElsewhere && isLoaded(pair.encoder));
    if (!runs) return pair;
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

const isLoaded = (network: AnyModule): boolean =>
  [...namedParameters(network).values()].every(({ loaded }) => loaded);

export function releaseTwin(twin: Pipeline, owner: Pipeline): void {
  if (twin === owner) return;
  unload(twin.unet);
  twin.text.encoders.forEach(({ encoder }, i) => {
    if (encoder !== owner.text.encoders[i].encoder) unload(encoder);
  });
  const own = netsBeside(owner);
  for (const net of netsBeside(twin)) if (!own.includes(net)) unload(net);
}

const netsBeside = ({ controlnet, adapter, ipAdapter }: Pipeline): AnyModule[] => [
  ...controlnet,
  ...[...adapter, ...ipAdapter].map(({ module }) => module),
];
