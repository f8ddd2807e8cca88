// Training ControlNets: what their pictures are, runs that resume bit for bit and on two GPUs, what comes of them, and mistakes.
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { namedParameters } from '../../engine/module.ts';
import { writePng } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { openModel, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../../models/control/controlnet.ts';
import { controlNetJson } from '../../models/control/controlnet_start.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { fitInto } from '../../train/fit.ts';
import { openMaterials } from '../../train/materials.ts';
import { openPictures, readConditioning, readView, viewIn } from '../../train/pictures/pictures.ts';
import { planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { sdxl } from '../support/command_line.ts';
import { picture } from '../support/controlnet_golden.ts';
import { openDataset } from '../support/datasets.ts';
import { goldenFolder } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import {
  basic,
  control,
  controlled,
  device,
  digest,
  drawn,
  folder,
  locate,
  losses,
  model,
  opened,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

const source = openModel(model);

const controlRun = (output: string): RunInput => ({ ...basic(output), ...control });

test('a conditioning image is cropped, resized and mirrored as its picture is', async (t) => {
  // Red tells the column, green the row, and the picture is its own conditioning image.
  const path = join(folder, 'places');
  mkdirSync(path);
  const [width, height] = [64, 32];
  const places: Picture = {
    ...{ width, height, channels: 3 },
    data: Uint8Array.from({ length: 3 * width * height }, (_, i) => {
      const [x, y] = [Math.floor(i / 3) % width, Math.floor(i / 3 / width)];
      return [x, y, 128][i % 3];
    }),
  };
  const rows = Array.from({ length: 8 }, (_, i) => {
    for (const name of [`${i}.png`, `edges-${i}.png`]) writePng(join(path, name), places);
    return JSON.stringify({ file_name: `${i}.png`, text: 'places', edges_file_name: `edges-${i}.png` });
  });
  writeFileSync(join(path, 'metadata.jsonl'), rows.join('\n'));
  const settings = { path, random_flip: true, crops: 3, conditioning_image_column: 'edges' };
  const input: RunInput = { ...controlRun('places'), batch_size: 8 };
  const own = resolveRun({ ...input, dataset: { ...input.dataset, ...settings } }, 'test', 'test');
  const session = await sessionOf(await openMaterials(own, locate, silent));
  let [mirrored, plain] = [0, 0];
  for (let epoch = 0; epoch < 3; epoch++) {
    const samples = [0, 1, 2, 3, 4, 5, 6, 7];
    const { conditioning_pixel_values, timeIds } = await session.task.prepare({ bucket: 0, samples }, epoch);
    t.same(conditioning_pixel_values.shape, [8, 32, 32, 3]);
    for (const i of samples) {
      const at = (y: number, x: number, c: number) =>
        Math.round(255 * conditioning_pixel_values.values[((i * 32 + y) * 32 + x) * 3 + c]);
      const left = timeIds.values[6 * i + 3];
      const flipped = at(0, 1, 0) < at(0, 0, 0);
      flipped ? mirrored++ : plain++;
      const column = (x: number) => (flipped ? width - 1 - (left + x) : left + x);
      let wrong = 0;
      for (let y = 0; y < 32; y++)
        for (let x = 0; x < 32; x++) if (at(y, x, 0) !== column(x) || at(y, x, 1) !== y) wrong++;
      t.equal(wrong, 0, `epoch ${epoch}, picture ${i}: the crop that the UNet is told of, at ${left}`);
      const view = viewIn(epoch, i, session.pictures, own);
      const shown = await readView(view, own);
      const beside = await readConditioning(view, own);
      t.ok(
        shown.every((x, k) => x === Math.fround(2 * beside[k] - 1)),
        'pixel for pixel its picture',
      );
    }
  }
  t.ok(mirrored > 4 && plain > 4, `${mirrored} mirrored, ${plain} not`);
  session.release();
});

test('runs resume bit for bit, and sdxl sample and the next run take what they made', async (t) => {
  const before = device.memory.storages;
  const image = join(controlled, '0.conditioning_image.png');
  const previews: RunInput['previews'] = {
    ...{ prompts: ['stripes'], validation_image: [image, join(controlled, '1.conditioning_image.png')] },
    ...{ num_inference_steps: 1, every_steps: 1 },
  };
  const final = await resumes(t, 'control', {
    ...{ train: { target: 'controlnet', gradient_checkpointing: true } },
    ...{ controlnet: control.controlnet, dataset: control.dataset, previews },
    validation: { samples: 2 },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  t.same(readdirSync(final).sort(), ['config.json', 'diffusion_pytorch_model.safetensors', 'run.json']);
  t.same(readdirSync(join(folder, 'control-whole', 'previews', 'step-00000001')), ['0.png', '1.png']);
  const logged = losses(join(folder, 'control-whole'));
  t.ok(logged.length === 3 && logged.every(([, loss]) => Number.isFinite(loss)));

  const weights = openWeights(final);
  const moved = weights.names.filter((key) => /^controlnet_(down|mid)/.test(key));
  t.ok(
    nonEmpty(moved).every((key) => weights.floats(key).some((x) => x !== 0)),
    `${moved.length} zero convolutions have learnt`,
  );
  weights.close();

  const free = await drawn(t, 'free');
  t.notOk(free.equals(await drawn(t, 'under', '--controlnet', `${final}:50`, '--control-image', image)));
  const checkpoint = listCheckpoints(join(folder, 'control-whole')).at(-1) as string;
  await drawn(t, 'under-checkpoint', '--controlnet', checkpoint, '--control-image', image);

  const next = await run({
    ...controlRun('next'),
    ...{ steps: 1, controlnet: { controlnet_model_name_or_path: final } },
    ...{ optimizer: { lr: 0 }, ema: { decay: 0 } },
  });
  const bytes = (path: string) => readFileSync(join(path, 'diffusion_pytorch_model.safetensors'));
  t.ok(bytes(next.folder).equals(bytes(final)), 'a run without a learning rate leaves it as it was');
  t.same(
    JSON.parse(readFileSync(join(next.folder, 'config.json'), 'utf8')),
    JSON.parse(readFileSync(join(final, 'config.json'), 'utf8')),
  );

  const refused = async (sentence: RegExp, ...argv: string[]) => {
    const { status, err } = await sdxl(...argv);
    t.equal(status, 2, err);
    t.match(err, sentence);
  };
  const output = join(folder, 'exported');
  await refused(/is a ControlNet's, which .* read as it is: take /, 'export', checkpoint, output);
  t.notOk(existsSync(output));
  await refused(
    /final holds a ControlNet, which sdxl sample takes as --controlnet /,
    ...['sample', '--model', final, '--prompt', 'x', '--output', join(folder, 'x.png')],
  );
});

test('where previews are the most of a run, it fits without them and what they follow', async (t) => {
  const one = { ...controlRun('fits'), gradient_accumulation_steps: 1 };
  const prompts = [{ prompt: 'stripes', width: 256, height: 256 }];
  const previews = { prompts, validation_image: [join(controlled, '1.conditioning_image.png')] };
  const [{ memory_bytes: without }, materials] = [
    planOf(await opened(one)),
    await opened({ ...one, previews }),
  ];
  const plan = planOf(materials);
  const { set, fits } = fitInto(materials, [device], plan, without[0]);
  t.ok(plan.memory_bytes[0] > 1.1 * without[0] && fits, `${plan.memory_bytes} to ${without}`);
  t.same(set, ['previews.prompts=[]', 'previews.validation_image=[]']);
});

test('a run that went on with a ControlNet resumes without it', async (t) => {
  const first = await run({ ...controlRun('left-off'), steps: 1 });
  const more = { steps: 2, controlnet: { controlnet_model_name_or_path: first.folder } };
  const whole = await run({ ...controlRun('on-whole'), ...more });
  const on = { ...controlRun('on-broken'), ...more };
  const { folder: checkpoint } = await run(on, { until: 1 });
  rmSync(first.folder, { recursive: true });
  const { folder: final } = await run(on, { checkpoint });
  t.equal(digest(final), digest(whole.folder));
});

test('the plan, and how the conditioning images decide what is learnt', async (t) => {
  const opened = async (input: RunInput) => openMaterials(resolveRun(input, 'test', 'test'), locate, silent);
  const plan = planOf(await opened(controlRun('planned')));
  const net = controlnet(
    parseControlNetConfig(
      controlNetJson(source.config('unet'), { ratio: 8, transformer_layers_per_block: [0, 0, 0] }),
      '',
    ),
  );
  const count = [...namedParameters(net).values()].reduce((sum, { size }) => sum + size, 0);
  t.equal(plan.trained_parameters, count);
  t.ok(plan.memory_bytes[0] > 4 * count);
  t.equal(plan.run.dataset.conditioning_image_column, 'conditioning_image', "diffusers' default");

  const { hash } = (await opened(controlRun('planned'))).pictures;
  const other = join(controlled, '3.conditioning_image.png');
  const was = readFileSync(other);
  writePng(other, picture(77, 48, 40));
  t.not((await opened(controlRun('planned'))).pictures.hash, hash, 'a resumed run must see the same images');
  writeFileSync(other, was);
});

test('a run without conditioning images does not look for them', async (t) => {
  const { examples } = await openDataset({ path: join(folder, 'pictures') });
  t.ok(nonEmpty(examples).every(({ beside }) => beside === undefined));
  t.end();
});

test('what a dataset and a run may lack', async (t) => {
  const refuses = async (what: string, input: RunInput, sentence: RegExp) => {
    const opening = async () => {
      const own = resolveRun(input, 'run.ts', 'test');
      await openPictures(own, 32, silent);
    };
    await t.rejects(opening(), { name: 'UserError', message: sentence }, what);
  };
  const of = (path: string, more: RunInput['dataset'] = {}): RunInput => ({
    ...controlRun('lacking'),
    dataset: { path, resolution: 32, ...more },
  });
  const place = (name: string, metadata?: string): string => {
    const path = join(folder, name);
    rmSync(path, { recursive: true, force: true });
    mkdirSync(path);
    writePng(join(path, 'a.png'), picture(1, 48, 40));
    if (metadata === undefined) writeFileSync(join(path, 'a.txt'), 'a');
    else writeFileSync(join(path, 'metadata.jsonl'), metadata);
    return path;
  };
  const row = (more: object) => `${JSON.stringify({ file_name: 'a.png', text: 'a', ...more })}\n`;
  await refuses(
    'no image beside',
    of(place('alone')),
    /no picture with a caption and a conditioning image \(.*a\.png has no conditioning image a\.conditioning_image\.png beside it\): .* NAME\.conditioning_image\.png$/,
  );
  await refuses(
    'no column',
    of(place('column', row({}))),
    /has no column "conditioning_image"; its columns are/,
  );
  await refuses(
    'a misspelt column',
    of(place('misspelt', row({ edges: 'e.png' })), { conditioning_image_column: 'edge' }),
    /has no column "edge"; did you mean "edges"/,
  );
  await refuses(
    'an empty place',
    of(place('empty', row({ conditioning_image: '' }))),
    /metadata\.jsonl:1: a\.png has no conditioning image in "conditioning_image"/,
  );
  await refuses(
    'no such image',
    of(place('gone', row({ conditioning_image: 'e.png' }))),
    /metadata\.jsonl:1: e\.png is not there/,
  );
  await refuses(
    'not a name',
    of(place('number', row({ conditioning_image: 3 }))),
    /"conditioning_image" is not a text: write the image's path there/,
  );
  const two = `${row({ conditioning_image: 'e.png' })}${row({ conditioning_image: 'f.png' })}`;
  const doubled = place('two', two);
  for (const name of ['e.png', 'f.png']) writePng(join(doubled, name), picture(2, 48, 40));
  await refuses('two of them', of(doubled), /a\.png has two conditioning images, e\.png and f\.png/);
  const sized = place('sized');
  writePng(join(sized, 'a.conditioning_image.png'), picture(2, 40, 40));
  await refuses(
    'another size',
    of(sized),
    /the conditioning image a\.conditioning_image\.png is 40x40 and its picture a\.png 48x40: make it the picture's size/,
  );
  const torn = place('torn');
  writeFileSync(join(torn, 'a.conditioning_image.png'), 'no picture');
  await refuses('broken', of(torn), /a\.conditioning_image\.png cannot be read as a picture/);
  const lone = place('lone');
  for (const name of ['a', 'b']) writePng(join(lone, `${name}.conditioning_image.png`), picture(2, 48, 40));
  await refuses(
    'no picture',
    of(lone),
    /b\.conditioning_image\.png is a conditioning image without a picture/,
  );

  const sound: RunInput = controlRun('sound');
  const { path: _, ...dataset } = sound.dataset ?? {};
  for (const [what, more, sentence] of [
    [
      'for another target',
      {
        train: { target: 'lora' },
        controlnet: {},
        dataset: { ...dataset, conditioning_image_column: 'edges' },
      },
      /"dataset\.conditioning_image_column" has images for a ControlNet or T2I-Adapter, which target "lora" does not train/,
    ],
    [
      'a size for another target',
      { train: { target: 'unet' } },
      /"controlnet\.transformer_layers_per_block" is of a ControlNet, and/,
    ],
    [
      'two beginnings',
      { controlnet: { ...control.controlnet, controlnet_model_name_or_path: 'x' } },
      /has its own; leave out one of them/,
    ],
    [
      'previews of nothing',
      { previews: { prompts: ['a'] } },
      /"previews\.prompts" has 1 and "previews\.validation_image" 0/,
    ],
    [
      'two for three',
      { previews: { prompts: ['a', 'b', 'c'], validation_image: ['x', 'y'] } },
      /"previews\.prompts" has 3 and "previews\.validation_image" 2/,
    ],
    [
      'text encoders too',
      { train: { target: 'controlnet', text_encoders: true } },
      /"train\.text_encoders" trains .* target "controlnet" does not/,
    ],
    [
      'a class',
      { dataset: { ...dataset, path: 'x', class_data_dir: 'y' } },
      /"dataset\.class_data_dir" has pictures for the UNet/,
    ],
    [
      'no such validation image',
      { previews: { prompts: ['a'], validation_image: [join(folder, 'nowhere.png')] } },
      /nowhere\.png/,
    ],
  ] as const)
    await refuses(what, { ...sound, ...more }, sentence);

  const refiner = {
    ...controlRun('refiner'),
    model: join(goldenFolder, 'tiny-sdxl-refiner'),
    dataset: { ...controlRun('refiner').dataset, resolution: 64 },
  };
  const materials = await openMaterials(resolveRun(refiner, 'test', 'test'), locate, silent);
  await t.rejects(sessionOf(materials), { message: /is a refiner, which takes no ControlNet/ });
  const wide = { ...controlRun('wide'), controlnet: { transformer_layers_per_block: [1, 2] } };
  const unfit = await openMaterials(resolveRun(wide, 'test', 'test'), locate, silent);
  await t.rejects(sessionOf(unfit), { message: /"transformer_layers_per_block" is \[1,2\]/ });
});
