// Training the UNet, alone or with the text encoders, or what is put on it, beside it or into the encoders (twin.ts, controlnet.ts,
// t2i_adapter.ts, ip_adapter.ts, textual_inversion.ts): latents drawn anew each epoch from their cached moments, captions chosen each
// epoch, time ids from the true crop, and the loss of the run's method (method.ts). A caption that is left away becomes what the model
// is given without a prompt: zeros (the base model), or the embedding of an empty text.
import type { Device } from '../engine/device.ts';
import { withDrop } from '../engine/dropout.ts';
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import type { Tensors } from '../engine/op.ts';
import { standInDevice } from '../engine/profile.ts';
import { scope } from '../engine/scope.ts';
import { empty, type Tensor } from '../engine/tensor.ts';
import type { ModelSource } from '../models/checkpoint.ts';
import { joined } from '../models/latents.ts';
import { textParts } from '../models/load_options.ts';
import type { Pipeline } from '../models/pipeline.ts';
import type { Conditioning } from '../models/transformer.ts';
import type { UNet } from '../models/unet.ts';
import { blockRates } from './block_lr.ts';
import { drawLatents, type View } from './cache.ts';
import { type Control, controlled, uncontrolled, withControlNet } from './controlnet.ts';
import { captionOf } from './data/caption.ts';
import { timeIdsOf } from './data/picture.ts';
import { dpo } from './dpo.ts';
import { dropoutOf } from './dropout.ts';
import { esd } from './esd.ts';
import { paintingIn } from './inpainting.ts';
import { editing } from './instruct_pix2pix.ts';
import { type IPAdapterBegin, prompted, withIPAdapter } from './ip_adapter.ts';
import { latentConsistency } from './lcm.ts';
import { masked } from './mask.ts';
import { type MakeMethod, type Method, plainDiffusion } from './method.ts';
import { type Network, objectiveOf } from './objective.ts';
import { place } from './pass.ts';
import { type Pictures, previewSize, viewIn, withRejected } from './pictures.ts';
import { openParts, type Prepared } from './preparation.ts';
import { checkPreviews, rehearsePreviews, samplePreviews } from './preview.ts';
import { previewsOf } from './preview_prompts.ts';
import type { Run } from './run.ts';
import { adapted, withT2IAdapter } from './t2i_adapter.ts';
import {
  type Component,
  component,
  copied,
  type HostTensor,
  lent,
  type Substitute,
  type Task,
  type Weights,
} from './task.ts';
import { type Teacher, teacherOf } from './teacher.ts';
import { aside, blankEmbeddings, fromAside, preparedTexts, textsInPass } from './texts.ts';
import { withToken } from './textual_inversion.ts';
import { adapters, releaseTwin, twinPipeline } from './twin.ts';

/** Where a run's weights begin. */
export interface Sources {
  source: ModelSource;
  vaeSource: ModelSource;
  /** A ControlNet or T2I-Adapter to go on with. */
  controlSource?: ModelSource;
  /** What an IP-Adapter is made from. */
  ipAdapter?: IPAdapterBegin;
  /** The checkpoint that the run goes on from, if it does. */
  checkpoint?: string;
}

/** By `train.method`. */
const methods: Record<Run['train']['method'], MakeMethod> = {
  diffusion: plainDiffusion,
  dpo,
  esd,
  lcm: latentConsistency,
};

/** What a pass runs through. */
interface Side {
  model: Pipeline;
  teacher?: UNet;
}

