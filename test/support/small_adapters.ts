// What adapters that a small run has learnt make of its UNet, by their own layers and merged from a file.
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { partsOf } from '../../models/adapters/adapter_kinds.ts';
import { type AdaptersConfig, addAdapters } from '../../models/adapters/adapters.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { fill, numbers } from './adapter_golden.ts';
import { device, model } from './small_runs.ts';

/** How a file names a layer's tensor. */
type Spelling = (layer: string, key: string) => string;

export const inPeft: Spelling = (layer, key) => `${layer}.${key}`;

/** What the UNet says without adapters, with those of the first file on its layers, and with each file merged. */
export function predictions(
  paths: readonly string[],
  config: AdaptersConfig,
  spelled: Spelling,
): Float32Array[] {
  const source = openModel(model);
  const unetConfig = parseUNetConfig(source.config('unet'));
  const opened = () => {
    const net = unet(unetConfig);
    source.load('unet', net, device, 'float32');
    return net;
  };
  const [base, live] = [opened(), opened()];
  const file = openSafetensors(paths[0]);
  for (const adapter of addAdapters(live, config, (_, n) => new Float32Array(n)))
    for (const { key, parameter } of partsOf(adapter)) {
      const stored = spelled(`unet.${adapter.path}`, key);
      fill(parameter, decodeFloats(file.read(stored), file.tensors.get(stored)?.dtype ?? 'float32'));
    }
  file.close();
  const merged = paths.map((path) => {
    const net = opened();
    mergeLora({ unet: net, unetConfig }, path);
    return net;
  });
  return [base, live, ...merged].map((net) => {
    const y = noGrad(() =>
      scope(() => {
        const made = (...shape: number[]) => tensor(numbers(shape, shape.length), shape, { device });
        const conditioning = { context: made(1, 7, 80), textEmbeds: made(1, 40), timeIds: made(1, 6) };
        return net(made(1, 8, 8, 4), tensor([500], [1], { device }), conditioning).floats();
      }),
    );
    unload(net);
    return y;
  });
}
