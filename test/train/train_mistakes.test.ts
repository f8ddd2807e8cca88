// Mistakes in run files and datasets: each is one clear sentence with status 2, before any work is done.
import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'tap';
import { writePng } from '../../io/image.ts';
import { foreignKeys } from '../../train/run/foreign_keys.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { sdxl } from '../support/command_line.ts';
import { writeInpainting } from '../support/inpainting_golden.ts';
import { dataset, folder, refuses, runFile } from '../support/run_files.ts';
import { writeTiny } from '../support/tiny_autoencoder.ts';

test('run files', async (t) => {
  await refuses(
    t,
    'no file',
    /nothing\.ts; there are some in .*configs/,
    'train',
    join(folder, 'nothing.ts'),
  );
  const toml = join(folder, 'kohya.toml');
  writeFileSync(toml, 'network_dim = 8');
  await refuses(t, "another program's", /kohya\.toml is no \.ts file; .*coming_from/, 'train', toml);
  const file = (name: string, keys: object, text?: string) => ['train', runFile(name, keys, text)];
  await refuses(
    t,
    'unknown key',
    /unknown key "optimizer\.lrr"; did you mean "optimizer\.lr"/,
    ...file('a', { optimizer: { lrr: 1 } }),
  );
  await refuses(
    t,
    'wrong type',
    /"optimizer\.lr" is "high"; it takes a number/,
    ...file('b', { optimizer: { lr: 'high' } }),
  );
  await refuses(
    t,
    'a beta that never forgets',
    /"optimizer\.betas" is \[0\.9,1\]; it takes .* a number from 0 to below 1/,
    ...file('betas', { optimizer: { betas: [0.9, 1] } }),
  );
  await refuses(t, 'syntax error', /cannot be loaded: /, ...file('c', {}, 'export default defineRun({;'));
  await refuses(
    t,
    'throws',
    /cannot be loaded: no coffee/,
    ...file('d', {}, "throw new Error('no coffee');"),
  );
  const own = "import { UserError } from 'sdxl';\nthrow new UserError('no milk: buy some');";
  await refuses(t, 'throws no Error', /it throws an object that/, ...file('o', {}, 'throw { toString: 1 };'));
  const getter = "export default { get steps() { throw new Error('no steps'); } };";
  await refuses(
    t,
    'throws when it is asked',
    /getter\.ts cannot be loaded: no steps$/,
    ...file('getter', {}, getter),
  );
  const endless = file('endless', {}, 'export default new Promise(() => {});');
  await refuses(t, 'never comes', /it waits for a promise that nothing keeps; export the run/, ...endless);
  await refuses(t, 'throws a sentence', /^error: no milk: buy some$/, ...file('milk', {}, own));
  await refuses(t, 'exports nothing', /exports no run/, ...file('e', {}, 'export const run = 1;'));
  await refuses(
    t,
    'what the package has not',
    /cannot be loaded: defineRunn is not a function/,
    ...file('n', {}, "import { defineRunn } from 'sdxl';\nexport default defineRunn({});"),
  );
  await refuses(
    t,
    'one output twice',
    /two runs write to \.\/x\/; give each its own/,
    ...file('twice', {}, "export default [{ output: 'x' }, { output: 'y' }, { output: './x/' }];"),
  );
  await refuses(
    t,
    'a promise',
    /"steps" is -1/,
    ...file('o', {}, 'export default Promise.resolve({ steps: -1 });'),
  );
  await refuses(
    t,
    'a tiny autoencoder',
    /taesdxl has a tiny autoencoder \(AutoencoderTiny\), .*train with the VAE that the model was made for/,
    ...file('tiny', { vae: writeTiny(join(folder, 'taesdxl')) }),
  );
  await refuses(
    t,
    'an inpainting model',
    /inpainting is an inpainting model, .*; say with inpainting\.mask_mode what is masked, .* begin with a base model/,
    ...file('inpainting', { model: writeInpainting(join(folder, 'inpainting')) }),
  );
  const several = dataset('two-shapes', 2);
  writePng(join(several, '0.png'), { width: 64, height: 24, channels: 3, data: new Uint8Array(3 * 64 * 24) });
  for (const [name, more, says] of [
    [
      'fused-prodigy',
      { optimizer: { name: 'prodigy', lr: 1 } },
      /Prodigy all by one number that hangs on every gradient; leave it out/,
    ],
    [
      'fused-accumulated',
      { gradient_accumulation_steps: 2 },
      /"gradient_accumulation_steps" 2 could be added to; set that to 1/,
    ],
    [
      'fused-buckets',
      { batch_size: 2, dataset: { path: several, resolution: 64, aspect_ratio_buckets: true } },
      /pictures of 2 sizes share no pass; set batch_size to 1, or give all one size: .*, and one dataset\.resolution/,
    ],
    [
      'fused-resolutions',
      { batch_size: 2, dataset: { path: several, resolution: [64, 96] } },
      /pictures of 2 sizes share no pass; .*, and one dataset\.resolution/,
    ],
  ] as const)
    await refuses(t, name, says, ...file(name, { train: { fused_backward_pass: true }, ...more }));
  await refuses(
    t,
    'fused-gpus',
    /is one pass, as train\.fused_backward_pass is set, and 2 GPUs take passes in turn; name one GPU/,
    ...['plan', runFile('fused-gpus', { train: { fused_backward_pass: true } }), '--device', 'cuda:0,cuda:1'],
  );
  await refuses(t, 'no model', /names no model/, ...file('f', { model: '' }));
  await refuses(
    t,
    'no such model',
    /no model at .*nowhere/,
    ...file('g', { model: join(folder, 'nowhere') }),
  );
  await refuses(
    t,
    'a preset without its parts',
    /lacks unet\.block_out_channels, vae\.block_out_channels, text_encoder_2\.hidden_size/,
    ...file('h', { model: { scheduler: { _class_name: 'DDPMScheduler' } } }),
  );
  await refuses(
    t,
    'a group that is a number',
    /"optimizer" is 5; write an object/,
    ...file('i', { optimizer: 5 }),
  );
  await refuses(
    t,
    'a number that is none',
    /"optimizer\.lr" is NaN/,
    ...file('j', {}, 'export default { optimizer: { lr: Number.NaN } };'),
  );
  await refuses(
    t,
    'a name that leads out of runs/',
    /"name" is "\.\.\/x", which names no folder/,
    ...file('k', { name: '../x', output: '' }),
  );
  await refuses(
    t,
    'parts of what is not trained',
    /choose layers with "lora\.targets"/,
    ...file('l', { train: { target: 'lora', parts: ['attn'] } }),
  );
  await refuses(
    t,
    'a rank of adapters without adapters',
    /"lora\.conv_rank" is of adapters, and "train\.target" is "unet"/,
    ...file('conv-rank', { lora: { conv_rank: 4 } }),
  );
  await refuses(
    t,
    'a UNet in 8 bits that is trained itself',
    /"train\.q8" keeps a UNet in 8-bit integers that is not trained.* "train\.target" is "unet"/,
    ...file('q8', { train: { q8: true } }),
  );
  await refuses(
    t,
    'a UNet in 8 bits whose decoded weights would all be kept',
    /set "train\.gradient_checkpointing" too, or leave it out/,
    ...file('q8-kept', { train: { q8: true, target: 'lora' } }),
  );
  await refuses(
    t,
    'text encoders beside a VAE',
    /"train\.text_encoders" trains the encoders beside the UNet, which target "vae" does not/,
    ...file('m', { train: { target: 'vae', text_encoders: true } }),
  );
  await refuses(
    t,
    'a prompt for pictures that are nowhere',
    /"dataset\.class_prompt" says what pictures in "dataset\.class_data_dir" are, and there is none/,
    ...file('n', { dataset: { class_prompt: 'a dog' } }),
  );
  await refuses(
    t,
    'prior preservation of a VAE',
    /"dataset\.class_data_dir" has pictures for the UNet .* target "vae"/,
    ...file('o', {
      train: { target: 'vae' },
      dataset: { class_data_dir: 'here' },
    }),
  );
  await refuses(
    t,
    'a learning rate of what is not trained',
    /"optimizer\.text_encoder_lr" is .* not trained; set "train\.text_encoders"/,
    ...file('p', { optimizer: { text_encoder_lr: 1e-5 } }),
  );
  await refuses(
    t,
    'a learning rate that is a multiple of none',
    /"optimizer\.lr" is 0, .* give lr a small value/,
    ...file('q', { train: { text_encoders: true }, optimizer: { lr: 0, text_encoder_lr: 1e-5 } }),
  );
  await refuses(
    t,
    'a prompt length that is no whole chunks',
    /"dataset\.max_token_length" is 100; give a multiple of 75/,
    ...file('r', { dataset: { max_token_length: 100 } }),
  );
  const good = runFile('good', {});
  const set = (assignment: string) => ['train', good, '--set', assignment];
  await refuses(
    t,
    '--set unknown',
    /no key "optimizer\.lrr"; did you mean "optimizer\.lr"/,
    ...set('optimizer.lrr=1'),
  );
  for (const [assignment, place] of [
    ['min_snr_gamma=5', 'objective.snr_gamma'], // kohya's
    ['lora.network_dim=32', 'lora.rank'],
    ['conv_dim=8', 'lora.conv_rank'],
    ['fp8_base=true', 'train.q8'],
    ['decompose_factor=8', 'lora.factor'],
    ['network_dropout=0.1', 'lora.network_dropout'],
    ['lora.lora_dropout=0.1', 'lora.network_dropout'],
    ['algo=lokr', 'lora.algo'],
    ['conv_alpha=4', 'lora.conv_alpha'],
    ['gradient_checkpointing=true', 'train.gradient_checkpointing'], // in another group
    ['optimizer.num_cycles=2', 'lr_scheduler.num_cycles'],
  ])
    await refuses(t, assignment, new RegExp(`; here it is "${place}"`), ...set(assignment));
  await refuses(
    t,
    "kohya's key in a file",
    /unknown key "optimizer\.learning_rate"; here it is "optimizer\.lr"/,
    ...file('kohya', { optimizer: { learning_rate: 1 } }),
  );
  for (const optimizer of ['AdamW8bit', 'adamw-8bit'])
    await refuses(
      t,
      `${optimizer} among choices`,
      /; did you mean "adamw8bit"/,
      ...set(`optimizer.name=${optimizer}`),
    );
  await refuses(t, '--set group', /"optimizer" is a group/, ...set('optimizer=1'));
  await refuses(t, '--set type', /"steps" takes a whole number/, ...set('steps=many'));
  await refuses(t, '--set nothing', /takes KEY=VALUE/, ...set('steps'));
  await refuses(
    t,
    'contradiction',
    /zero_terminal_snr needs objective\.prediction_type/,
    ...set('objective.zero_terminal_snr=true'),
  );
  await refuses(
    t,
    'a range that ends before it begins',
    /timestep_range begins at 0\.75 and ends at 0\.25/,
    ...set('objective.timestep_range=0.75,0.25'),
  );
  const [, ...rules] = set('lr_scheduler.name=piecewise_constant');
  for (const command of ['train', 'plan'])
    await refuses(t, 'rules of a schedule', /lr_scheduler\.step_rules is ""; write/, command, ...rules);
  await refuses(t, "the previews' scheduler", /Eulr/, ...set('previews.scheduler=Eulr'));
  for (const [own, says] of [
    ['"scheduler":"Eulr"', /Eulr/],
    ['"num_inference_steps":1001', /number of steps is 1001: give a whole number from 1 to 1000/],
    ['"width":36', /"previews\.prompts\[0\]\.width" is 36, which is not divisible by 8; 32 is/],
  ] as const)
    await refuses(t, "a preview's own", says, ...set(`previews.prompts=[{"prompt":"a",${own}}]`));
  await refuses(
    t,
    'no layers',
    /lora\.targets is empty/,
    ...[...set('train.target=lora'), '--set', 'lora.targets=[]'],
  );
  await refuses(t, 'parts', /matches no weight/, ...set('train.parts=nothing'));
  await refuses(t, 'resolution', /not divisible by/, ...set('dataset.resolution=36'));
  t.notOk(existsSync(join(folder, 'good-out', 'checkpoints')), 'nothing was trained');
});

