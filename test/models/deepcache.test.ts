// DeepCache against its own helper over diffusers' pipelines (golden/deepcache.jsonl): whole calls. Which modules run, and
// `sdxl sample`. Recorded steps: cuda_recorded.test.ts.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { watchCalls } from '../../engine/module.ts';
import { preprocessControl } from '../../io/image.ts';
import { denoise, type Pipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at, type Call, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';
import { relativeError } from '../support/op_cases.ts';

testCalls(goldenLines<Call>('deepcache'), 13, 2);

const plain: Asked = {
  ...{ prompt: 'a red fox in the snow', negative_prompt: 'rain', width: 64, height: 64 },
  ...{ num_inference_steps: 4, guidance_scale: 5 },
};
const seeded = (more: Asked | Partial<Asked> = {}): Asked => ({
  ...plain,
  generators: [new TorchGenerator(3)],
  ...more,
});

test('an interval of 1 leaves every bit as it is, and a caller may leave at any step', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  const pipeline = pipelineOf('text2img', device);
  const loaded = device.memory.storages;
  const want = await latentsOf(pipeline, seeded());
  const one = await latentsOf(pipeline, seeded({ cache_interval: 1, cache_branch_id: 3 }));
  t.equal(maxDifference(one, want), 0);
  const two = await latentsOf(pipeline, seeded({ cache_interval: 2 }));
  t.ok(maxDifference(two, want) > 1e-2, 'of 2 it does not');
  const only = await latentsOf(pipeline, seeded({ cache_interval: 1000, num_inference_steps: 1 }));
  t.equal(
    maxDifference(only, await latentsOf(pipeline, seeded({ num_inference_steps: 1 }))),
    0,
    'the first step is whole',
  );
  for (const leaveAt of [1, 2, 3]) {
    for (const { step } of denoise(pipeline, seeded({ cache_interval: 2 }))) if (step === leaveAt) break;
    t.equal(device.memory.storages, loaded, `left at ${leaveAt}`);
  }
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

/** The resnets, transformers' levels and samplers that each call of a pipeline runs, and how often a ControlNet's and its zero convolutions. */
function modulesRun(pipeline: Pipeline, asked: Asked): { unet: string[]; control: string[] }[] {
  const steps: { unet: string[]; control: string[] }[] = [];
  let now = { unet: [] as string[], control: [] as string[] };
  // Both spell their paths alike; a ControlNet is done when its last zero convolution is.
  let met: string[] = [];
  const see = (path: string) => {
    if (/^controlnet_(down_blocks\.\d+|mid_block)$/.test(path)) {
      now.control.push(...met, path.replace('controlnet_', ''));
      met = [];
    } else if (/^conv_out$/.test(path)) {
      now.unet.push(...met);
      met = [];
      steps.push(now);
      now = { unet: [], control: [] };
    } else if (
      /^(down|up)_blocks\.\d\.(resnets|attentions|downsamplers|upsamplers)\.\d$|^mid_block$/.test(path)
    )
      met.push(
        path
          .replace('_blocks', '')
          .replace('resnets', 'r')
          .replace('attentions', 'a')
          .replace('samplers', ''),
      );
  };
  watchCalls(see, () => {
    for (const _ of denoise(pipeline, asked));
  });
  return steps;
}

test('which layers run', (t) => {
  const device = openDevice('cpu');
  const pipeline = pipelineOf('controlled', device);
  const controlled = { ...seeded(), control_image: [preprocessControl(picture(1, 64, 64))] };
  const of = (branch: number, interval = 3) =>
    modulesRun(pipeline, {
      ...{ ...controlled, generators: [new TorchGenerator(3)] },
      ...{ cache_interval: interval, cache_branch_id: branch },
    });
  const [first, second, third, fourth] = of(0);
  t.equal(first.unet.length, 12 + 1 + 17, 'all, of which the mid block counts once');
  t.same(
    [second, third].map(({ unet }) => unet),
    Array(2).fill(['up.2.r.2']),
  );
  t.same(second.control, ['down_blocks.0'], 'of a ControlNet what this takes');
  t.same(fourth, first, 'all again in the fourth call');
  t.same(of(2)[1].unet, ['down.0.r.0', 'down.0.r.1', 'up.2.r.0', 'up.2.r.1', 'up.2.r.2']);
  const down = ['down.0.r.0', 'down.0.r.1', 'down.0.down.0'];
  const up = ['up.1.r.2', 'up.1.a.2', 'up.1.up.0', 'up.2.r.0', 'up.2.r.1', 'up.2.r.2'];
  t.same(of(3)[1].unet, [...down, ...up], 'the downsampler is the first layer of the next level');
  t.same(of(4)[1].unet, [...down, 'down.1.r.0', 'down.1.a.0', 'up.1.r.1', 'up.1.a.1', ...up]);
  const last = of(8)[1];
  t.same(
    last.unet,
    first.unet.filter((path) => path !== 'mid_block'),
    'all but the middle block',
  );
  t.equal(last.control.at(-1), 'mid_block', 'what is added to its output is made anew');
  pipeline.release();
  t.end();
});

const sample = (...argv: string[]) =>
  sdxl(
    ...['sample', '--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a red fox in the snow'],
    ...['--width', '64', '--height', '64', '--steps', '4', '--seed', '3', '--quiet', ...argv],
  );

async function sampled(name: string, ...argv: string[]): Promise<Float32Array> {
  const saved = at(`${name}.safetensors`);
  const { status, err } = await sample(...argv, '--output', at(`${name}.png`), '--save-latents', saved);
  if (status !== 0) throw new Error(err);
  return savedLatents(saved);
}

test('sdxl sample', async (t) => {
  const flags = ['--negative-prompt', 'rain', '--cache-interval', '2', '--cache-branch-id', '1'];
  const drawn = await sampled('drawn', ...flags);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const own = await latentsOf(pipeline, seeded({ cache_interval: 2, cache_branch_id: 1 }));
  pipeline.release();
  t.equal(maxDifference(drawn, own), 0, "as a program's");
  const again = at('again.png');
  t.equal((await sdxl('sample', '--from', at('drawn.png'), '--output', again, '--quiet')).status, 0);
  t.ok(readFileSync(again).equals(readFileSync(at('drawn.png'))), 'the same picture and settings');
  const off = ['--from', at('drawn.png'), '--cache-interval', '1', '--output', at('off.png'), '--quiet'];
  t.equal((await sdxl('sample', ...off)).status, 0, 'which a flag switches off');
  const without = await sampled('without', '--negative-prompt', 'rain');
  t.notOk(readFileSync(at('off.png')).equals(readFileSync(again)));
  t.ok(maxDifference(without, drawn) > 1e-2);
  const shown = await sampled('shown', ...flags, '--preview', 'proj', '--preview-path', at('preview.png'));
  t.equal(maxDifference(shown, drawn), 0, 'a preview changes nothing');
  for (const type of ['--q8', '--fp8']) {
    const rounded = await sampled('rounded', ...flags, type);
    const [apart, plain] = [relativeError(rounded, drawn), relativeError(without, drawn)];
    t.ok(
      apart > 1e-4 && apart < plain,
      `${type}: ${apart} from the same in float32, which is ${plain} from all steps whole`,
    );
  }
  const [larger, largerWhole] = [
    await sampled('larger', ...flags, '--hires', '--hires-scale', '1.5'),
    await sampled('largerWhole', ...flags.slice(0, 2), '--hires', '--hires-scale', '1.5'),
  ];
  t.ok(maxDifference(larger, largerWhole) > 1e-2, 'a second pass is cached, too');
});

test('mistakes', async (t) => {
  await refusesEach(t, sample, [
    [['--cache-interval', '0'], /--cache-interval .* 1/],
    [['--cache-interval', '1.5'], /--cache-interval/],
    [['--cache-branch-id', '2'], /--cache-branch-id needs --cache-interval/],
    [
      ['--cache-interval', '2', '--cache-branch-id', '9'],
      /cache_branch_id \(--cache-branch-id\) is 9, and this UNet's branches are 0 to 8: give one of them/,
    ],
  ]);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  for (const [more, says] of [
    [{ cache_interval: 0 }, /cache_interval is 0: give a whole number from 1/],
    [{ cache_branch_id: -1 }, /cache_branch_id is -1: give a whole number from 0/],
    [{ cache_interval: 2, cache_branch_id: 9 }, /cache_branch_id .* 0 to 8/],
  ] as const)
    await t.rejects(latentsOf(pipeline, seeded(more)), { message: says });
  pipeline.release();
});
