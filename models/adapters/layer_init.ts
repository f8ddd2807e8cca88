// How layers begin: linear ones and convolutions as PyTorch's own do (He et al. 2015, uniform), norms at 1 and 0.
import type { Device } from '../../engine/device.ts';
import type { Parameter } from '../../engine/module.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { Numbers } from './adapters.ts';

/** What one parameter starts as: a constant, uniform within ±bound, or normal with a standard deviation. */
export type Init = { constant: number } | { uniform: number } | { normal: number };

/** nn.Linear and nn.Conv2d: uniform within 1/sqrt(fan in), biases too; norms 1 and 0. `weight` is that of the parameter's layer. */
export function standard(name: string, weight: Parameter): Init {
  if (weight.shape.length === 1) return { constant: name.endsWith('.weight') ? 1 : 0 };
  return { uniform: 1 / Math.sqrt(weight.size / weight.shape[0]) };
}

/** A parameter of a new network, of which `all` are by their keys. */
export function begun(
  key: string,
  all: ReadonlyMap<string, Parameter>,
  numbers: Numbers,
  place: { device: Device; dtype: FloatDType },
): Tensor {
  const parameter = all.get(key) as Parameter;
  const { size, memoryShape } = parameter;
  const init = standard(key, all.get(key.replace(/\.bias$/, '.weight')) as Parameter);
  const values =
    'uniform' in init
      ? numbers(key, size, 'uniform').map((u) => (2 * u - 1) * init.uniform)
      : new Float32Array(size).fill('constant' in init ? init.constant : 0);
  return tensor(values, memoryShape, place);
}
