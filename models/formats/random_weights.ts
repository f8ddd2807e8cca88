// A model from a preset with random weights: where training from scratch and benchmarks start. Layers begin as PyTorch's
// own do (He et al. 2015, uniform), CLIP's as transformers', and the last layer of every residual branch of the UNet at
// zero, as in the original SDXL (generative-models' zero_module). One Mersenne Twister stream per component, in tree order,
// so that a seed gives the same weights everywhere.
import type { Device } from '../../engine/device.ts';
import { type AnyModule, namedParameters, type Parameter } from '../../engine/module.ts';
import { unscoped } from '../../engine/scope.ts';
import { empty, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { type Init, standard } from '../adapters/layer_init.ts';
import type { Json, ModelSource } from '../checkpoint/checkpoint.ts';
import { toMemoryLayout } from '../checkpoint/weights.ts';
import { TorchGenerator } from '../random/torch_random.ts';
import type { TextConfig } from '../text/clip.ts';
import { componentConfigs, modelIndex } from './diffusers_config.ts';
import type { ModelPreset } from './presets.ts';

const components = ['unet', 'vae', 'text_encoder', 'text_encoder_2', 'scheduler'] as const;

/** `tokenizers` holds tokenizer/ and tokenizer_2/; without it the model can be benchmarked, but takes no prompts. */
export function randomModel(
  preset: ModelPreset,
  { seed, tokenizers }: { seed: number; tokenizers?: string },
): ModelSource {
  const configs: Record<string, Json> = componentConfigs(preset);
  const config = (component: string): Json => {
    if (!configs[component]) throw new UserError(`the preset has no ${component}`);
    return configs[component];
  };
  return {
    path: 'random weights',
    modelIndex: modelIndex(preset),
    has: (component) => configs[component] !== undefined,
    config,
    folder(component) {
      if (tokenizers) return `${tokenizers}/${component}`;
      throw new UserError(`a preset has no ${component}; name a model that has one`);
    },
    weights() {
      throw new Error('random weights are made as they are loaded');
    },
    stamp: (component) => JSON.stringify([component, seed, preset]),
    load(component, module, device, dtype) {
      const at = components.indexOf(component as (typeof components)[number]);
      randomise(module, initOf(component, preset), seed * components.length + at, device, dtype);
    },
  };
}

/** Of a parameter's name, and the weight of its layer. */
type InitRule = (name: string, weight: Parameter) => Init;

const initOf = (component: string, preset: ModelPreset): InitRule => {
  if (component === 'unet') return (name, weight) => (zeroed.test(name) ? zero : standard(name, weight));
  if (component === 'text_encoder' || component === 'text_encoder_2')
    return clipInit(preset[component] as TextConfig);
  return standard;
};

const zero = { constant: 0 };
/** The layers that end a residual branch in the original UNet, and its output. */
const zeroed = /(^|\.)(resnets\.\d+\.conv2|proj_out|conv_out)\.(weight|bias)$/;

/** transformers' CLIPPreTrainedModel._init_weights with factor 1: normal, biases zero. */
function clipInit({ hidden_size: c, num_hidden_layers: depth }: TextConfig): InitRule {
  const deviations: readonly (readonly [RegExp, number])[] = [
    [/embedding\.weight$/, 0.02],
    [/(q|k|v)_proj\.weight$/, 1 / Math.sqrt(c * 2 * depth)],
    [/out_proj\.weight$/, 1 / Math.sqrt(c)],
    [/fc1\.weight$/, 1 / Math.sqrt(2 * c)],
    [/fc2\.weight$/, 1 / Math.sqrt(c * 2 * depth)],
    [/text_projection\.weight$/, 1 / Math.sqrt(c)],
  ];
  return (name, weight) => {
    const normal = deviations.find(([pattern]) => pattern.test(name))?.[1];
    return normal === undefined ? standard(name, weight) : { normal };
  };
}

function randomise(module: AnyModule, init: InitRule, seed: number, device: Device, dtype: FloatDType): void {
  const parameters = namedParameters(module);
  const generator = new TorchGenerator(seed);
  if (device.name === 'stand-in') {
    for (const parameter of parameters.values())
      parameter.tensor = unscoped(() => empty(parameter.memoryShape, { device, dtype }));
    return;
  }
  for (const [name, parameter] of parameters) {
    const weight = parameters.get(name.replace(/\.bias$/, '.weight')) as Parameter;
    const rule = init(name, weight);
    const biasOfNormal = name.endsWith('.bias') && 'normal' in init(weight.path, weight);
    const values = draw(biasOfNormal ? zero : rule, parameter.size, generator);
    const laid =
      parameter.layout === 'conv'
        ? new Float32Array(toMemoryLayout(new Uint8Array(values.buffer), parameter.shape, 4).buffer)
        : values;
    parameter.tensor = unscoped(() => tensor(laid, parameter.memoryShape, { device, dtype }));
  }
}

function draw(init: Init, count: number, generator: TorchGenerator): Float32Array<ArrayBuffer> {
  const values = new Float32Array(count);
  if ('constant' in init) return values.fill(init.constant);
  if ('normal' in init) {
    const normals = generator.randn(count);
    for (let i = 0; i < count; i++) values[i] = normals[i] * init.normal;
  } else {
    const uniforms = generator.rand(count);
    for (let i = 0; i < count; i++) values[i] = (2 * uniforms[i] - 1) * init.uniform;
  }
  return values;
}