export function diffusionTask(
  run: Run,
  pictures: Pictures,
  sources: Sources,
  prepared: Prepared,
  device: Device,
): Task {
  const { source } = sources;
  const { moments, texts: said } = prepared;
  const previews = previewsOf(run.previews, previewSize(run, pictures));
  const needed = [
    ...(said ? [] : textParts(source)),
    'unet' as const,
    ...(previews.length ? ['vae' as const] : []),
  ];
  const opened = openParts({ run, ...sources }, device, needed);
  const { pipeline, components, added, networks } = partsOf(run, opened, sources, pictures);
  checkPreviews(pipeline, run.previews, previews);
  const objective = objectiveOf(run.objective, source.config('scheduler'));
  const control = controlOf(run, pipeline, prepared);
  const shown = previews.map((preview, i) => control.preview(preview, imageOf(pictures, i)));
  const configs = networks.texts.map(({ name }) => source.config(name));
  const texts = said ? preparedTexts(pipeline, said, configs) : textsInPass(pipeline);
  const hasPrior = pictures.samples.some(({ prior }) => prior);
  const latentShape = (bucket: number, n: number): number[] => {
    const [h, w] = pictures.buckets[bucket];
    return [n, h / pipeline.ratio, w / pipeline.ratio, pipeline.vae.config.latent_channels];
  };
  const method = methods[run.train.method](run, objective);
  const teacher = teacherFor(run, method, pipeline, networks.net);
  let averages: Weights;
  const lossOf = ({ model, teacher }: Side, inputs: Tensors, encoded = texts.encoded): Tensor => {
    const told = (given: Tensors): Conditioning => {
      const { context, pooled } = encoded(model, given);
      return { context, textEmbeds: pooled, timeIds: inputs.timeIds };
    };
    const target: Network = (...asked) => {
      const other = model === pipeline ? averaged(averages) : model;
      try {
        return noGrad(() => withDrop(undefined, () => control.network(other, inputs)(...asked)));
      } finally {
        releaseTwin(other, model);
      }
    };
    return dropout.during(inputs, () =>
      method.loss(
        {
          student: control.network(model, inputs),
          teacher: (...asked) => noGrad(() => (teacher as UNet)(...asked)),
          target,
          conditioning: told(inputs),
          get unconditional() {
            return told(fromAside(inputs));
          },
        },
        inputs,
      ),
    );
  };
  const twinOf = (substitute: Substitute) => twinPipeline(run, pipeline, networks, added, substitute);
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
  /** The model with other weights in what is trained; the model itself where there are none. */
  const averaged = (weights: Weights): Pipeline => (weights ? twinOf(lent(weights)).other : pipeline);
  return {
    components,
    adapters: added?.adapters,
    async prepare({ bucket, samples }, epoch, signal) {
      const views = withRejected(samples.map((i) => viewIn(epoch, i, pictures, run)));
      const { seed } = run;
      const latents = views.map((view) =>
        drawLatents(moments(view), view, pipeline.vae.config, { seed, epoch }),
      );
      const [, height, width] = latentShape(bucket, 1);
      const batch = {
        ids: views.map(({ sample }) => sample.key),
        ...{ epoch, latents: joined(latents), height, width },
        weights: hasPrior ? priorWeights(views, run) : undefined,
      };
      const chosen = views.map((view) => {
        if (control.isUnprompted?.(view, epoch)) return undefined;
        const { captions: choices, key } = view.sample;
        return captionOf(choices, run.dataset, { seed, epoch, key });
      });
      const inputs = {
        ...method.inputs(batch),
        timeIds: timeIdsInput(views, pipeline, run),
        ...texts.inputs(chosen),
        ...(method.asks.unconditional && aside(texts.inputs(chosen.map(() => undefined)))),
        ...(await control.inputs(views, epoch, signal)),
      };
      return { ...inputs, ...dropout.inputs(inputs, batch.ids, epoch) };
    },
    blank({ bucket, samples }) {
      const n = samples.length * (run.dataset.rejected_image_column ? 2 : 1);
      const shape = latentShape(bucket, n);
      const ids = pipeline.aesthetic ? 5 : 6;
      const timeIds: HostTensor = { shape: [n, ids], values: new Float32Array(n * ids), dtype: 'float32' };
      const inputs = {
        ...method.blank(shape),
        timeIds,
        ...texts.blank(n),
        ...(method.asks.unconditional && aside(texts.blank(n))),
        ...control.blank(n, pictures.buckets[bucket]),
      };
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

/** The model as it is loaded, where the method asks it. */
function teacherFor(
  run: Run,
  { asks }: Method,
  { unetConfig }: Pipeline,
  net: Component,
): Teacher | undefined {
  if (!asks.teacher) return undefined;
  return teacherOf(unetConfig, net, new Set(run.train.target === 'unet' ? net.trained : []));
}

/** What passes have besides, such as what becomes of a run's conditioning images, or of its pictures as image prompts. */
function controlOf(run: Run, pipeline: Pipeline, { beside, images }: Prepared): Control {
  if (run.train.target === 'controlnet') return controlled(run);
  if (run.train.target === 't2i_adapter') return adapted(run, pipeline);
  if (images) return prompted(run, pipeline, images);
  const weighed = run.objective.masked_loss ? masked(run, pipeline.ratio) : uncontrolled;
  const edits = run.dataset.original_image_column !== '';
  if (!edits && !run.inpainting.mask_mode) return weighed;
  const seeing = (edits ? editing : paintingIn)(run, pipeline, beside);
  return {
    ...seeing,
    inputs: async (...asked) => ({ ...(await weighed.inputs(...asked)), ...(await seeing.inputs(...asked)) }),
    blank: (...asked) => ({ ...weighed.blank(...asked), ...seeing.blank(...asked) }),
  };
}

/** What the i-th preview is over: its own of previews.validation_image, or the one for all. */
const imageOf = ({ validationImages: images }: Pictures, i: number) => images.at(i) ?? images.at(0);

/** What the model is made of, which of it a run trains, and the pipeline with what that puts on it. */
function partsOf(run: Run, pipeline: Pipeline, sources: Sources, { samples }: Pictures) {
  const { source, controlSource, ipAdapter, checkpoint } = sources;
  const { parts, text_encoders, target } = run.train;
  const { encoders } = pipeline.text;
  const names = textParts(source);
  const lr = blockRates(run, pipeline.unetConfig);
  const isTrained = (key: string) =>
    lr(key) !== 0 && (parts.length === 0 || parts.some((part) => key.includes(part)));
  const net = component('unet', source.config('unet'), pipeline.unet, { isTrained, lr });
  const ofTexts = { lr: () => run.optimizer.text_encoder_lr || undefined };
  const texts = encoders.map(({ encoder }, i) =>
    component(names[i], source.config(names[i]), encoder, ofTexts),
  );
  const networks = { net, texts };
  if (target === 'unet') return { pipeline, networks, components: [net, ...(text_encoders ? texts : [])] };
  // Made last: what is listed above is the model alone.
  if (target === 'controlnet' || target === 't2i_adapter') {
    const put = target === 'controlnet' ? withControlNet : withT2IAdapter;
    const { other, added } = put(run, pipeline, source, controlSource);
    return { pipeline: other, networks, added, components: [added.component] };
  }
  if (ipAdapter) {
    const { other, added } = withIPAdapter(run, pipeline, source, ipAdapter);
    return { pipeline: other, networks, added, components: [added.component] };
  }
  const resumed = checkpoint !== undefined;
  const added =
    target === 'lora'
      ? adapters(run, pipeline, networks, resumed)
      : withToken(run, pipeline, samples, resumed);
  return { pipeline, networks, added, components: [added.component] };
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
