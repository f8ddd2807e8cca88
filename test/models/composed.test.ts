// Prompts of which one picture is drawn together (A1111's AND): what a prompt comes to by A1111's own expressions, the formula of composable
// diffusion in float64 over predictions of one text each, beside all that has rows in a pass, and `sdxl sample`.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { preprocess, preprocessControl } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { composed } from '../../models/text/composed.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { picture } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, maxDifference } from '../support/golden.ts';
import { at, type Kind, latentsOf, pipelineOf, seeded } from '../support/golden_calls.ts';
import { says } from '../support/mistake.ts';

test("texts and weights as A1111's expressions have them", (t) => {
  for (const [prompt, ...parts] of [
    ['a cat AND a dog :0.8', ['a cat', 1], [' a dog', 0.8]],
    ['a cat :1.2 AND a dog: -.5 ', ['a cat', 1.2], [' a dog', -0.5]],
    ['BAND ANDY a AND\nb\n:2', ['BAND ANDY a', 1], ['\nb', 2]],
    ['a\nb :2 AND c:d AND :0.5', ['a\nb :2 ', 1], [' c:d', 1], [' ', 0.5]],
    ['[a AND b:c:3]', ['[a', 1], [' b:c:3]', 1]],
    ['(a:1.2) AND (b:.5):3. AND x:1.5e3', ['(a:1.2)', 1], [' (b:.5)', 3], [' x:1.5e3', 1]],
    ['a AND', ['a', 1], ['', 1]],
    ['éAND b AND c_AND d :  +2  ', ['éAND b', 1], [' c_AND d', 2]],
    ['a : 5 : 0.5 AND  b  ', ['a : 5', 0.5], ['  b', 1]],
  ] as const) {
    const told = composed(prompt, { emphasis: 'original', negative_prompt: ['rain'] });
    t.same(
      told.prompt,
      parts.map(([text]) => text),
      prompt,
    );
    t.same(
      told.prompt_weights,
      parts.map(([, weight]) => weight),
      prompt,
    );
    t.same(
      told.negative_prompt,
      parts.map(() => 'rain'),
    );
  }
  const one = { prompt: ['a :3'], prompt_weights: undefined };
  t.match(composed('a :3', { emphasis: 'original' }), one, 'one text counts whole');
  t.same(composed('a AND b', {}).prompt, ['a AND b'], 'where weights are not read it is a word');
  t.end();
});

const texts = ['a red fox in the snow', 'a blue cat', 'a map of Rome'];
const weights = [1, 0.8, -0.3];

test('a call is uncond + s sum(weight (text - uncond)), in float64', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  const smaller = { negative_original_size: [32, 32], negative_target_size: [32, 32] } as const;
  const inputs: [Kind, Partial<Asked>][] = [
    // Of several images diffusers gives the negative sizes to other rows.
    ['text2img', { ...smaller, num_images_per_prompt: 1 }],
    ['img2img', { ...smaller, image: preprocess(picture(4, 64, 64)), strength: 1 }],
    ['controlled', { control_image: [preprocessControl(picture(1, 64, 64))] }],
    ['adapted', { ip_adapter_image: [picture(1, 117, 149)] }],
    ['refiner', {}],
  ];
  for (const [kind, more] of inputs) {
    const pipeline = pipelineOf(kind, device);
    const drawn = (others: Partial<Asked>) =>
      latentsOf(pipeline, {
        ...seeded({ negative_prompt: 'rain', num_inference_steps: 1, num_images_per_prompt: 2, ...more }),
        ...{ scheduler: { name: 'euler', config: { timestep_spacing: 'trailing' } } },
        generators: [new TorchGenerator(3)],
        ...others,
      });
    const alone: Float32Array[] = [];
    for (const prompt of texts) alone.push(await drawn({ prompt, guidance_scale: 1 }));
    // Latents of one step of Euler's are a line in what is predicted.
    const guided = await drawn({ prompt: texts[0], guidance_scale: 3 });
    const uncond = Array.from(guided, (value, i) => (3 * alone[0][i] - value) / 2);
    for (const guidance_scale of [5, 1]) {
      const got = await drawn({ prompt: texts, prompt_weights: weights, guidance_scale });
      const want = uncond.map((from, i) =>
        weights.reduce((sum, weight, k) => sum + guidance_scale * weight * (alone[k][i] - from), from),
      );
      allClose(t, `${kind} ${guidance_scale}`, got, want, { atol: 3e-4, rtol: 1e-5 });
    }
    pipeline.release();
  }
  t.equal(device.memory.storages, before, 'live tensors');
});

