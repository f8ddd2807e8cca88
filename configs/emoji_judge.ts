// Judges the small model: for each prompt and seed of judged.jsonl, is the generated latent nearer (Euclidean, in the VAE's
// latent space) to the prompt's own emoji than to another one drawn at random? No judged prompt is a training caption.
//   node dist/configs/emoji_judge.js MODEL FOLDER [--steps N] [--guidance-scale F]
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { openDevice } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { scope } from '../engine/scope.ts';
import { preprocess, readPicture } from '../io/image.ts';
import { openModel } from '../models/checkpoint/checkpoint.ts';
import { denoise, loadPipeline, type Pipeline } from '../models/pipeline.ts';
import { TorchGenerator } from '../models/random/torch_random.ts';
import { withPosterior } from '../models/vae/autoencoder.ts';
import { toDevice, toHost } from '../models/vae/latents.ts';
import { draws } from '../train/data/draws.ts';
import { drawEmoji } from './emoji_data.ts';

interface Judged {
  file_name: string;
  prompt: string;
  seed: number;
}

const batch = 20;

/** Latents of a generated picture for each prompt, at the model's own size. */
function generate(
  pipeline: Pipeline,
  pairs: readonly Judged[],
  steps: number,
  guidance: number,
): Float32Array[] {
  const made: Float32Array[] = [];
  for (let at = 0; at < pairs.length; at += batch) {
    const some = pairs.slice(at, at + batch);
    const loop = denoise(pipeline, {
      prompt: some.map(({ prompt }) => prompt),
      generators: some.map(({ seed }) => new TorchGenerator(seed)),
      width: pipeline.sampleSize,
      height: pipeline.sampleSize,
      num_inference_steps: steps,
      guidance_scale: guidance,
    });
    let turn = loop.next();
    while (!turn.done) turn = loop.next();
    const { data } = turn.value.latents;
    const size = data.length / some.length;
    for (let i = 0; i < some.length; i++) made.push(data.slice(i * size, (i + 1) * size));
    process.stderr.write(`\r${made.length} of ${pairs.length}`);
  }
  process.stderr.write('\n');
  return made;
}

/** The mean of the VAE's posterior, scaled as the UNet sees it, in the layout of generated latents. */
async function encoded(pipeline: Pipeline, path: string): Promise<Float32Array> {
  const { device, sampleSize } = pipeline;
  const vae = withPosterior(pipeline.vae, path);
  const picture = preprocess(await readPicture(path), sampleSize, sampleSize);
  return noGrad(() =>
    scope(() => {
      const { mean } = vae.encode(toDevice(picture, device, 'float32'));
      return toHost(mean).data.map((value) => value * vae.config.scaling_factor);
    }),
  );
}

const distance = (a: Float32Array, b: Float32Array): number =>
  Math.sqrt(a.reduce((sum, value, i) => sum + (value - b[i]) ** 2, 0));

async function judge(model: string, folder: string, steps: number, guidance: number) {
  await drawEmoji(folder);
  const lines = readFileSync(join(folder, 'judged.jsonl'), 'utf8').trim().split('\n');
  const pairs = lines.map((line) => JSON.parse(line) as Judged);
  const pipeline = loadPipeline(openModel(model), { device: openDevice('auto'), dtype: 'float32' });
  const wanted = await Promise.all(pairs.map(({ file_name }) => encoded(pipeline, join(folder, file_name))));
  const made = generate(pipeline, pairs, steps, guidance);
  const won = made.map((latents, i) => {
    // Another than its own, uniformly.
    const step = 1 + draws(0, 0, pairs[i].seed, 'order').integer(pairs.length - 1);
    return distance(latents, wanted[i]) < distance(latents, wanted[(i + step) % pairs.length]);
  });
  const nearest = made.map((latents, i) => {
    const all = wanted.map((other) => distance(latents, other));
    return all.filter((value) => value < all[i]).length;
  });
  const share = (count: number) => Number((count / pairs.length).toFixed(4));
  return {
    pairs: pairs.length,
    steps,
    guidance_scale: guidance,
    nearer_to_own_than_to_a_random_one: share(won.filter(Boolean).length),
    own_is_nearest_of_all: share(nearest.filter((rank) => rank === 0).length),
    mean_rank: nearest.reduce((a, b) => a + b, 0) / pairs.length,
    lost: pairs.filter((_, i) => !won[i]).map(({ prompt }) => prompt),
  };
}

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { steps: { type: 'string', default: '25' }, 'guidance-scale': { type: 'string', default: '4' } },
});
const [model, folder] = positionals;
if (!model || !folder) {
  console.error('usage: node dist/configs/emoji_judge.js MODEL FOLDER [--steps N] [--guidance-scale F]');
  process.exitCode = 2;
} else {
  const verdict = await judge(model, folder, Number(values.steps), Number(values['guidance-scale']));
  console.log(JSON.stringify(verdict, null, 2));
}
