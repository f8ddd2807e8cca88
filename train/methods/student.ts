// A smaller UNet beside its teacher (distillation.ts): whether the two can be compared, and the student's weights where it begins with the
// teacher's, as diffengine's recipes that make one from SDXL. Layers have their teacher's names, but where a level has fewer resnets and
// transformers the last on the way up is the teacher's last, whose skip connection is as wide (BK-SDM, Kim et al. 2023).
import { namedParameters } from '../../engine/module.ts';
import { UserError } from '../../io/errors.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { loadAndClose, type WeightSource } from '../../models/checkpoint/weights.ts';
import { parseUNetConfig, type UNetConfig, unet } from '../../models/unet/unet.ts';
import type { Run } from '../run/run.ts';

/** What both UNets are given and give, and the widths of what they make on the way. */
const alike = [
  'block_out_channels',
  'in_channels',
  'out_channels',
  'cross_attention_dim',
  'addition_time_embed_dim',
  'projection_class_embeddings_input_dim',
] as const;

/** `model` as the student of `teacher`, where there is one. @throws UserError where they do not go together */
export function asStudent(
  { unet: path, distillation }: Run,
  model: ModelSource,
  teacher: ModelSource | undefined,
): ModelSource {
  if (!teacher) return model;
  const [own, theirs] = [model, teacher].map((source) => parseUNetConfig(source.config('unet')));
  const { distill_level, feature_weight, student_weight_from_teacher } = distillation;
  const student = path || model.path;
  const differs = alike.find((key) => String(own[key]) !== String(theirs[key]));
  if (differs)
    throw new UserError(
      `the UNet of ${teacher.path} has ${differs} ${theirs[differs]} and its student, that of ${student}, ${own[differs]}; take a student that is smaller in layers alone`,
    );
  if (distill_level === 'sub_block' && feature_weight > 0 && own.layers_per_block !== theirs.layers_per_block)
    throw new UserError(
      `the UNet of ${teacher.path} has ${theirs.layers_per_block} layers in each level and its student ${own.layers_per_block}, which cannot be compared one by one; set distillation.distill_level to "block"`,
    );
  if (!student_weight_from_teacher) return model;
  const origin = originsOf(own, theirs);
  const shapes = [own, theirs].map((config) => namedParameters(unet(config)));
  for (const [key, { shape }] of shapes[0])
    if (shapes[1].get(origin(key))?.shape.join() !== shape.join())
      throw new UserError(
        `the UNet of ${teacher.path} has no ${origin(key)} of the shape [${shape}] for its student, that of ${student}; take one that is smaller, or set distillation.student_weight_from_teacher to false`,
      );
  return {
    ...model,
    load(component, into, device, dtype) {
      if (component !== 'unet') return model.load(component, into, device, dtype);
      const keys = [...namedParameters(into).keys()];
      loadAndClose(into, renamed(teacher.weights('unet'), keys, origin), device, dtype);
    },
  };
}

/** From a student's key to its teacher's. */
function originsOf(own: UNetConfig, theirs: UNetConfig): (key: string) => string {
  const [last, teachersLast] = [own.layers_per_block, theirs.layers_per_block];
  return (key) =>
    key.replace(/^(up_blocks\.\d+\.(?:resnets|attentions)\.)(\d+)/, (whole, layers, i) =>
      Number(i) === last ? `${layers}${teachersLast}` : whole,
    );
}

/** Weights by other names, and no further ones. */
const renamed = (
  weights: WeightSource,
  names: readonly string[],
  origin: (name: string) => string,
): WeightSource => ({
  ...weights,
  names,
  info: (name) => weights.info(origin(name)),
  floats: (name) => weights.floats(origin(name)),
  bytes: (name, room) => weights.bytes(origin(name), room),
  inFile: (name) => weights.inFile?.(origin(name)),
});
