// `sdxl train` from the command line: what a run tells and leaves, and that what was there before stays as it was.
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { basename, join } from 'node:path';
import { test } from 'tap';
import { CudaError } from '../../engine/cuda/errors.ts';
import { adopt } from '../../engine/device.ts';
import { readPicture } from '../../io/image.ts';
import { lockFolder } from '../../io/lock.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { sdxl } from '../support/command_line.ts';
import { packageRoot } from '../support/golden.ts';
import { writeEncoder } from '../support/ip_adapter_golden.ts';
import { noLibrary, ownDevice } from '../support/native_library.ts';
import { folder, model, refuses, runFile, sound } from '../support/run_files.ts';

test('a finished run goes on where more is asked of it, at another learning rate if that is asked', async (t) => {
  const file = runFile('longer', { checkpoints: { every_steps: 1, keep: 2 } });
  const first = await sdxl('train', file, '--quiet', '--resume');
  t.match(first.err, /no checkpoint in .*longer-out yet: beginning anew\n/);
  const [output, aside] = [join(folder, 'longer-out'), join(folder, 'longer-aside')];
  const final = join(output, 'final');
  cpSync(final, aside, { recursive: true });
  const more = ['--set', 'steps=4', '--set', 'optimizer.lr=1e-5'];
  const { status, err } = await sdxl('train', file, '--resume', ...more, '--quiet');
  t.equal(status, 0);
  t.match(err, /resuming from .*step-00000002, with lr 0\.00001 instead of 0\.0001\n/);
  t.match(listCheckpoints(output).at(-1), /step-00000004$/);
  const again = async () => (await sdxl('train', file, '--resume', ...more)).err;
  t.match(await again(), /^longer is finished: .*final\n$/);
  const weights = (model: string) => readFileSync(join(model, 'unet', 'diffusion_pytorch_model.safetensors'));
  const made = weights(final);
  t.notOk(made.equals(weights(aside)));
  // As if killed before the finished model of two updates gave way.
  rmSync(final, { recursive: true });
  renameSync(aside, final);
  t.match(await again(), /resuming from .*step-00000004[\s\S]*done: .*final\n$/);
  t.ok(made.equals(weights(final)));
  rmSync(listCheckpoints(output).at(-1) as string, { recursive: true });
  t.match(
    await again(),
    /resuming from .*step-00000003[\s\S]*done: .*final\n$/,
    'or before the last checkpoint',
  );
  t.ok(made.equals(weights(final)));
  const fewer = ['train', file, '--resume', '--set', 'steps=3'];
  await refuses(
    t,
    'less than is made',
    /step-00000004 has 4 updates behind it, and the run is to have 3;/,
    ...fewer,
  );
  const otherwise = await sdxl('train', file, '--resume', ...more, '--set', 'epochs=7');
  t.match(otherwise.err, /^longer is finished/, 'steps say when it ends');
  rmSync(join(output, 'checkpoints'), { recursive: true });
  t.match(await again(), /^longer is finished: .*final\n$/, 'whatever became of the checkpoints');
  await refuses(
    t,
    'no checkpoint',
    /a finished model and no checkpoint to go on from/,
    'train',
    file,
    '--resume',
  );
});

test('one program at a time trains into a folder', async (t) => {
  const output = join(folder, 'shared-out');
  const unlock = lockFolder(output);
  await refuses(
    t,
    'a second run',
    /another program is at work in .*shared-out/,
    'train',
    runFile('shared', {}),
  );
  t.ok(existsSync(output), 'the folder of the first stays');
  unlock();
  t.notOk(existsSync(output), 'an empty folder goes');
  const absent = runFile('absent', { model: join(folder, 'nowhere') });
  await refuses(t, 'no model', /no model/, 'train', absent);
  t.notOk(existsSync(join(folder, 'absent-out')), 'a run that never began leaves nothing');
  mkdirSync(join(output, '.sdxl-0123abcd-9999999-00ff00ff00ff.tmp'), { recursive: true });
  t.equal((await sdxl('train', runFile('shared', {}), '--quiet')).status, 0);
  t.notOk(
    existsSync(join(output, '.sdxl-0123abcd-9999999-00ff00ff00ff.tmp')),
    'what a killed run left half-written is removed',
  );
});

