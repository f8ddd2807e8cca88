// Adapters that a run trains (LoRA, LoHa, LoKr, OFT), on the layers of the UNet and the text encoders that it names, and what their file says
// of them.
import type { AnyModule, Parameter } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { isLarge, partsOf } from '../../models/adapters/adapter_kinds.ts';
import { type Adapter, addAdapters, type Numbers } from '../../models/adapters/adapters.ts';
import { peftEntries } from '../../models/adapters/peft_config.ts';
import { kohyaModel, kohyaModule } from '../../models/lora/export_lora.ts';
import type { LoraTargets } from '../../models/lora/lora_file.ts';
import { startFromLora } from '../../models/lora/lora_start.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { numbersOf } from '../data/draws.ts';
import type { Component } from '../passes/task.ts';
import type { Run } from '../run/run.ts';
import type { Added, Networks } from './added.ts';
import { blockRates, textEncoderRate } from './rates.ts';

/**
 * Adapters on the loaded pipeline. A LoRA has peft's keys, and its config in the file's metadata as diffusers reads it; the others
 * have kohya's spelling of LyCORIS's, which tells alpha in a tensor.
 */
export function adapters(run: Run, pipeline: Pipeline, networks: Networks, resumed: boolean): Added {
  const { lora } = run;
  const put = adapt(run, pipeline, networks, numbersOf(run.seed));
  const parameters = byKey(put);
  if ((lora.conv_rank || lora.conv_alpha) && !put.some(({ adapter }) => isLarge(adapter.weight)))
    throw new UserError(
      'lora.conv_rank and lora.conv_alpha are of convolutions larger than 1x1, and lora.targets names none; add conv1, conv2 and conv to it, or leave them out',
    );
  // A resumed run has numbers of its own, and the file may be gone.
  if (lora.network_weights && !resumed)
    startFromLora(targetsOf(run, pipeline, networks), lora.network_weights, parameters, lora);
  const spelled = lora.algo === 'lora' ? inPeft(run, pipeline, networks, put) : inLycoris(run, put);
  const rates = new Map(put.flatMap(({ keys, lr }) => keys.map((key) => [key, lr] as const)));
  return {
    component: {
      ...{ name: 'lora', ...spelled, parameters, trained: [...parameters.keys()] },
      lr: (key) => rates.get(key),
    },
    adapters: put.map(({ adapter, keys }) => ({
      // Its matrices' are the first. What begins with ones are lengths.
      names: adapter.matrices.flatMap(({ start }, k) => (start === 'ones' ? [] : [`lora.${keys[k]}`])),
      bounded: adapter.bounded,
    })),
    putOn: (other) => ({
      other,
      parameters: byKey(adapt(run, other, networks, (_, count) => new Float32Array(count))),
    }),
  };
}

const byKey = (put: readonly Put[]): Map<string, Parameter> =>
  new Map(
    put.flatMap(({ adapter, keys }) =>
      partsOf(adapter).map(({ parameter }, k) => [keys[k], parameter] as const),
    ),
  );

type Spelled = Pick<Component, 'metadata' | 'constants'>;

function inPeft(run: Run, pipeline: Pipeline, networks: Networks, put: readonly Put[]): Spelled {
  const config = placesOf(run, pipeline, networks).map(({ name, targets }) => {
    const layers = put.flatMap(({ network, adapter }) => (network === name ? [adapter] : []));
    const { use_dora } = run.lora;
    const whole = run.optimizer.block_lr.length === 0;
    const target_modules = whole ? targets : layers.map(({ path }) => path);
    return peftEntries(name, layers, run.lora, { ...(use_dora && { use_dora }), target_modules });
  });
  return { metadata: { lora_adapter_metadata: JSON.stringify(Object.assign({}, ...config)) } };
}

/** Metadata as kohya's trainer has it. */
function inLycoris({ lora }: Run, put: readonly Put[]): Spelled {
  const { algo, rank, alpha, conv_rank, conv_alpha, factor, decompose_both, rescaled } = lora;
  const more = { lora: {}, loha: {}, lokr: { factor, decompose_both }, oft: { rescaled } }[algo];
  const theirs = algo === 'oft' ? 'diag-oft' : algo;
  const args = { algo: theirs, conv_dim: conv_rank || rank, conv_alpha: conv_alpha || alpha, ...more };
  return {
    metadata: {
      ...kohyaModel,
      ss_network_module: 'lycoris.kohya',
      ss_network_dim: `${rank}`,
      ss_network_alpha: `${alpha}`,
      ss_network_args: JSON.stringify(args),
    },
    constants: put.map(({ network, adapter: { path, alpha } }) => ({
      name: `${kohyaModule(`${network}.${path}`)}.alpha`,
      dtype: 'float32',
      shape: [],
      bytes: encodeNumbers([alpha], 'float32'),
    })),
  };
}

interface Place {
  /** The network's component. */
  name: string;
  root: AnyModule;
  targets: readonly string[];
  option: string;
  /** The learning rate of a layer that has another than the run's; 0 for one that gets no adapter. */
  lr(path: string): number | undefined;
}

/** The networks that a run puts adapters on. */
function placesOf(run: Run, { unet: root, unetConfig, text }: Pipeline, { texts }: Networks): Place[] {
  const { lora, train } = run;
  const encoders = text.encoders.map(({ encoder: root }, i) => {
    const { name } = texts[i];
    const option = 'lora.text_encoder_targets';
    return { name, root, targets: lora.text_encoder_targets, option, lr: () => textEncoderRate(run, name) };
  });
  const rates = blockRates(run, unetConfig);
  const own = {
    ...{ name: 'unet', root, targets: lora.targets, option: 'lora.targets' },
    lr: (path: string) => rates(`${path}.weight`),
  };
  return train.text_encoders ? [own, ...encoders.filter(({ lr }) => lr() !== 0)] : [own];
}

/** The same as a LoRA file's names are matched against. */
const targetsOf = (run: Run, pipeline: Pipeline, networks: Networks): LoraTargets => ({
  unetConfig: pipeline.unetConfig,
  ...(Object.fromEntries(placesOf(run, pipeline, networks).map(({ name, root }) => [name, root])) as {
    unet: AnyModule;
  }),
});

/** An adapter on a network, with the component's keys of its parts. */
interface Put {
  network: string;
  adapter: Adapter;
  lr: number | undefined;
  keys: readonly string[];
}

function adapt(run: Run, pipeline: Pipeline, networks: Networks, numbers: Numbers): Put[] {
  return placesOf(run, pipeline, networks).flatMap(({ name: network, root, targets, option, lr }) => {
    // Layers of two encoders have the same names, but not the same numbers to begin with.
    const drawn: Numbers = (key, ...rest) => numbers(network === 'unet' ? key : `${network}.${key}`, ...rest);
    const put = addAdapters(root, { ...run.lora, targets }, drawn, {
      option,
      prefix: `${network}.`,
      isChosen: (path) => lr(path) !== 0,
    });
    return put.map((adapter): Put => {
      const layer = `${network}.${adapter.path}`;
      const own = run.lora.algo === 'lora' ? layer : kohyaModule(layer);
      return {
        network,
        adapter,
        lr: lr(adapter.path),
        keys: partsOf(adapter).map(({ key }) => `${own}.${key}`),
      };
    });
  });
}
