// What a run trains that the model itself has nothing of: adapters (adapters.ts), a token's vectors (textual_inversion.ts), or a network beside
// the UNet (controls/), which is put there here. Twins (twin.ts) get the same put on.
import { type AnyModule, namedParameters, type Parameter, unload } from '../../engine/module.ts';
import type { Json } from '../../models/checkpoint/checkpoint.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { type Component, component, type TrainedAdapter } from '../passes/task.ts';

/** What a run may train of a pipeline, in the order of its text encoders; each with the weights that the model was loaded with. */
export interface Networks {
  net: Component;
  texts: readonly Component[];
}

/** What a run trains on a pipeline or beside it, of which the model itself has nothing. */
export interface Added {
  component: Component;
  /** Where that is adapters. */
  adapters?: readonly TrainedAdapter[];
  /** The twin of a pipeline with the same on it, and its parameters by the component's keys. They are to be filled. */
  putOn(twin: Pipeline): { other: Pipeline; parameters: ReadonlyMap<string, Parameter> };
}

/** What is trained beside the UNet, and what a pipeline has of it. */
interface NetworkBeside<M extends AnyModule> {
  /** Its component's. */
  name: string;
  config?: Json;
  file?: string;
  net: M;
  /** Another, without weights. */
  made(): M;
  put(net: M): Partial<Pipeline>;
}

/** The pipeline with a network that a run trains beside the UNet. */
export const besideUNet = <M extends AnyModule>(
  pipeline: Pipeline,
  { name, config, file, net, made, put }: NetworkBeside<M>,
): { other: Pipeline; added: Added } => ({
  other: {
    ...pipeline,
    ...put(net),
    release() {
      unload(net);
      pipeline.release();
    },
  },
  added: {
    component: { ...component(name, config, net), file },
    putOn(other) {
      const own = made();
      return { other: { ...other, ...put(own) }, parameters: namedParameters(own) };
    },
  },
});