test('the log as JSON', async (t) => {
  const { status, out } = await sdxl('train', runFile('told', {}), '--json', '--quiet');
  t.equal(status, 0);
  const output = join(folder, 'told-out');
  const last = `${JSON.stringify({ name: 'told', folder: join(output, 'final'), stopped: false })}\n`;
  t.equal(out, `${readFileSync(join(output, 'log.jsonl'), 'utf8')}${last}`);
  t.equal((await sdxl('train', runFile('told', {}), '--json', '--resume')).out, last, 'of a finished run');
});

test('a learning rate that diverges stops with the tensor named', async (t) => {
  const file = runFile('wild', {
    ...{ optimizer: { lr: 1e30, max_grad_norm: 0 }, steps: 50, max_nonfinite: 3 },
    checkpoints: { every_steps: 1, keep: 1 },
  });
  await refuses(
    t,
    'diverges',
    /3 updates in a row were not finite .*lower optimizer\.lr and resume from .*step-00000001$/,
    'train',
    file,
  );
  t.match(
    listCheckpoints(join(folder, 'wild-out')).map((path) => basename(path)),
    ['step-00000001'],
    'no weights that lead to NaN are saved in the place of older ones',
  );
  const log = readFileSync(join(folder, 'wild-out', 'log.jsonl'), 'utf8');
  t.match(
    log,
    /"skipped":"the loss is .*first tensor that is not finite is .*(of|weight) /,
    'the log names it',
  );
});

test('a full disk leaves the old checkpoint', async (t) => {
  const file = runFile('full', { steps: 3, checkpoints: { every_steps: 1, keep: 1 } });
  const output = join(folder, 'full-out');
  t.equal((await sdxl('train', file, '--quiet', '--set', 'steps=1')).status, 0);
  rmSync(join(output, 'final'), { recursive: true });
  const [old] = listCheckpoints(output);
  const program = join(packageRoot, 'bin', 'sdxl.js');
  const limited = 'ulimit -f 1000; exec node "$0" train "$1" --quiet --resume';
  const { status, stderr } = spawnSync('bash', ['-c', limited, program, file], { encoding: 'utf8' });
  t.equal(status, 2, stderr);
  t.match(stderr, /error: .*would be larger than .*limit allows/, 'one sentence');
  t.same(listCheckpoints(output), [old], 'the old checkpoint stays');
  t.equal(readdirSync(join(output, 'checkpoints')).length, 1, 'nothing half-written beside it');
  t.equal((await sdxl('train', file, '--quiet', '--resume')).status, 0, 'and can be resumed');
});

test('a run file that ends the program, or throws beside it, is no success', (t) => {
  const program = join(packageRoot, 'bin', 'sdxl.js');
  const left = /^error: \S+ ends the program before its work is done; take process\.exit out of it\n$/;
  const later = "await new Promise((resolve) => setTimeout(resolve, 50)); export default { steps: 'x' };";
  for (const [name, text, sentence] of [
    ['exits', 'process.exit(0);', left],
    ['fails', 'process.exit(1);', left],
    [
      'timer',
      `setTimeout(() => { throw new Error('too late'); }, 1); ${later}`,
      /cannot be loaded: too late\n$/,
    ],
    ['left', `Promise.reject(new Error('unheard')); export default {};`, /cannot be loaded: unheard\n$/],
    ['over', `export default { steps: 'x' }; setTimeout(() => process.exit(0), 1);`, /"steps" is "x"/],
  ] as const) {
    const file = runFile(name, {}, text);
    const { status, stderr } = spawnSync(process.execPath, [program, 'train', file], { encoding: 'utf8' });
    t.equal(status, 2, name);
    t.match(stderr, sentence, name);
  }
  t.end();
});

test('previews sample as the model is trained to predict, like the finished model', async (t) => {
  const file = runFile('velocity', {
    steps: 1,
    objective: { prediction_type: 'v_prediction', zero_terminal_snr: true },
    previews: {
      prompts: [
        'a cat',
        {
          ...{ prompt: 'a dog', negative_prompt: 'rain', width: 48, height: 24, seed: 3 },
          ...{ guidance_scale: 3, num_inference_steps: 3, scheduler: 'ddim' },
        },
        'a cat',
        { prompt: 'a cat', height: 64 },
      ],
      ...{ num_inference_steps: 2, seed: 7 },
    },
  });
  t.equal((await sdxl('train', file, '--quiet')).status, 0);
  const output = join(folder, 'velocity-out');
  const drawn = join(folder, 'velocity.png');
  const cat = '-p,a cat,--steps,2';
  for (const [i, flags] of [
    `${cat},-s,7,-W,32,-H,32`,
    '-p,a dog,-n,rain,-W,48,-H,24,-s,3,--guidance-scale,3,--steps,3,--scheduler,ddim',
    `${cat},-s,9,-W,32,-H,32`,
    `${cat},-s,10,-W,32,-H,64`,
  ].entries()) {
    const argv = ['-m', join(output, 'final'), ...flags.split(','), '-o', drawn, '--quiet'];
    const { status, err } = await sdxl('sample', ...argv);
    t.equal(status, 0, err);
    const preview = join(output, 'previews', 'step-00000001', `${i}.png`);
    t.same(await readPicture(preview), await readPicture(drawn), flags);
  }
});

