// Training a ControlNet-LLLite (kohya-ss 2023; sdxl_train_control_net_lllite.py of sd-scripts), as a ControlNet is (controlnet.ts): beside
// the frozen UNet, which reads what its modules add in its attentions, so gradients run through all of it from the first of them on.
import { holding } from '../../engine/memory.ts';
import { namedParameters } from '../../engine/module.ts';
import { unscoped } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import { begun } from '../../models/adapters/layer_init.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { loadLLLite } from '../../models/control/controlnet_kinds.ts';
import {
  type LLLite,
  lllite,
  llliteConfig,
  llliteFile,
  newLLLiteConfig,
} from '../../models/control/lllite.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { numbersOf } from '../data/draws.ts';
import { type Added, besideUNet } from '../parts/added.ts';
import type { Run } from '../run/run.ts';

/** The pipeline with the LLLite that a run trains: the one at `given`, or a new one. @throws UserError where the model takes none of it */
export function withLLLite(
  run: Run,
  pipeline: Pipeline,
  given?: ModelSource,
): { other: Pipeline; added: Added } {
  const { unetConfig: unet, ratio, device, dtype } = pipeline;
  const config = given ? llliteConfig(given) : newLLLiteConfig(pipeline, run.controlnet);
  const made = (): LLLite => lllite(config);
  const net = given ? loadLLLite(given, { unet, ratio }, device, dtype) : made();
  if (!given) holding('controlnet', () => begin(net, run.seed, pipeline));
  const put = (own: LLLite) => ({ controlnet: [own] });
  return besideUNet(pipeline, { name: 'controlnet', file: llliteFile, net, made, put });
}

/** As torch's own layers begin, and `up` without weights, so that at first it adds its bias alone. */
function begin(net: LLLite, seed: number, place: Pick<Pipeline, 'device' | 'dtype'>): void {
  const own = namedParameters(net);
  for (const [key, parameter] of own)
    parameter.tensor = unscoped(() =>
      key.endsWith('.up.0.weight')
        ? zeros(parameter.memoryShape, place)
        : begun(key, own, numbersOf(seed), place),
    );
}
