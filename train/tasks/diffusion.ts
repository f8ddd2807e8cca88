// Training the UNet, alone or with the text encoders, or what is put on it, beside it or into the encoders (trained_parts.ts), from inputs
// drawn anew for each pass (diffusion_inputs.ts), by the loss of the run's method (method_loss.ts).
import type { Device } from '../../engine/device.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { textParts } from '../../models/load_options.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import type { Asked } from '../../models/request.ts';
import { distillation } from '../methods/distillation.ts';
import { dpo } from '../methods/dpo.ts';
import { esd } from '../methods/esd.ts';
import { latentConsistency } from '../methods/lcm.ts';
import { type MakeMethod, type Method, plainDiffusion } from '../methods/method.ts';
import { otherTeacher, type Teacher, teacherOf } from '../methods/teacher.ts';
import { objectiveOf } from '../objective/objective.ts';
import { releaseTwin } from '../parts/twin.ts';
import type { Component, Task, Weights } from '../passes/task.ts';
import { type Pictures, previewSize } from '../pictures/pictures.ts';
import { previewsOf } from '../run/preview_prompts.ts';
import type { Run } from '../run/run.ts';
import { controlOf } from './control_of.ts';
import { diffusionInputs } from './diffusion_inputs.ts';
import { methodLoss } from './method_loss.ts';
import { openParts, type Prepared } from './preparation.ts';
import { checkPreviews, rehearsePreviews, requestsOf, samplePreviews } from './preview.ts';
import { preparedTexts, textsInPass } from './texts.ts';
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
  const { source, teacherSource } = sources;
  const { moments, texts: said } = prepared;
  const previews = previewsOf(run.previews, previewSize(run));
  const needed = [
    ...(said ? [] : textParts(source)),
    'unet' as const,
    ...(previews.length ? ['vae' as const] : []),
  ];
  const opened = openParts({ run, ...sources }, device, needed);
  const parts = trainedParts(run, opened, sources, pictures);
  const { pipeline, components, added, networks } = parts;
  checkPreviews(pipeline, run.previews, previews);
  const control = controlOf(run, pipeline, prepared);
  const shown = previews.map((preview, i) => control.preview(preview, imageOf(pictures, i)));
  const texts = said ? preparedTexts(pipeline, said, networks) : textsInPass(pipeline);
  const method = methods[run.train.method](run, objectiveOf(run.objective, source.config('scheduler')));
  const teacher = teacherFor(run, method, pipeline, networks.net, teacherSource);
  const { task, dropout, averaged } = methodLoss({ run, parts, method, teacher, control, texts });
  return {
    components,
    adapters: added?.adapters,
    ...task,
    ...diffusionInputs({ run, pictures, pipeline, moments, method, texts, control, dropout }),
    ...previewsBy(pipeline, averaged, () => requestsOf(previews, said?.previews, shown)),
    release() {
      teacher?.release();
      pipeline.release();
    },
  };
}

/** Previews of the model, or of its twin with the averages. */
function previewsBy(
  pipeline: Pipeline,
  averaged: (weights: Weights) => Pipeline,
  requests: () => Asked[],
): Pick<Task, 'preview' | 'rehearsePreviews'> {
  return {
    async preview(weights, stop) {
      const asked = requests();
      if (asked.length === 0) return [];
      const model = averaged(weights);
      try {
        return await samplePreviews(model, asked, stop);
      } finally {
        releaseTwin(model, pipeline);
      }
    },
    rehearsePreviews(weights) {
      const asked = requests();
      if (asked.length === 0) return;
      const model = averaged(weights);
      rehearsePreviews(model, asked);
      releaseTwin(model, pipeline);
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
