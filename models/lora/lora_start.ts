// Adapters that are to train begin as a LoRA file left off (kohya's network_weights): A as it is, and B times what the file's
// alpha / rank is of theirs, so that the model computes what it would with the file merged. So a DoRA begins with the magnitudes of a
// file of one, and with the lengths that rows have under a plain LoRA.
import type { Parameter } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { UserError } from '../../io/errors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';
import { type AdapterConfig, isLarge, sizesFor } from '../adapters/adapter_kinds.ts';
import { lengthsOf } from '../adapters/dora.ts';
import { kindOf, magnitudeAxis, magnitudeOf } from '../adapters/lora_kinds.ts';
import { toMemoryLayout } from '../checkpoint/weights.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import { complain, floatsOf, type LoraTargets, locateAdapter, type Update, updatesOf } from './lora_file.ts';

/**
 * Loads the file, or the one in the folder, into adapters' `parameters`, by `network.path.lora_A.weight`. Layers that the file
 * leaves alone stay as they were. Returns how many layers it has.
 * @throws UserError before anything is changed: for another kind or rank, and layers that have no adapter
 */
export function startFromLora(
  targets: LoraTargets,
  path: string,
  parameters: ReadonlyMap<string, Parameter>,
  sizes: AdapterConfig,
): number {
  const file = openWeightsFile(locateAdapter(path));
  try {
    const updates = [...updatesOf(file, targets)];
    refuseUnfit(file, updates, parameters, sizes);
    for (const [, update] of updates) {
      const { target, parts, ...own } = update;
      const load = (part: string, from: TensorInfo | undefined, factor: number) =>
        fill(parameters.get(`${target.path}.${part}.weight`) as Parameter, file, from as TensorInfo, factor);
      load('lora_A', parts.lora_down, 1);
      const { rank, alpha } = sizesFor(target.weight.shape, sizes);
      load('lora_B', parts.lora_up, own.alpha / own.rank / (alpha / rank));
      if (sizes.use_dora) fillMagnitude(parameters, file, update, alpha / rank);
    }
    return updates.length;
  } finally {
    file.close();
  }
}

/** @throws UserError for another kind or rank than the run's, and layers that have no adapter */
function refuseUnfit(
  file: TensorFile,
  updates: readonly (readonly [module: string, update: Update])[],
  parameters: ReadonlyMap<string, Parameter>,
  sizes: AdapterConfig,
): void {
  const named = (is: (update: Update) => boolean) =>
    updates.filter(([, update]) => is(update)).map(([module]) => module);
  complain(
    file,
    'are of no plain LoRA',
    named(({ parts }) => !isPlain(parts)),
    'train on with a plain one, or begin anew',
  );
  complain(
    file,
    'are of a DoRA',
    sizes.use_dora ? [] : named(({ parts }) => magnitudeOf(parts) !== undefined),
    'set lora.use_dora',
  );
  complain(
    file,
    'have lengths of columns, as LyCORIS trains DoRAs without wd_on_out, where the run trains those of rows',
    named(
      ({ parts, target }) =>
        magnitudeOf(parts) !== undefined && magnitudeAxis(parts, target.weight.shape) !== 'rows',
    ),
    'train on with a DoRA of rows, or begin anew',
  );
  for (const [module, { target, rank: its }] of updates) {
    const { rank } = sizesFor(target.weight.shape, sizes);
    if (its === rank) continue;
    const key = isLarge(target.weight.shape) ? 'conv_rank' : 'rank';
    throw new UserError(
      `LoRA ${file.path}: ${module} has rank ${its}, and the run ${rank}; set lora.${key} to that`,
    );
  }
  complain(
    file,
    'are of layers that the run puts no adapter on',
    named(({ target }) => !parameters.has(`${target.path}.lora_A.weight`)),
    'name their layers in lora.targets, and of text encoders in lora.text_encoder_targets with train.text_encoders, and give their blocks a rate where optimizer.block_lr has some',
  );
}

const isPlain = (parts: Update['parts']): boolean =>
  kindOf(parts)?.name === 'LoRA' && !parts.lora_mid && !parts.diff_b;

function fill(parameter: Parameter, file: TensorFile, from: TensorInfo, factor: number): void {
  const values = floatsOf(file, from).map((x) => x * factor);
  const { shape } = parameter;
  parameter.tensor.set(
    shape.length === 4
      ? new Float32Array(toMemoryLayout(new Uint8Array(values.buffer), shape, 4).buffer)
      : values,
  );
}

/** With what the file says, or with the lengths that rows have under what was loaded. */
function fillMagnitude(
  parameters: ReadonlyMap<string, Parameter>,
  file: TensorFile,
  { target, parts }: Update,
  factor: number,
): void {
  const own = (part: string) => parameters.get(`${target.path}.${part}`) as Parameter;
  const magnitude = own('lora_magnitude_vector').tensor;
  const said = magnitudeOf(parts);
  magnitude.set(
    said
      ? floatsOf(file, said)
      : scope(() =>
          lengthsOf(
            target.weight.tensor,
            own('lora_A.weight').tensor,
            own('lora_B.weight').tensor,
            factor,
          ).floats(),
        ),
  );
}
