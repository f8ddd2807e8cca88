// What DeepCache saves, and how far its pictures are from those without: `node dist/bench/deepcache.js pictures` draws with the emoji model,
// every interval in turns; `node dist/bench/deepcache.js passes` times passes of the full-size base UNet on random weights, the whole one
// and those that are cut. Times are medians. bench/results/deepcache.md has what it printed.
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { openDevice } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import { scope } from '../engine/scope.ts';
import { packageRoot } from '../io/package_root.ts';
import { openModel } from '../models/checkpoint/checkpoint.ts';
import { presets } from '../models/formats/presets.ts';
import { decode, denoiseToEnd, loadPipeline } from '../models/pipeline.ts';
import { TorchGenerator } from '../models/random/torch_random.ts';
import { deepCache } from '../models/unet/deepcache.ts';
import { unet } from '../models/unet/unet.ts';
import { fillRandom } from './pool_weights.ts';
import { unetInputs } from './subjects.ts';
import { median, stopwatch } from './timing.ts';

const prompts = ['red heart', 'smiling cat face', 'green apple', 'rocket', 'sun behind cloud'];
const [PEAK, ROUNDS] = [255, 5];

/** Peak signal to noise ratio of bytes, dB. */
function psnr(a: Uint8Array, b: Uint8Array): number {
  const square = a.reduce((sum, x, i) => sum + (x - b[i]) ** 2, 0) / a.length;
  return 10 * Math.log10(PEAK ** 2 / square);
}

/** Each prompt from each seed, at all settings before the next. */
async function pictures(steps: number): Promise<void> {
  const device = openDevice('cpu');
  const pipeline = loadPipeline(openModel(join(packageRoot, 'assets', 'emoji')), {
    device,
    dtype: 'float32',
  });
  const settings = [1, 2, 3, 5].flatMap((interval) =>
    (interval === 1 ? [0] : [0, 1, 2, 4]).map((branch) => ({ interval, branch, seconds: [], psnr: [] })),
  ) as { interval: number; branch: number; seconds: number[]; psnr: number[] }[];
  for (const seed of [0, 1, 2, 3])
    for (const prompt of prompts) {
      let whole = new Uint8Array();
      for (const { interval, branch, ...found } of settings) {
        const began = performance.now();
        const { latents } = await denoiseToEnd(pipeline, {
          ...{ prompt, num_inference_steps: steps, generators: [new TorchGenerator(seed)] },
          ...{ cache_interval: interval, cache_branch_id: branch },
        });
        // The first call of all fills caches.
        if (seed > 0) found.seconds.push((performance.now() - began) / 1000);
        const [{ data }] = decode(pipeline, latents);
        if (interval === 1) whole = Uint8Array.from(data);
        else found.psnr.push(psnr(data, whole));
      }
    }
  const [{ seconds: base }] = settings;
  console.log(
    '| interval | branch | s | of interval 1 | PSNR dB, median | least |\n|---|---|---|---|---|---|',
  );
  for (const { interval, branch, seconds, psnr: near } of settings) {
    // Of each picture by itself, as other work on the machine comes and goes.
    const ratio = median(seconds.map((s, i) => s / base[i]));
    const likeness = near.length ? [median(near), Math.min(...near)].map((x) => x.toFixed(1)) : ['', ''];
    console.log(
      `| ${[interval, branch, median(seconds).toFixed(3), ratio.toFixed(2), ...likeness].join(' | ')} |`,
    );
  }
  pipeline.release();
}

/** A pass of the base UNet for the two rows of guidance, whole and cut at each branch, in turns. */
function passes(side: number): void {
  const device = openDevice('cpu');
  const model = unet(presets['sdxl-base'].unet);
  fillRandom(model, device, 'bfloat16');
  const sizes = { width: side, height: side, batch: 2 };
  const { sample, times, conditioning, release } = unetInputs(
    presets['sdxl-base'],
    sizes,
    device,
    'bfloat16',
  );
  const deep = [0, 1, 2, 3, 4, 5, 6, 7, 8].map((branch) => ({
    ...deepCache(branch),
    branch,
    seconds: [] as number[],
  }));
  const whole: number[] = [];
  const pass = (feature?: Parameters<typeof model>[4]): number =>
    stopwatch(
      () => noGrad(() => scope(() => void model(sample, times, conditioning, undefined, feature))),
      device,
    );
  for (const each of deep) pass(each.whole);
  for (let round = 0; round < ROUNDS; round++) {
    whole.push(pass());
    for (const { shallow, seconds } of deep) seconds.push(pass(shallow));
  }
  console.log('| pass | ms | of the whole | a step of interval 2 | 3 | 5 |\n|---|---|---|---|---|---|');
  console.log(`| whole | ${(1000 * median(whole)).toFixed(0)} | | | | |`);
  for (const { branch, seconds } of deep) {
    const part = median(seconds.map((s, i) => s / whole[i]));
    const steps = [2, 3, 5].map((n) => ((1 + (n - 1) * part) / n).toFixed(2));
    console.log(
      `| branch ${branch} | ${[(1000 * median(seconds)).toFixed(0), part.toFixed(3), ...steps].join(' | ')} |`,
    );
  }
  for (const each of deep) each.release();
  release();
  unload(model);
}

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { steps: { type: 'string', default: '30' }, side: { type: 'string', default: '512' } },
});
if (positionals[0] === 'pictures') await pictures(Number(values.steps));
else if (positionals[0] === 'passes') passes(Number(values.side));
else console.error('give "pictures" (--steps N) or "passes" (--side PIXELS)');