test('whole pictures: a text that counts nothing is none, and halves of one text are it', async (t) => {
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const drawn = (more: Partial<Asked>) =>
    latentsOf(pipeline, seeded({ cache_interval: 2, emphasis: 'original', ...more }));
  const one = await drawn({ prompt: texts[0] });
  for (const [prompt, prompt_weights] of [
    [
      [texts[0], texts[1]],
      [1, 0],
    ],
    [
      [texts[0], texts[0]],
      [0.5, 0.5],
    ],
  ]) {
    const apart = maxDifference(await drawn({ prompt, prompt_weights } as Asked), one);
    t.ok(apart < 1e-4, `${prompt_weights}: ${apart}`);
  }
  const two = { prompt: texts.slice(0, 2), prompt_weights: [1, 1] };
  const refused: [Partial<Asked>, RegExp][] = [
    [{ prompt_weights: [1] }, /^prompt_weights has 1 numbers for 2 prompts: give one to each/],
    [{ pag_scale: 2 }, /do not go with pag_scale \(--pag-scale\): give one prompt, or leave that out$/],
    [{ guidance_stop: 0.5 }, /do not go with guidance_stop/],
    [{ guidance_rescale: 0.5 }, /do not go with guidance_rescale/],
    [{ adaptive_projected_guidance: { momentum: 0, rescale: 15, eta: 1 } }, /do not go with apg \(--apg\)/],
  ];
  for (const [more, message] of refused)
    await t.rejects(latentsOf(pipeline, seeded({ ...two, ...more })), says(message));
  pipeline.release();
});

test("a prompt of sdxl sample, and a second pass's", async (t) => {
  const [saved, file] = [at('and.safetensors'), at('and.png')];
  const sample = (...argv: string[]) =>
    sdxl(
      ...[
        'sample',
        '--model',
        join(goldenFolder, 'tiny-sdxl'),
        '--width',
        '64',
        '--height',
        '64',
        '--steps',
        '4',
      ],
      ...[
        '--seed',
        '3',
        '--emphasis',
        'original',
        '--quiet',
        '--output',
        file,
        '--save-latents',
        saved,
        ...argv,
      ],
    );
  const drawn = async (...argv: string[]) => {
    const { status, err } = await sample(...argv);
    t.equal(status, 0, err);
    return savedLatents(saved);
  };
  const changing = ['--prompt', 'a [cat:hare:0.5] AND a dog :0.5', '--negative-prompt', 'rain'];
  const own = await drawn(...changing);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const told = {
    prompt: ['a [cat:hare:0.5]', ' a dog'],
    prompt_weights: [1, 0.5],
    emphasis: 'original',
  } as const;
  t.equal(maxDifference(own, await latentsOf(pipeline, seeded(told))), 0, "as a program's");
  pipeline.release();
  const before = readFileSync(file);
  t.match(readPngText(file).parameters, /^a \[cat:hare:0\.5\] AND a dog :0\.5\nNegative prompt: rain\n/);
  t.equal((await sdxl('sample', '--from', file, '--output', file, '--quiet')).status, 0);
  t.ok(readFileSync(file).equals(before), 'and again by its text');

  const hires = ['--hires', '--hires-scale', '1', '--hires-denoising-strength', '0.7'];
  const again = ['--hires-prompt', 'a cat AND a dog :0.5', '--hires-negative-prompt', 'rain'];
  const two = ['--prompt', 'a cat AND a dog :0.5', '--negative-prompt', 'rain', ...hires];
  t.equal(maxDifference(await drawn(...two, ...again), await drawn(...two)), 0, 'the texts of the first');
  const alone = await drawn(...two, '--hires-prompt', 'a cat');
  t.ok(maxDifference(alone, await drawn(...two)) > 1e-3, 'one text behind two');
  const behind = await drawn('--prompt', 'a cat', '--negative-prompt', 'rain', ...hires, ...again);
  t.ok(maxDifference(behind, alone) > 1e-3, 'and two behind one');
  await refusesEach(t, sample, [
    [['--prompt', 'a AND b', '--pag-scale', '2'], /do not go with pag_scale \(--pag-scale\)/],
  ]);
});