test('runs that begin with what an earlier one of their file makes', async (t) => {
  const place = (name: string) => join(folder, `chain-${name}`);
  const keys = (name: string, more: object) => ({
    ...{ name, output: place(name), model, steps: 1, dataset: { path: sound, resolution: 32 }, ...more },
  });
  const token = { placeholder_token: '<toy>', num_vectors: 2, learnable_property: 'object' };
  const small = { transformer_layers_per_block: [0, 0, 0] };
  const runs = [
    keys('vae', { train: { target: 'vae' } }),
    keys('unet', { vae: join(place('vae'), 'final/vae') }),
    keys('lora', { model: join(place('unet'), 'final'), train: { target: 'lora' } }),
    keys('further', {
      ...{ model: join(place('unet'), 'final'), train: { target: 'lora' } },
      lora: { network_weights: join(place('lora'), 'final') },
    }),
    keys('token', {
      train: { target: 'textual_inversion' },
      textual_inversion: { ...token, initializer_token: 'red' },
    }),
    keys('token-further', {
      train: { target: 'textual_inversion' },
      textual_inversion: { ...token, weights: join(place('token'), 'final') },
    }),
    keys('ip', {
      train: { target: 'ip_adapter' },
      ip_adapter: { image_encoder_path: writeEncoder(place('encoder')) },
    }),
    keys('ip-further', {
      train: { target: 'ip_adapter' },
      ip_adapter: { pretrained_ip_adapter_path: join(place('ip'), 'final') },
    }),
    keys('net', { train: { target: 'controlnet' }, controlnet: small }),
    keys('net-further', {
      train: { target: 'controlnet' },
      controlnet: { controlnet_model_name_or_path: join(place('net'), 'final') },
    }),
    keys('adapter', { train: { target: 't2i_adapter' } }),
    keys('adapter-further', {
      train: { target: 't2i_adapter' },
      t2i_adapter: { adapter_model_name_or_path: join(place('adapter'), 'final') },
    }),
  ];
  const pairs = place('pairs');
  cpSync(sound, pairs, { recursive: true });
  for (const i of [0, 1, 2, 3]) cpSync(join(sound, `${i}.png`), join(pairs, `${i}.conditioning_image.png`));
  for (const { dataset } of runs.slice(-4)) dataset.path = pairs;
  const file = runFile('chain', {}, `export default ${JSON.stringify(runs)};`);
  const plan = await sdxl('plan', file, '--quiet', '--json');
  t.equal(plan.status, 0, plan.err);
  const plans = plan.out
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  t.same(
    plans.map((each) => [each.run.name, each.model]),
    runs.map((each) => [each.name, each.model]),
    'are planned before it is made',
  );
  for (const i of [5, 7, 9, 11])
    t.equal(plans[i].trained_parameters, plans[i - 1].trained_parameters, 'by what that begins with');
  t.equal(plans[3].run.lora.network_weights, join(place('lora'), 'final'), 'and told as they are written');
  const wide = { inpainting: { mask_mode: 'random_mask' } };
  const next = { model: join(place('painter'), 'final'), train: { target: 'lora' } };
  const lent = { unet: join(place('painter'), 'final/unet'), train: { target: 'lora' } };
  const painters = [
    keys('painter', wide),
    keys('painter-lora', { ...wide, ...next }),
    keys('lent-lora', { ...wide, ...lent }),
  ];
  const widened = runFile('painters', {}, `export default ${JSON.stringify(painters)};`);
  const what = "a UNet that the first one widens, in its model and in the place of the model's own";
  t.match(await sdxl('plan', widened, '--quiet'), { status: 0 }, what);
  const only = ['--only', 'vae', '--set', `output=${place('elsewhere')}`, '--quiet'];
  const one = await sdxl('train', file, ...only);
  t.equal(one.status, 0, `one of them goes elsewhere: ${one.err}`);
});

