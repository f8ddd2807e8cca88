// Training the UNet, alone or with the text encoders, or what is put on it, beside it or into the encoders (trained_parts.ts), from inputs
// drawn anew for each pass (diffusion_inputs.ts), by the loss of the run's method (methods/).
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { standInDevice } from '../../engine/profile.ts';
import { scope } from '../../engine/scope.ts';
import { empty, type Tensor } from '../../engine/tensor.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { textParts } from '../../models/load_options.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { distillation } from '../methods/distillation.ts';
import { dpo } from '../methods/dpo.ts';
import { esd } from '../methods/esd.ts';
import { latentConsistency } from '../methods/lcm.ts';
import { type MakeMethod, type Method, plainDiffusion } from '../methods/method.ts';
import { otherTeacher, type Teacher, teacherOf } from '../methods/teacher.ts';
import { objectiveOf } from '../objective/objective.ts';
import { dropoutOf } from '../parts/dropout.ts';
import { releaseTwin, twinPipeline } from '../parts/twin.ts';
import { place } from '../passes/pass.ts';
import { type Component, copied, lent, type Substitute, type Task, type Weights } from '../passes/task.ts';
import { type Pictures, previewSize } from '../pictures/pictures.ts';
import { previewsOf } from '../run/preview_prompts.ts';
import type { Run } from '../run/run.ts';
import { controlOf } from './control_of.ts';
import { diffusionInputs } from './diffusion_inputs.ts';
import { lossContext, type Side } from './loss_context.ts';
import { openParts, type Prepared } from './preparation.ts';
import { checkPreviews, rehearsePreviews, samplePreviews } from './preview.ts';
import { aside, blankEmbeddings, preparedTexts, textsInPass } from './texts.ts';
import { type Sources, trainedParts } from './trained_parts.ts';

/** By `train.method`. */
const methods: Record<Run['train']['method'], MakeMethod> = {
  diffusion: plainDiffusion,
  distillation,
  dpo,
  esd,
  lcm: latentConsistency,
};

export function diffusionTask(
  run: Run,
  pictures: Pictures,
  sources: Sources,
  prepared: Prepared,
  device: Device,
): Task {
  const { source } = sources;
  const { moments, texts: said } = prepared;
  const previews = previewsOf(run.previews, previewSize(run));
  const needed = [
    ...(said ? [] : textParts(source)),
    'unet' as const,
    ...(previews.length ? ['vae' as const] : []),
  ];
  const opened = openParts({ run, ...sources }, device, needed);
  const { pipeline, components, added, networks } = trainedParts(run, opened, sources, pictures);
  checkPreviews(pipeline, run.previews, previews);
  const control = controlOf(run, pipeline, prepared);
  const shown = previews.map((preview, i) => control.preview(preview, imageOf(pictures, i)));
  const configs = networks.texts.map(({ name }) => source.config(name));
  const texts = said ? preparedTexts(pipeline, said, configs) : textsInPass(pipeline);
  const method = methods[run.train.method](run, objectiveOf(run.objective, source.config('scheduler')));
  const teacher = teacherFor(run, method, pipeline, networks.net, sources.teacherSource);
  let averages: Weights;
  const twinOf = (substitute: Substitute) => twinPipeline(run, pipeline, networks, added, substitute);
  /** The model with other weights in what is trained; the model itself where there are none. */
  const averaged = (weights: Weights): Pipeline => (weights ? twinOf(lent(weights)).other : pipeline);
  /** A twin with a teacher of its own, on its device. */
  const sideOf = (substitute: Substitute, device: Device) => {
    const { other, weights } = twinOf(substitute);
    const own = teacher?.beside(weights, device);
    const release = () => {
      if (own) unload(own);
      releaseTwin(other, pipeline);
    };
    return { side: { model: other, teacher: own }, weights, release };
  };
  const lossOf = (side: Side, inputs: Tensors, encoded = texts.encoded): Tensor => {
    const { model } = side;
    const followed = () => (model === pipeline ? averaged(averages) : model);
    return dropout.during(inputs, () =>
      method.loss(lossContext(side, inputs, control, encoded, followed), inputs),
    );
  };
  /** A pass without numbers. Encoders that are not trained are on the device alone, and have nothing to drop. */
  const dropout = dropoutOf(run, (inputs) => {
    const device = standInDevice();
    const { side, release } = sideOf((_, { shape, dtype }) => empty(shape, { device, dtype }), device);
    const blank = blankEmbeddings(pipeline, configs, inputs.timesteps.shape[0]);
    const told = run.train.text_encoders ? inputs : { ...inputs, ...blank, ...aside(blank) };
    const encoded = run.train.text_encoders
      ? texts.encoded
      : (_: Pipeline, { context, pooled }: Tensors) => ({ context, pooled });
    noGrad(() => scope(() => void lossOf(side, place(told, device), encoded)));
    release();
  });
  const drawn = diffusionInputs({ run, pictures, pipeline, moments, method, texts, control });
  return {
    components,
    adapters: added?.adapters,
    async prepare(batch, epoch, signal) {
      const { inputs, ids } = await drawn.prepare(batch, epoch, signal);
      return { ...inputs, ...dropout.inputs(inputs, ids, epoch) };
    },
    blank(batch) {
      const { inputs, n } = drawn.blank(batch);
      return { ...inputs, ...dropout.blank(inputs, n) };
    },
    loss(inputs, weights) {
      const other = averaged(weights);
      try {
        return lossOf({ model: other, teacher: teacher?.unet }, inputs);
      } finally {
        releaseTwin(other, pipeline);
      }
    },
    ...(method.asks.average && {
      follow(weights) {
        averages = weights;
      },
    }),
    // Frozen models that are asked beforehand stay where they are: other devices get what these say.
    replicate(further) {
      const { side, weights, release } = sideOf(copied(further), further);
      return { weights, loss: (inputs) => lossOf(side, inputs), release };
    },
    async preview(weights, stop) {
      if (previews.length === 0) return [];
      const other = averaged(weights);
      try {
        return await samplePreviews(other, previews, said?.previews, shown, stop);
      } finally {
        releaseTwin(other, pipeline);
      }
    },
    rehearsePreviews(weights) {
      if (previews.length === 0) return;
      const other = averaged(weights);
      rehearsePreviews(other, previews, said?.previews, shown);
      releaseTwin(other, pipeline);
    },
    release() {
      teacher?.release();
      pipeline.release();
    },
  };
}

/** The model as it is loaded, or the larger one that is named beside it, where the method asks a teacher. */
function teacherFor(
  run: Run,
  { asks }: Method,
  { unetConfig, device }: Pipeline,
  net: Component,
  other?: ModelSource,
): Teacher | undefined {
  if (!asks.teacher) return undefined;
  if (other) return otherTeacher(other, device, run.dtype);
  return teacherOf(unetConfig, net, new Set(run.train.target === 'unet' ? net.trained : []));
}

/** What the i-th preview is over: its own of previews.validation_image, or the one for all. */
const imageOf = ({ validationImages: images }: Pictures, i: number) => images.at(i) ?? images.at(0);
