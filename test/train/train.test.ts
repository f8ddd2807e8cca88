// Training as a whole, on the tiny golden model and a folder of a few pictures: a run leaves everything it promises; a run
// that is stopped and resumed ends in the same bytes as one that is not; batches split or accumulated see the same draws.
import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { readPicture } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { decode, denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { isFinished } from '../../train/final.ts';
import { readLog } from '../../train/log/log.ts';
import { openMaterials } from '../../train/materials.ts';
import { planOf } from '../../train/plan.ts';
import { loadRuns } from '../../train/run/load_run.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { packageRoot } from '../support/golden.ts';
import {
  basic,
  device,
  digest,
  folder,
  locate,
  losses,
  model,
  pictures,
  run,
  silent,
} from '../support/small_runs.ts';

test('a run leaves what it promises, and a resumed one the same bytes', async (t) => {
  const before = device.memory.storages;
  const previews = { prompts: ['stripes', 'a picture'], num_inference_steps: 2, every_steps: 2 };
  const validation = { samples: 4, every_steps: 2 };
  const whole = { ...basic('whole'), previews, validation };
  const { folder: final } = await run(whole);
  const output = whole.output as string;
  t.same(
    listCheckpoints(output).map((path) => path.slice(-8)),
    ['00000004', '00000005'],
    'the newest two checkpoints',
  );
  t.equal(readLog(join(output, 'log.jsonl')).length, 5, 'a line an update');
  t.match(readFileSync(join(output, 'loss.svg'), 'utf8'), /<polyline/, 'a loss curve');
  const sheet = await readPicture(join(output, 'previews.png'));
  t.same(
    [sheet.width, sheet.height],
    [4 + 16 + 2 * 36, 4 + 3 * 36],
    'three rows: the step, and two previews',
  );
  t.ok(readdirSync(join(output, 'tensorboard')).length === 1, 'an event file');
  loadPipeline(openModel(final), { device, dtype: 'float32' }).release();
  t.pass('the finished model opens');

  const broken = { ...basic('broken'), previews, validation };
  const first = await run(broken, { until: 3 });
  t.equal(first.stopped, true);
  t.equal(first.position.step, 3, 'stopped after the update');
  t.match(first.folder, /step-00000003$/, 'and saved there');
  // What a run that is killed later leaves beside its last checkpoint.
  appendFileSync(join(broken.output as string, 'log.jsonl'), 'null\n{"step":4,"loss":9}\n{"step":5,"lo');
  const drawn = join(broken.output as string, 'previews', 'step-00000099');
  mkdirSync(drawn);
  await run(broken, { checkpoint: first.folder });
  t.notOk(existsSync(drawn), 'what comes later is forgotten');
  const newest = (path: string) => listCheckpoints(path).at(-1) as string;
  t.equal(
    digest(newest(broken.output as string)),
    digest(newest(output)),
    'the same weights, optimizer and EMA',
  );
  t.same(losses(broken.output as string), losses(output), 'the same losses, each once');
  t.same(
    losses(output).flatMap(([step, , measured]) => (measured === undefined ? [] : [step])),
    [2, 4, 5],
    'the validation loss is measured when it is due, and at the end',
  );
  t.equal(device.memory.storages, before, 'live tensors');
});

test('a run taken up again from an earlier checkpoint keeps what it makes, not what was made before', async (t) => {
  const again = { ...basic('again'), checkpoints: { every_steps: 1, keep: 4 } };
  await run(again);
  const steps = () => listCheckpoints(again.output as string).map((path) => Number(path.slice(-8)));
  t.same(steps(), [2, 3, 4, 5]);
  const [checkpoint] = listCheckpoints(again.output as string);
  const lower = { ...again, optimizer: { lr: 1e-4 }, checkpoints: { every_steps: 1, keep: 2 } };
  const { folder: saved } = await run(lower, { checkpoint, until: 3 });
  t.same([Number(saved.slice(-8)), steps()], [3, [2, 3]]);
});

test('previews are square, whatever shapes the pictures have', async (t) => {
  const input = basic('shapes');
  const previews = { prompts: ['stripes'], num_inference_steps: 1, every_steps: 1 };
  const dataset = { ...input.dataset, resolution: 128, aspect_ratio_buckets: true };
  const output = input.output as string;
  await run({ ...input, previews, dataset, steps: 1 });
  const { width, height } = await readPicture(join(output, 'previews', 'step-00000001', '0.png'));
  t.same([width, height], [128, 128]);
});

test('previews are what their prompts draw, though the text encoders are gone by then', async (t) => {
  const settings = { num_inference_steps: 2, guidance_scale: 4 };
  const first = { prompt: 'stripes', negative_prompt: 'a circle', width: 32, height: 40 };
  const still = { ...basic('drawn'), steps: 1, optimizer: { lr: 0 }, lr_scheduler: {}, ema: {} };
  await run({ ...still, previews: { ...settings, seed: 8, prompts: [first, 'no circle'] } });
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  for (const [i, asked] of [first, { prompt: 'no circle', width: 32, height: 32 }].entries()) {
    const request = { ...settings, ...asked, generators: [new TorchGenerator(8 + i)] };
    const [{ data }] = decode(pipeline, (await denoiseToEnd(pipeline, request)).latents);
    const preview = await readPicture(join(folder, 'drawn', 'previews', 'step-00000001', `${i}.png`));
    t.ok(Buffer.from(preview.data).equals(data), `picture ${i}`);
  }
  pipeline.release();
});

test('other pictures than it was trained on are refused before they are encoded', async (t) => {
  const own = join(folder, 'own-pictures');
  cpSync(pictures, own, { recursive: true });
  const input = { ...basic('pictures'), steps: 2 };
  const dataset = { ...input.dataset, path: own, cache: join(folder, 'pictures-cache') };
  const { folder: checkpoint } = await run({ ...input, dataset }, { until: 1 });
  rmSync(join(folder, 'pictures-cache'), { recursive: true });
  cpSync(join(own, '0.png'), join(own, '6.png'));
  writeFileSync(join(own, '6.txt'), 'one more');
  await t.rejects(run({ ...input, dataset }, { checkpoint }), {
    message: /was trained on other pictures than/,
  });
  t.notOk(existsSync(join(folder, 'pictures-cache')));
});

test('going back drops what was trained since once an update takes its place, and not before', async (t) => {
  const checkpoints = { every_steps: 1, keep: 9 };
  const previews = { prompts: ['stripes'], num_inference_steps: 1, every_steps: 1 };
  const input = { ...basic('back'), checkpoints, previews };
  const output = input.output as string;
  await run(input);
  const left = () => ({
    checkpoints: listCheckpoints(output).map((path) => Number(path.slice(-8))),
    log: losses(output).map(([step]) => step),
    previews: readdirSync(join(output, 'previews')).map((name) => Number(name.slice(-8))),
    finished: isFinished(resolveRun(input, 'test', 'test')),
    final: existsSync(join(output, 'final')),
  });
  const all = [1, 2, 3, 4, 5];
  const whole = { checkpoints: all, log: all, previews: all, finished: true, final: true };
  t.same(left(), whole);
  const checkpoint = listCheckpoints(output)[1];
  const cache = join(folder, 'back-cache');
  const unprepared = { ...input, dataset: { ...input.dataset, cache } };
  // The last that is heard before the first update.
  const meanwhile = (label: string, done: number, total: number) => {
    if (label === 'encoding captions' && done === total) rmSync(cache, { recursive: true });
  };
  await t.rejects(run(unprepared, { checkpoint, meanwhile }), { message: /is gone from the cache/ });
  t.same(left(), whole, 'an update that fails costs nothing');
  const killed = (label: string) => {
    if (label === 'training') throw new Error('killed');
  };
  await t.rejects(run(input, { checkpoint, meanwhile: killed }), { message: 'killed' });
  t.same(
    left(),
    { checkpoints: [1, 2], log: [1, 2, 3], previews: [1, 2], finished: false, final: false },
    'killed after an update, before it is saved, the run goes on from where it was gone back to',
  );
});

test("a plan's memory is what a run takes, whose later passes find the gradients of earlier ones", async (t) => {
  const { dataset } = basic('');
  const vae: RunInput = { train: { target: 'vae' }, dataset: { ...dataset, resolution: 64 } };
  const drawn: RunInput = { dataset: { ...dataset, shuffle_caption: true, caption_dropout_rate: 0.9 } };
  const lean: RunInput = {
    dtype: 'bfloat16',
    train: { fused_backward_pass: true, gradient_checkpointing: true },
  };
  const validation: RunInput = { validation: { samples: 2, every_steps: 1 } };
  for (const [i, more] of [
    { ...vae, gradient_accumulation_steps: 1 },
    { ...vae, gradient_accumulation_steps: 2 },
    // Captions that go through the encoders in the pass, some of which are left away.
    { ...drawn, gradient_accumulation_steps: 1 },
    // Of a few weights, whose norms are more than nothing.
    { train: { target: 'lora' as const }, gradient_accumulation_steps: 1 },
    // Previews that are larger than passes, and find no gradients.
    {
      gradient_accumulation_steps: 1,
      previews: { prompts: [{ prompt: 'a', width: 192, height: 192 }], num_inference_steps: 1 },
    },
    // A validation by weights that the averages lend.
    { ...lean, ...validation, gradient_accumulation_steps: 1 },
    // Averages that nobody asks to be lent.
    { ...lean, gradient_accumulation_steps: 1 },
  ].entries()) {
    const input: RunInput = { ...basic(`planned-${i}`), steps: 2, ...more };
    const [planned] = planOf(await openMaterials(resolveRun(input, '', ''), locate, silent), [
      device,
    ]).memory_bytes;
    await run(input);
    const { peak } = device.memory;
    t.ok(planned >= peak && planned < 1.02 * peak, `planned ${planned}, taken ${peak}`);
  }
});

test('a batch and its halves see the same draws', async (t) => {
  const losses = async (output: string, batch_size: number, gradient_accumulation_steps: number) => {
    const input = { ...basic(output), batch_size, gradient_accumulation_steps, steps: 3 };
    await run(input);
    return readLog(join(input.output as string, 'log.jsonl')).map(({ loss }) => loss);
  };
  const [whole, halves] = [await losses('four', 4, 1), await losses('two', 2, 2)];
  whole.forEach((loss, i) => {
    t.ok(Math.abs(loss - halves[i]) < 2e-6 * loss, `update ${i + 1}: ${loss} and ${halves[i]}`);
  });
});

test('the validation loss sees the same draws each time, with the averaged weights', async (t) => {
  for (const target of ['unet', 'vae'] as const) {
    const still = `still-${target}`;
    const task: RunInput = { train: { target }, validation: { samples: 6, every_steps: 1 }, steps: 2 };
    await run({ ...basic(still), ...task, optimizer: { lr: 0 } });
    const [first, ...others] = losses(join(folder, still));
    const same = others.every(([, , measured]) => measured === first[2]);
    t.ok(first[2] && same, `${target}: weights that stand still have one validation loss, ${first[2]}`);
    t.not(others[0][1], first[1], 'while the updates differ in theirs');
    const moved = async (output: string, decay: number) => {
      await run({ ...basic(output), ...task, ema: { decay } });
      return losses(join(folder, output))[1];
    };
    const [own, averaged] = [await moved(`own-${target}`, 0), await moved(`averaged-${target}`, 0.9)];
    t.equal(own[1], averaged[1], 'an average changes no update');
    t.not(own[2], averaged[2], 'but the validation loss is its own');
  }
});

test('a run stopped while it prepares leaves what is prepared, and nothing else', async (t) => {
  const input = { ...basic('early'), steps: 1 };
  const cached = { ...input, dataset: { ...input.dataset, cache: join(folder, 'early-cache') } };
  for (const during of ['encoding pictures', 'encoding captions']) {
    const { stopped, folder: saved, position } = await run(cached, { during, until: 1 });
    t.same([stopped, saved, position.step], [true, '', 0], during);
    t.same(listCheckpoints(input.output as string), [], 'no checkpoint');
  }
  t.equal((await run(cached)).stopped, false, 'and begins anew');
});

test('every recipe in configs/ is a run', async (t) => {
  const recipes = readdirSync(join(packageRoot, 'configs')).filter((name) => /^(?!emoji).*\.ts$/.test(name));
  t.ok(recipes.length >= 3);
  for (const name of recipes) {
    const [recipe] = await loadRuns(join(packageRoot, 'configs', name), ['dataset.path=here']);
    t.equal(recipe.dataset.path, 'here', name);
  }
});

test('a run goes on from a checkpoint of a program that did not know all of its keys', async (t) => {
  const input = { ...basic('older'), steps: 2 };
  const stopped = await run(input, { until: 1 });
  const file = join(stopped.folder, 'state.json');
  const state = JSON.parse(readFileSync(file, 'utf8')) as { run: Record<string, Record<string, unknown>> };
  delete state.run.lora;
  delete state.run.objective.min_timestep;
  // Which this schedule does not follow and this optimizer does not have, and an older program passed over.
  [state.run.lr_scheduler.power, state.run.optimizer.d_coef] = [3, 2];
  writeFileSync(file, JSON.stringify(state));
  await t.rejects(
    run({ ...input, objective: { min_timestep: 5 } }, { checkpoint: stopped.folder }),
    { message: /is of another run: objective\.min_timestep was 0 and is 5;/ },
    'with their usual values',
  );
  await t.resolves(run(input, { checkpoint: stopped.folder }));
});
