// Distillation into a smaller UNet: losses and gradients against torch over diffusers' UNets with hooks (golden/distillation.py), runs that
// resume bit for bit, with students of their own weights and of the teacher's, and mistakes.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { noGrad } from '../../engine/grad.ts';
import { parameterCount } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { readJsonObject } from '../../io/json.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { presets } from '../../models/formats/presets.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { foreseen } from '../../train/foreseen.ts';
import { place } from '../../train/passes/pass.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { writeDistilled } from '../support/distilled_golden.ts';
import { testGradients } from '../support/frozen_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import {
  basic,
  device,
  drawn,
  folder,
  losses,
  model,
  opened,
  resumes,
  run,
  sessionOf,
} from '../support/small_runs.ts';

/** The folder of a UNet that is tiny-sdxl's with other fields: a config without weights. */
function shapeOf(name: string, fields: object): string {
  const at = join(folder, name);
  mkdirSync(at);
  const json = { ...readJsonObject(join(model, 'unet', 'config.json')), ...fields };
  writeFileSync(join(at, 'config.json'), JSON.stringify(json));
  return at;
}

/** The script's students. */
const students = {
  ssd: shapeOf('ssd', {
    transformer_layers_per_block: [1, 1, [2, 1]],
    reverse_transformer_layers_per_block: [[1, 2, 1], 1, 1],
    mid_block_type: 'UNetMidBlock2D',
  }),
  small: shapeOf('small', { layers_per_block: 1 }),
  tiny: shapeOf('tiny', { layers_per_block: 1, mid_block_type: null }),
};

const taught = (student: keyof typeof students, more: RunInput['distillation'] = {}): RunInput => ({
  unet: students[student],
  train: { method: 'distillation' },
  distillation: { pretrained_teacher_model: model, student_weight_from_teacher: true, ...more },
});

const whole = { distill_level: 'block', output_weight: 1, feature_weight: 1 } as const;

testGradients(
  'ssd',
  () => ({ ...basic('kd-ssd'), ...taught('ssd'), objective: { snr_gamma: 5 } }),
  'distillation',
);
testGradients('small', () => ({ ...basic('kd-small'), ...taught('small', whole) }), 'distillation');
testGradients(
  'tiny',
  () => ({ ...basic('kd-tiny'), ...taught('tiny', whole), objective: { snr_gamma: 5 } }),
  'distillation',
);

test('runs resume bit for bit, fused or not', async (t) => {
  const before = device.memory.storages;
  const final = await resumes(t, 'kd', {
    ...taught('ssd'),
    train: { method: 'distillation', gradient_checkpointing: true },
    previews: { prompts: ['stripes'], num_inference_steps: 1, every_steps: 2 },
    validation: { samples: 2 },
  });
  t.equal(openModel(final).config('unet').mid_block_type, 'UNetMidBlock2D');
  await drawn(t, 'kd-drawn', '--model', final);
  const noted = losses(join(folder, 'kd-whole')).flatMap(([, ...each]) =>
    each.filter((x) => x !== undefined),
  );
  t.ok(noted.length === 5 && noted.every((loss) => loss > 0), `losses, of validation too: ${noted}`);
  const { folder: fused } = await run({
    ...{ ...basic('kd-fused'), ...taught('small', whole), steps: 2, gradient_accumulation_steps: 1 },
    train: { method: 'distillation', fused_backward_pass: true },
  });
  const { folder: kept } = await run({
    ...{ ...basic('kd-kept'), ...taught('small', whole), steps: 2, gradient_accumulation_steps: 1 },
  });
  t.ok(unetOf(fused).equals(unetOf(kept)), 'fused or not');
  t.equal(device.memory.storages, before, 'live tensors');
});

const unetOf = (path: string): Buffer =>
  readFileSync(join(path, 'unet', 'diffusion_pytorch_model.safetensors'));

test('a student of its own weights learns beside a teacher that the plan counts', async (t) => {
  const before = device.memory.storages;
  const input: RunInput = {
    ...{ ...basic('kd-learns'), model: writeDistilled(join(folder, 'distilled'), 'ssd') },
    ...{ batch_size: 6, gradient_accumulation_steps: 1, steps: 10, ema: { decay: 0 } },
    train: { method: 'distillation' },
    distillation: { pretrained_teacher_model: join(model, 'unet') },
    ...{ optimizer: { lr: 3e-3, weight_decay: 0 }, lr_scheduler: { name: 'constant' } },
  };
  await run(input);
  const [first, ...others] = losses(join(folder, 'kd-learns')).map(([, loss]) => loss as number);
  t.ok(
    others.slice(-2).every((loss) => loss < 0.8 * first),
    `${[first, ...others]}`,
  );
  const session = await sessionOf(await opened({ ...input, batch_size: 1 }));
  const replica = session.task.replicate(device);
  const inputs = await session.task.prepare({ bucket: 0, samples: [1] }, 0);
  const [own, other] = [session.task, replica].map((task) =>
    noGrad(() => scope(() => task.loss(place(inputs, device)).floats()[0])),
  );
  t.equal(own, other, 'by a twin of both');
  replica.release();
  session.release();
  t.equal(device.memory.storages, before, 'live tensors');
  const planned = async (more: RunInput) => planOf(await opened({ ...input, ...more }));
  const [plan, alone] = [await planned({}), await planned({ train: {}, distillation: {} })];
  const teacher = parameterCount(unet(parseUNetConfig(openModel(model).config('unet'))));
  t.ok(plan.memory_bytes[0] - alone.memory_bytes[0] > 4 * teacher, 'the plan counts a whole teacher');
  t.equal(plan.trained_parameters, alone.trained_parameters);
});

