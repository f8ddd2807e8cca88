// The inputs of the UNet's passes: latents drawn anew each epoch from their cached moments, captions chosen each epoch, time ids from the
// true crop, and what the method (methods/) and the run (controls/) add. A caption that is left away becomes what the model is given
// without a prompt: zeros (the base model), or the embedding of an empty text.
import type { Pipeline } from '../../models/pipeline.ts';
import { joined } from '../../models/vae/latents.ts';
import type { Control } from '../controls/control.ts';
import { captionOf } from '../data/caption.ts';
import type { Method } from '../methods/method.ts';
import type { HostTensor } from '../objective/pass_inputs.ts';
import type { Dropout } from '../parts/dropout.ts';
import type { Task } from '../passes/task.ts';
import { drawLatents, type PictureMoments, type View } from '../pictures/cache.ts';
import { timeIdsOf } from '../pictures/picture.ts';
import { type Pictures, viewIn, withRejected } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';
import { aside, type Texts } from './texts.ts';

interface Makers {
  run: Run;
  pictures: Pictures;
  pipeline: Pipeline;
  moments(view: View): PictureMoments;
  method: Method;
  texts: Texts;
  control: Control;
  dropout: Dropout;
}

export function diffusionInputs(makers: Makers): Pick<Task, 'prepare' | 'blank'> {
  const { run, pictures, pipeline, moments, method, texts, control, dropout } = makers;
  const { seed } = run;
  const hasPrior = pictures.samples.some(({ prior }) => prior);
  const captionIn = (view: View, epoch: number): string | undefined => {
    const { captions, key } = view.sample;
    return control.isUnprompted?.(view, epoch)
      ? undefined
      : captionOf(captions, run.dataset, { seed, epoch, key });
  };
  return {
    async prepare({ samples }, epoch, signal) {
      const views = withRejected(samples.map((i) => viewIn(epoch, i, pictures, run)));
      const ids = views.map(({ sample }) => sample.key);
      const latents = views.map((view) =>
        drawLatents(moments(view), view, pipeline.vae.config, { seed, epoch }),
      );
      const [height, width] = views[0].geometry.target.map((side) => side / pipeline.ratio);
      const weights = hasPrior ? priorWeights(views, run) : undefined;
      const inputs = {
        ...method.inputs({ ids, epoch, latents: joined(latents), height, width, weights }),
        timeIds: timeIdsInput(views, pipeline, run),
        ...texts.inputs(views.map((view) => captionIn(view, epoch))),
        ...(method.asks.unconditional && aside(texts.inputs(views.map(() => undefined)))),
        ...(await control.inputs(views, epoch, signal)),
      };
      return { ...inputs, ...dropout.inputs(inputs, ids, epoch) };
    },
    blank({ bucket, samples }) {
      const n = samples.length * (run.dataset.rejected_image_column ? 2 : 1);
      const size = pictures.buckets[bucket];
      const [h, w] = size.map((side) => side / pipeline.ratio);
      const ids = pipeline.aesthetic ? 5 : 6;
      const timeIds: HostTensor = { shape: [n, ids], values: new Float32Array(n * ids), dtype: 'float32' };
      const inputs = {
        ...method.blank([n, h, w, pipeline.vae.config.latent_channels]),
        timeIds,
        ...texts.blank(n),
        ...(method.asks.unconditional && aside(texts.blank(n))),
        ...control.blank(n, size),
      };
      return { ...inputs, ...dropout.blank(inputs, n) };
    },
  };
}

/** What each picture's loss weighs beside those for prior preservation. */
const priorWeights = (views: readonly View[], { objective }: Run): Float32Array =>
  Float32Array.from(views, ({ sample }) => (sample.prior ? objective.prior_loss_weight : 1));

function timeIdsInput(views: readonly View[], { aesthetic }: Pipeline, { dataset }: Run): HostTensor {
  const rows = views.map(({ geometry }) =>
    timeIdsOf(geometry, aesthetic ? dataset.aesthetic_score : undefined),
  );
  return {
    shape: [rows.length, rows[0].length],
    values: Float32Array.from(rows.flat()),
    dtype: 'float32',
  };
}
