// ControlNets under sd-webui-controlnet's control modes against diffusers with features weighed so (golden/control_balance.jsonl): whole calls.
// That `sdxl sample` says it to each, and mistakes.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at, type Call, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';

testCalls(goldenLines<Call>('control_balance'), 4, 0);

writePng(at('seen.png'), picture(1, 64, 64));
const sample = (...argv: string[]) =>
  sdxl(
    ...['sample', '--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a fox', '--quiet', '--seed', '1'],
    ...['--width', '64', '--height', '64', '--steps', '2', ...argv],
  );
const follow = ['--controlnet', at('full'), '--control-image', at('seen.png')];

test('sdxl sample', async (t) => {
  const drawn = async (name: string, ...argv: string[]) => {
    const { status, err } = await sample(...argv, '--output', at(name));
    t.equal(status, 0, err);
    return (await readPicture(at(name))).data;
  };
  const balance = (...names: string[]) => names.flatMap((name) => ['--control-balance', name]);
  const both = await drawn('both.png', ...follow, ...follow, ...balance('more_control', 'balanced'));
  const turned = await drawn('turned.png', ...follow, ...follow, ...balance('balanced', 'more_control'));
  t.ok(maxDifference(both, turned) <= 1, 'two that see the same, one each way');
  t.ok(maxDifference(both, await drawn('plain.png', ...follow, ...follow)) > 1);
  t.equal((await sdxl('sample', '--from', at('both.png'), '--output', at('again.png'), '--quiet')).status, 0);
  t.ok(readFileSync(at('again.png')).equals(readFileSync(at('both.png'))), 'and again by its settings');
});

test('mistakes', async (t) => {
  await refusesEach(t, sample, [
    [['--control-balance', 'more_control'], /--control-balance needs --controlnet/],
    [[...follow, '--control-balance', 'more'], /--control-balance takes balanced, more_prompt, more_control/],
    [
      [...follow, '--guess-mode', '--control-balance', 'more_control'],
      /guess_mode \(--guess-mode\) and control_balance \(--control-balance\) both weigh/,
    ],
    [
      [...follow, '--pag-scale', '3', '--control-balance', 'more_control'],
      /control_balance \(--control-balance\) more_control and pag_scale \(--pag-scale\) do not go together/,
    ],
  ]);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  for (const [control_balance, says] of [
    ['more', /control_balance is "more": give one of balanced, more_prompt, more_control, or a list/],
    [[], /control_balance is \[\]/],
  ] as const)
    await t.rejects(
      latentsOf(pipeline, { prompt: 'a fox', control_balance: control_balance as 'balanced' }),
      {
        message: says,
      },
    );
  pipeline.release();
});