test("other trainers' keys name keys of ours", (t) => {
  const run: unknown = resolveRun({}, 'the defaults', 'x');
  for (const [theirs, ours] of Object.entries(foreignKeys)) {
    for (const each of [ours].flat()) {
      const value = each.split('.').reduce((at, key) => (at as Record<string, unknown>)?.[key], run);
      t.ok(value !== undefined && (typeof value !== 'object' || Array.isArray(value)), `${theirs}: ${each}`);
    }
  }
  for (const written of [{ pretrained_teacher_model: 'x' }, { lcm: { pretrained_teacher_model: 'x' } }])
    t.throws(() => resolveRun(written, 'run.ts', 'x'), {
      message: /; here it is "model" or "distillation\.pretrained_teacher_model"$/,
    });
  t.end();
});

test('datasets', async (t) => {
  const using = (name: string, path: string, more: object = {}) => [
    'train',
    runFile(`data-${name}`, { dataset: { path, resolution: 32, ...more } }),
  ];
  await refuses(
    t,
    'missing folder',
    /no dataset at .*absent|no folder .*absent/,
    ...using('missing', join(folder, 'absent')),
  );
  mkdirSync(join(folder, 'empty'));
  await refuses(t, 'empty', /has no picture with a caption/, ...using('empty', join(folder, 'empty')));
  await refuses(t, 'none named', /names no dataset/, ...using('none', ''));
  const lonely = dataset('lonely', 3);
  rmSync(join(lonely, '1.txt'));
  await refuses(
    t,
    'picture without caption',
    /1 thing that .*1\.png has no caption.*dataset\.instance_prompt/,
    ...using('lonely', lonely),
  );
  const orphan = dataset('orphan', 3);
  rmSync(join(orphan, '1.png'));
  await refuses(
    t,
    'caption without picture',
    /1\.txt is a caption without a picture/,
    ...using('orphan', orphan),
  );
  const corrupt = dataset('corrupt', 3);
  writeFileSync(
    join(corrupt, '1.jpg'),
    Buffer.concat([Buffer.from('ffd8ffe000104a464946', 'hex'), Buffer.alloc(300, 7)]),
  );
  rmSync(join(corrupt, '1.png'));
  await refuses(t, 'corrupt JPEG', /1\.jpg cannot be read as a picture/, ...using('corrupt', corrupt));
  const { status, err } = await sdxl(...using('skip', corrupt, { broken: 'skip' }));
  t.equal(status, 0, 'skipped where the run says so');
  t.match(err, /skipped: .*1\.jpg/, 'and listed');
});

test('something else where a run has its files', async (t) => {
  for (const [name, isFolder] of [
    ['checkpoints', false],
    ['log.jsonl', true],
    ['tensorboard', false],
  ] as const) {
    const file = runFile(`taken-${name}`, {});
    const path = join(folder, `taken-${name}-out`, name);
    mkdirSync(isFolder ? path : dirname(path), { recursive: true });
    if (!isFolder) writeFileSync(path, '');
    await refuses(t, name, new RegExp(`${name} (is a f|lies under)`), 'train', file);
  }
});