test('several GPUs', async (t) => {
  const file = runFile('several', { gradient_accumulation_steps: 2, batch_size: 2 });
  const on = (list: string) => ['train', file, '--device', list];
  await refuses(t, 'one twice', /"cuda:0,cuda:0" names a GPU twice/, ...on('cuda:0,cuda:0'));
  await refuses(t, 'one twice, in other words', /"cuda,cuda:0" names a GPU twice/, ...on('cuda,cuda:0'));
  await refuses(t, 'a list of CPUs', /"cpu,cpu": only GPUs work together/, ...on('cpu,cpu'));
  await refuses(t, 'a list that ends early', /"cuda:0,": only GPUs work together/, ...on('cuda:0,'));
  await refuses(
    t,
    'more GPUs than passes',
    /an update of several has 2 passes of batch_size 2, fewer than the 3 GPUs .*; set gradient_accumulation_steps to 3 or/,
    ...on('cuda:0,cuda:1,cuda:2'),
  );
  await refuses(
    t,
    'a device that is none',
    /memory of "gpu" is not planned/,
    'plan',
    file,
    '--device',
    'gpu',
  );
  await refuses(
    t,
    'sample',
    /"cuda:0,cuda:1": this takes one device; only training takes several GPUs/,
    ...['sample', '--prompt', 'x', '--device', 'cuda:0,cuda:1'],
  );
  const { status, out } = await sdxl('plan', file, '--quiet', '--device', 'cuda:0,cuda:1');
  t.equal(status, 0);
  t.match(
    out,
    /\ngpus +2, for an update's 2 passes in turn; each then sends 1\.4 MB of gradients and as much of weights\n/,
  );
  t.match(
    out,
    /\nmemory +0\.\d+ GiB at the most on the first GPU, 0\.\d+ GiB on each other, estimated\n/,
    'without one',
  );
});

test('a device that fails amid an update or a checkpoint leaves the last checkpoint whole', {
  skip: noLibrary,
}, async (t) => {
  const device = adopt(ownDevice());
  const { launch, download } = device.driver;
  /** Calls so far of each kind, and which call of one kind fails. */
  const calls = { launch: 0, download: 0 };
  let failing: { kind: keyof typeof calls; at: number } | undefined;
  const count = (kind: keyof typeof calls, call: string) => {
    calls[kind]++;
    if (kind === failing?.kind && calls[kind] >= failing.at)
      throw new CudaError('CUDA_ERROR_ILLEGAL_ADDRESS', call);
  };
  device.driver.launch = (symbol, args) => {
    count('launch', 'cuLaunchKernel');
    launch(symbol, args);
  };
  device.driver.download = (block, offset, target) => {
    count('download', 'cuMemcpyDtoHAsync');
    download(block, offset, target);
  };
  const train = (name: string, ...more: string[]) => {
    const file = runFile(name, { steps: 3, batch_size: 4, checkpoints: { every_steps: 1 } });
    return sdxl('train', file, '--device', 'cpu', '--quiet', ...more);
  };
  const finished = (name: string) =>
    readFileSync(join(folder, `${name}-out`, 'final', 'unet', 'diffusion_pytorch_model.safetensors'));
  t.equal((await train('unbroken')).status, 0);
  const whole = { ...calls };
  // Most launches are of updates, and most downloads of checkpoints.
  for (const kind of ['launch', 'download'] as const) {
    const what = `failing-${kind}`;
    failing = { kind, at: calls[kind] + Math.round(0.6 * whole[kind]) };
    const { status, err } = await train(what);
    t.equal(status, 2, `${what}: status 2`);
    const errors = err.split('\n').filter((line) => line.startsWith('error: '));
    t.equal(errors.length, 1, `${what}: one sentence`);
    t.match(errors[0], /CUDA_ERROR_ILLEGAL_ADDRESS; run again/);
    t.equal(device.memory.storages, 0, `${what}: nothing is held`);
    const kept = listCheckpoints(join(folder, `${what}-out`));
    t.ok(kept.length > 0 && kept.length < 3, `${what}: ${kept.length} checkpoints`);
    failing = undefined;
    t.equal((await train(what, '--resume')).status, 0, `${what}: resumes`);
    t.ok(finished(what).equals(finished('unbroken')), `${what}: ends as if it had never failed`);
  }
});