test("a student that begins with its teacher's weights, and the plan of its run", async (t) => {
  const input = { ...basic('kd-begin'), ...taught('small', whole), steps: 1, ema: { decay: 0 } };
  const { folder: final } = await run({ ...input, optimizer: { lr: 0 } });
  const [own, theirs] = [final, model].map((path) => openModel(path).weights('unet'));
  for (const key of nonEmpty(own.names)) {
    // Of three resnets on the way up the first and the last are left.
    const origin = key.replace(/^(up_blocks\.\d\.(resnets|attentions))\.1/, '$1.2');
    if (!Buffer.from(own.floats(key).buffer).equals(Buffer.from(theirs.floats(origin).buffer))) t.fail(key);
  }
  for (const weights of [own, theirs]) weights.close();
  const lines = describe(planOf(await opened(input))).join('\n');
  t.match(lines, /^model .*, UNet \S+small, teacher \S+tiny-sdxl, whose weights it begins with, float32$/m);
  t.match(lines, /^objective {3}epsilon, distillation, mse, output_weight 1, feature_weight 1 by block$/m);
  const later = resolveRun(
    { ...input, distillation: { pretrained_teacher_model: 'runs/a/final' } },
    'test',
    'test',
  );
  const maker = resolveRun({ model: 'base', output: 'runs/a' }, 'test', 'test');
  t.equal(foreseen(later, [maker]).run.distillation.pretrained_teacher_model, 'base');
});

test('mistakes', async (t) => {
  const refused: [RunInput, RegExp][] = [
    [
      { train: { method: 'distillation', target: 'lora' } },
      /makes a smaller UNet, and "train\.target" is "lora"; set/,
    ],
    [
      { train: { method: 'distillation' } },
      /"distillation\.pretrained_teacher_model" is empty; name the model whose UNet/,
    ],
    [
      { ...taught('ssd'), unet: '', model: presets.tiny },
      /"model" is a preset, whose random text encoders the teacher/,
    ],
    [
      taught('ssd', { output_weight: 0, feature_weight: 0 }),
      /are 0, so the teacher would teach nothing; give one/,
    ],
    [
      { ...taught('ssd'), objective: { masked_loss: true } },
      /"objective\.masked_loss" is of the method "diffusion"/,
    ],
    [
      { ...taught('ssd'), train: { method: 'distillation', text_encoders: true } },
      /"train\.text_encoders" is of the method "diffusion"/,
    ],
    [
      { distillation: { feature_weight: 1 } },
      /"distillation\.feature_weight" is of distillation into a smaller UNet, and "train\.method" is "diffusion"/,
    ],
    [
      taught('ssd', { distill_level: 'layer' as 'block' }),
      /"distillation\.distill_level" is "layer"; it takes "block" or "sub_block"/,
    ],
  ];
  for (const [more, message] of refused)
    t.throws(() => resolveRun({ ...basic('x'), ...more }, 'run.ts', 'test'), { name: 'UserError', message });
  const wide = shapeOf('wide', { block_out_channels: [16, 24, 40] });
  const deep = shapeOf('deep', { transformer_layers_per_block: [1, 1, 3] });
  const late: [RunInput, RegExp][] = [
    [
      taught('small'),
      /has 2 layers in each level and its student 1, .* set distillation\.distill_level to "block"/,
    ],
    [
      { ...taught('ssd'), unet: wide },
      /has block_out_channels 16,24,32 and its student, that of \S+, 16,24,40; take a student that is/,
    ],
    [
      { ...taught('ssd'), unet: deep },
      /has no down_blocks\.2\.attentions\.0\.transformer_blocks\.2\.norm1\.weight of the shape \[32\] for its student/,
    ],
    [
      taught('ssd', { pretrained_teacher_model: join(folder, 'nowhere') }),
      /no UNet at \S+nowhere; give a UNet's \.gguf/,
    ],
  ];
  for (const [more, message] of late)
    await t.rejects(opened({ ...basic('late'), ...more }), { name: 'UserError', message });
});
