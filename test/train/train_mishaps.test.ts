// What goes wrong while a run trains, or what ends it early: nothing that was trained is lost, and what is missing is made when the run
// goes on.
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { MemoryError } from '../../engine/memory.ts';
import { writePng } from '../../io/image.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { openMaterials } from '../../train/materials.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { picture } from '../support/controlnet_golden.ts';
import {
  basic,
  control,
  controlled,
  device,
  digest,
  folder,
  locate,
  pictures,
  run,
  silent,
} from '../support/small_runs.ts';

test('a run draws the previews that it had saved before and was ended at', async (t) => {
  const previews = { prompts: ['a', 'b'], num_inference_steps: 2, every_steps: 1 };
  const input = (output: string): RunInput => ({ ...basic(output), steps: 3, previews });
  const drawn = ({ output = '' }: RunInput) =>
    [
      'previews.png',
      ...[1, 2, 3].flatMap((step) => [0, 1].map((i) => `previews/step-0000000${step}/${i}.png`)),
    ]
      .map((name) => join(output, name))
      .map((path) => existsSync(path) && readFileSync(path).toString('base64'));
  const [whole, broken] = [input('drawn-whole'), input('drawn-broken')];
  await run(whole);
  const { folder: checkpoint } = await run(broken, { until: 2 });
  t.notOk(existsSync(join(broken.output as string, 'previews', 'step-00000002')), 'left for whoever waits');
  const { folder: finished } = await run(broken, { checkpoint });
  t.same(drawn(broken), drawn(whole), 'drawn when it goes on');
  // As killed after the last update.
  for (const left of [finished, join(broken.output as string, 'previews', 'step-00000003')])
    rmSync(left, { recursive: true });
  const last = listCheckpoints(broken.output as string).at(-1) as string;
  await run(broken, { checkpoint: last });
  t.same(drawn(broken), drawn(whole), 'after the last update too');
  // As killed between a step's pictures and the sheet.
  writeFileSync(join(broken.output as string, 'previews.png'), 'older');
  await run(broken, { checkpoint: last });
  t.same(drawn(broken), drawn(whole), 'and the sheet has all');
});

test('what fails beside the weights costs no update that was made', async (t) => {
  const whole = { ...basic('unhurt'), checkpoints: { every_steps: 100 } };
  await run(whole);
  const newest = ({ output }: RunInput) => listCheckpoints(output as string).at(-1) as string;
  const cache = join(folder, 'lost');
  for (const [what, at, says] of [
    ['cache', cache, /prepared from .*, is gone from the cache: start again/],
    ['log', join(folder, 'hurt-log', 'log.jsonl'), /log\.jsonl is a folder/],
  ] as const) {
    const hurt = { ...whole, output: join(folder, `hurt-${what}`), dataset: { ...whole.dataset, cache } };
    const meanwhile = (label: string, done: number) => {
      if (label !== 'training' || done !== 3) return;
      rmSync(at, { recursive: true });
      if (what === 'log') mkdirSync(at);
    };
    await t.rejects(run(hurt, { meanwhile }), { name: 'UserError', message: says }, what);
    const step = Number(newest(hurt).slice(-8));
    t.ok(step === 3 || step === 4, `saved after update ${step}`);
    rmSync(join(hurt.output, 'log.jsonl'), { recursive: true });
    await run(hurt, { checkpoint: newest(hurt) });
    t.equal(digest(newest(hurt)), digest(newest(whole)), 'and goes on as if nothing had been');
  }
});

test('a picture that has changed since it was looked at is not trained on', async (t) => {
  for (const [target, of, changes] of [
    ['vae', pictures, /^\d\.png$/],
    ['controlnet', controlled, /conditioning_image/],
  ] as const) {
    const path = join(folder, `changing-${target}`);
    cpSync(of, path, { recursive: true });
    const input: RunInput = {
      ...{ ...basic(`changed-${target}`), ...control, train: { target } },
      ...{ dataset: { ...control.dataset, path }, steps: 8, checkpoints: { every_steps: 100 } },
      ...(target === 'vae' && { controlnet: {} }),
    };
    const meanwhile = (label: string, done: number) => {
      if (label !== 'training' || done !== 1) return;
      for (const name of readdirSync(path))
        if (changes.test(name)) writePng(join(path, name), picture(20, 48, 40));
    };
    const message = /\.png was changed since it was looked at: put it back, or start anew/;
    await t.rejects(run(input, { meanwhile }), { name: 'UserError', message }, target);
    t.equal(listCheckpoints(input.output as string).length, 1, 'what was trained until then is saved');
  }
});

test('a run that goes on with other captions says so', async (t) => {
  const path = join(folder, 'retold');
  cpSync(pictures, path, { recursive: true });
  const input: RunInput = { ...basic('retold'), dataset: { path, resolution: 32 } };
  const { folder: checkpoint } = await run(input, { until: 1 });
  const told = async (): Promise<string[]> => {
    const lines: string[] = [];
    const report = { ...silent, line: (text: string) => void lines.push(text) };
    await openMaterials(resolveRun(input, 'test', 'test'), locate, report, { checkpoint });
    return lines;
  };
  t.same(await told(), []);
  writeFileSync(join(path, '3.txt'), 'a plain caption\n');
  const [line, ...others] = await told();
  t.match(line, /step-00000001 was trained with other captions than .*retold holds now; the run goes on/);
  t.same(others, []);
});

test('previews and passes that find no memory cost no update', async (t) => {
  const once = { gradient_accumulation_steps: 1 };
  const fused = { ...once, train: { fused_backward_pass: true } };
  for (const [name, more, whole] of [
    ['drawing', { previews: { prompts: ['a'], every_steps: 3 } }, {}],
    ['passing', {}, {}],
    ['fused', fused, once],
  ] as [string, RunInput, RunInput][]) {
    const hurt = { ...basic(`no-memory-${name}`), checkpoints: { every_steps: 100 }, ...more };
    const { execute } = device;
    // After the third update.
    const meanwhile = (label: string, done: number) => {
      if (label !== 'training' || done !== 3) return;
      device.execute = () => {
        throw new MemoryError('out of memory: tensors at work 9 GiB');
      };
    };
    const message = 'out of memory: tensors at work 9 GiB; `sdxl plan` with --vram tells what to set';
    await t.rejects(run(hurt, { meanwhile }), { name: 'MemoryError', message }, name);
    device.execute = execute;
    const [saved] = listCheckpoints(hurt.output as string);
    t.match(saved, /step-00000003$/, 'updates until then are saved');
    const unhurt = { ...basic(`with-memory-${name}`), checkpoints: { every_steps: 3 }, ...whole };
    await run(unhurt);
    t.equal(digest(saved), digest(listCheckpoints(unhurt.output as string)[0]));
  }
});

test('stopped while updates fail, a run keeps what it saved before', async (t) => {
  const optimizer = { lr: 1e30, max_grad_norm: 0 };
  const failing = {
    ...basic('failing'),
    optimizer,
    lr_scheduler: {},
    checkpoints: { every_steps: 1, keep: 1 },
  };
  const { position } = await run(failing, { until: 2 });
  t.equal(position.step, 2);
  t.same(
    listCheckpoints(failing.output as string).map((path) => Number(path.slice(-8))),
    [1, 2],
  );
});
