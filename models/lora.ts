// Adapters merged into loaded weights: W += scale * alpha / rank * D, in float32, where D is the difference that its kind makes
// (lora_kinds.ts) of the tensors that a file has for the layer (lora_file.ts). DoRA (Liu et al. 2024) then gives each row, or in
// files of LyCORIS each column, of W + alpha / rank * D the length that the file says.
import { noGrad } from '../engine/grad.ts';
import type { Parameter } from '../engine/module.ts';
import { add, mul, sub } from '../engine/ops/binary.ts';
import { sum } from '../engine/ops/reduce.ts';
import { cast, scale as scaled, square } from '../engine/ops/unary.ts';
import { keep, scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import { openSafetensors, type SafetensorsFile, type TensorInfo } from '../io/safetensors.ts';
import { floatsOf, type LoraTargets, type Update, updatesOf } from './lora_file.ts';
import { difference, kindOf, magnitudeAxis, magnitudeOf } from './lora_kinds.ts';

/**
 * Adds the adapter in `path`, times `scale`, to the loaded weights. Several adapters are merged one after the other; merging with
 * the negative scale takes one without DoRA out again up to rounding. Returns how many layers changed.
 * @throws UserError before anything is changed, if a name of the file matches no weight or a shape does not fit
 */
export function mergeLora(targets: LoraTargets, path: string, scale = 1): number {
  const file = openSafetensors(path);
  try {
    const updates = updatesOf(file, targets);
    noGrad(() => {
      for (const update of updates.values()) merge(file, update, scale);
    });
    return updates.size;
  } finally {
    file.close();
  }
}

function merge(file: SafetensorsFile, update: Update, scale: number): void {
  const { target, parts, alpha, rank } = update;
  if (kindOf(parts)) {
    change(target.weight, (weight) => {
      const read = floatsOf.bind(undefined, file);
      const made = difference(parts, target.weight.shape, read, weight.device);
      const factor = (magnitudeOf(parts) ? 1 : scale) * (alpha / rank);
      const changed = add(weight, scaled(made, factor).reshape(...weight.shape));
      if (!magnitudeOf(parts)) return changed;
      // As A1111 and ComfyUI do, scale counts for the whole change, so that 0 is the model itself; diffusers scales D alone,
      // and lengthens W even at 0.
      return add(weight, scaled(sub(withMagnitude(file, update, changed), weight), scale));
    });
  }
  const { diff_b: shift } = parts;
  if (shift && target.bias) {
    change(target.bias, (bias) =>
      add(
        bias,
        tensor(
          floatsOf(file, shift).map((x) => x * scale),
          bias.shape,
          { device: bias.device },
        ),
      ),
    );
  }
}

/** Replaces a weight by what is made of it, the sums in float32 and rounded once to the weight's own type. */
function change(parameter: Parameter, made: (values: Tensor) => Tensor): void {
  const { tensor: values } = parameter;
  parameter.tensor = keep(scope(() => cast(made(cast(values, 'float32')), values.dtype)));
}

/** The weight with its rows or columns made as long as the file says. */
function withMagnitude(file: SafetensorsFile, { target, parts }: Update, weight: Tensor): Tensor {
  const [outputs, inputs] = target.weight.shape;
  const rows = magnitudeAxis(parts, target.weight.shape) === 'rows';
  const matrix = rows ? weight.reshape(outputs, -1) : weight.reshape(-1, inputs);
  const squares = sum(square(matrix), rows ? 1 : 0).floats();
  // What is zero stays zero.
  const factors = floatsOf(file, magnitudeOf(parts) as TensorInfo).map(
    (length, i) => length / (Math.sqrt(squares[i]) || 1),
  );
  const stretch = tensor(factors, rows ? [outputs, 1] : [1, inputs], { device: weight.device });
  return mul(matrix, stretch).reshape(...weight.shape);
}
