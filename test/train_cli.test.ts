// `sdxl train` and `sdxl plan` from the command line: every mistake is one clear sentence with status 2, and what was there
// before stays as it was.
import { spawnSync } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { test } from 'tap';
import { findLibrary } from '../engine/cpu/build.ts';
import { CudaError } from '../engine/cuda/errors.ts';
import { adopt, nativeDevice } from '../engine/device.ts';
import { readPicture, writePng } from '../io/image.ts';
import { lockFolder } from '../io/lock.ts';
import { presets } from '../models/presets.ts';
import { listCheckpoints } from '../train/checkpoint.ts';
import { sdxl } from './command_line.ts';
import { goldenFolder, packageRoot } from './golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-train-cli-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const model = join(goldenFolder, 'tiny-sdxl');

/** A folder of pictures with captions beside them. */
function dataset(name: string, count: number): string {
  const path = join(folder, name);
  mkdirSync(path);
  for (let i = 0; i < count; i++) {
    const data = Uint8Array.from({ length: 3 * 32 * 32 }, (_, at) => (at * (i + 2)) % 255);
    writePng(join(path, `${i}.png`), { width: 32, height: 32, channels: 3, data });
    writeFileSync(join(path, `${i}.txt`), `picture ${i}`);
  }
  return path;
}

const sound = dataset('sound', 4);

/** Writes a run file; `text` replaces its object where given. */
function runFile(name: string, keys: object, text?: string): string {
  const run = {
    output: join(folder, `${name}-out`),
    model,
    steps: 2,
    dataset: { path: sound, resolution: 32 },
    optimizer: { lr: 1e-4 },
    ...keys,
  };
  const path = join(folder, `${name}.ts`);
  writeFileSync(
    path,
    `import { defineRun } from 'sdxl';\n${text ?? `export default defineRun(${JSON.stringify(run)});`}\n`,
  );
  return path;
}

interface Checks {
  equal(a: unknown, b: unknown, message: string): unknown;
  match(a: string, b: RegExp, message: string): unknown;
}

async function refuses(t: Checks, what: string, sentence: RegExp, ...argv: string[]): Promise<void> {
  const { status, err } = await sdxl(...argv, '--quiet');
  const errors = err.split('\n').filter((line) => line.startsWith('error: '));
  t.equal(status, 2, `${what}: status 2`);
  t.equal(errors.length, 1, `${what}: one sentence`);
  t.match(errors[0] ?? '', sentence, `${what}: ${errors[0]}`);
}

test('run files', async (t) => {
  await refuses(t, 'no file', /no run file .*nothing\.ts/, 'train', join(folder, 'nothing.ts'));
  const file = (name: string, keys: object, text?: string) => ['train', runFile(name, keys, text)];
  await refuses(
    t,
    'unknown key',
    /unknown key "optimizer\.lrr"; did you mean "lr"/,
    ...file('a', { optimizer: { lrr: 1 } }),
  );
  await refuses(
    t,
    'wrong type',
    /"optimizer\.lr" is "high"; it takes a number/,
    ...file('b', { optimizer: { lr: 'high' } }),
  );
  await refuses(t, 'syntax error', /cannot be loaded: /, ...file('c', {}, 'export default defineRun({;'));
  await refuses(
    t,
    'throws',
    /cannot be loaded: no coffee/,
    ...file('d', {}, "throw new Error('no coffee');"),
  );
  await refuses(t, 'exports nothing', /exports no run/, ...file('e', {}, 'export const run = 1;'));
  await refuses(
    t,
    'what the package has not',
    /cannot be loaded: defineRunn is not a function/,
    ...file('n', {}, "import { defineRunn } from 'sdxl';\nexport default defineRunn({});"),
  );
  await refuses(
    t,
    'a promise',
    /"steps" is -1/,
    ...file('o', {}, 'export default Promise.resolve({ steps: -1 });'),
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
  const good = runFile('good', {});
  const set = (assignment: string) => ['train', good, '--set', assignment];
  await refuses(
    t,
    '--set unknown',
    /no key "optimizer\.lrr"; did you mean "optimizer\.lr"/,
    ...set('optimizer.lrr=1'),
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
  await refuses(
    t,
    'rules of a schedule',
    /lr_scheduler\.step_rules is ""; write/,
    ...set('lr_scheduler.name=piecewise_constant'),
  );
  await refuses(t, "the previews' scheduler", /Eulr/, ...set('previews.scheduler=Eulr'));
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
  await refuses(t, 'picture without caption', /1\.png has no caption/, ...using('lonely', lonely));
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

test('checkpoints', async (t) => {
  const file = runFile('kept', { checkpoints: { every_steps: 1 } });
  const output = join(folder, 'kept-out');
  t.equal((await sdxl('train', file, '--quiet')).status, 0);
  const [first] = listCheckpoints(output);
  const names = () => readdirSync(join(output, 'checkpoints')).join();
  const before = names();
  await refuses(t, 'output in use', /holds a run already; go on with --resume/, 'train', file);
  await refuses(
    t,
    'no checkpoint',
    /is not a checkpoint of a training run/,
    'train',
    file,
    '--resume',
    folder,
  );
  const other = ['--set', 'optimizer.eps=0.5', '--set', 'steps=9'];
  await refuses(
    t,
    "another run's",
    /is of another run: optimizer\.eps was 1e-8 and is 0\.5/,
    'train',
    file,
    '--resume',
    first,
    ...other,
  );
  const { err } = await sdxl('train', file, '--resume', first, ...other);
  t.notMatch(err, /looking at pictures/, 'refused before the pictures are looked at');
  const elsewhere = runFile('elsewhere', { dataset: { path: dataset('others', 5), resolution: 32 } });
  await refuses(t, 'other pictures', /was trained on other pictures/, 'train', elsewhere, '--resume', first);
  const damaged = join(folder, 'damaged');
  cpSync(first, damaged, { recursive: true });
  truncateSync(join(damaged, 'optimizer.safetensors'), 1000);
  await refuses(
    t,
    'truncated',
    /optimizer\.safetensors/,
    'train',
    runFile('fresh', { steps: 9 }),
    '--resume',
    damaged,
  );
  const state = readFileSync(join(damaged, 'state.json'), 'utf8');
  for (const [wrong, says] of [
    ['{}', /state\.json does not say what run it is of/],
    [state.replace(/"step": *1/, '"step": "one"'), /does not say where the run stood/],
  ] as const) {
    writeFileSync(join(damaged, 'state.json'), wrong);
    await refuses(t, 'damaged', says, 'train', runFile('fresh', { steps: 9 }), '--resume', damaged);
  }
  t.equal(names(), before, 'the checkpoints are as they were');
  t.equal((await sdxl('train', file, '--resume', '--quiet')).status, 0, 'a finished run resumed is no error');
});

test('a finished run goes on where more is asked of it, at another learning rate if that is asked', async (t) => {
  const file = runFile('longer', {});
  await sdxl('train', file, '--quiet');
  const more = ['--set', 'steps=4', '--set', 'optimizer.lr=1e-5'];
  const { status, err } = await sdxl('train', file, '--resume', ...more, '--quiet');
  t.equal(status, 0);
  t.match(err, /resuming from .*step-00000002, with lr 0\.00001 instead of 0\.0001\n/);
  t.match(listCheckpoints(join(folder, 'longer-out')).at(-1), /step-00000004$/);
  t.match((await sdxl('train', file, '--resume', ...more)).err, /^longer is finished: .*final\n$/);
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
  mkdirSync(join(output, '.sdxl-1-00ff.tmp'), { recursive: true });
  t.equal((await sdxl('train', runFile('shared', {}), '--quiet')).status, 0);
  t.notOk(existsSync(join(output, '.sdxl-1-00ff.tmp')), 'what a killed run left half-written is removed');
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
  await refuses(t, 'diverges', /3 updates in a row were not finite .*lower optimizer\.lr/, 'train', file);
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

test('a full disk leaves the old checkpoint', (t) => {
  const file = runFile('full', { steps: 3, checkpoints: { every_steps: 1, keep: 1 } });
  const output = join(folder, 'full-out');
  const program = join(packageRoot, 'bin', 'sdxl.js');
  const command = (limit: string, more: string) =>
    spawnSync('bash', ['-c', `${limit} exec node "$0" train "$1" --quiet ${more}`, program, file], {
      encoding: 'utf8',
    });
  t.equal(command('', '--set steps=1 ').status, 0);
  rmSync(join(output, 'final'), { recursive: true });
  const [old] = listCheckpoints(output);
  const { status, stderr } = command('ulimit -f 1000;', '--resume');
  t.equal(status, 2, stderr);
  t.match(stderr, /error: .*would be larger than .*limit allows/, 'one sentence');
  t.same(listCheckpoints(output), [old], 'the old checkpoint stays');
  t.equal(readdirSync(join(output, 'checkpoints')).length, 1, 'nothing half-written beside it');
  t.equal(command('', '--resume').status, 0, 'and can be resumed');
  t.end();
});

test('previews sample as the model is trained to predict, like the finished model', async (t) => {
  const file = runFile('velocity', {
    steps: 1,
    objective: { prediction_type: 'v_prediction', zero_terminal_snr: true },
    previews: { prompts: ['a cat'], num_inference_steps: 2, seed: 7 },
  });
  t.equal((await sdxl('train', file, '--quiet')).status, 0);
  const output = join(folder, 'velocity-out');
  const drawn = join(folder, 'velocity.png');
  const { status, err } = await sdxl(
    ...['sample', '-m', join(output, 'final'), '-p', 'a cat', '-s', '7', '--steps', '2'],
    ...['-W', '32', '-H', '32', '-o', drawn, '--quiet'],
  );
  t.equal(status, 0, err);
  const preview = join(output, 'previews', 'step-00000001', '0.png');
  t.same((await readPicture(preview)).data, (await readPicture(drawn)).data);
});

test('plan', async (t) => {
  const { status, out } = await sdxl(
    'plan',
    runFile('plan', { batch_size: 2, gradient_accumulation_steps: 2 }),
    '--quiet',
  );
  t.equal(status, 0);
  for (const line of [
    /images +4 /,
    /batch +4 \(2 x 2/,
    /updates +2: 1 an epoch, 2 epochs/,
    /trained +unet: 714660/,
    /objective +epsilon, mse/,
    /memory +0\.\d+ GiB/,
  ])
    t.match(out, line);
  const json = await sdxl('plan', runFile('plan', { batch_size: 2 }), '--quiet', '--json');
  const { run, memory_bytes, ...rest } = JSON.parse(json.out);
  t.match(rest, {
    ...{ images: 4, effective_batch_size: 2, updates: 2, updates_per_epoch: 2, prediction_type: 'epsilon' },
    ...{ trained_parameters: 714660, buckets: [{ images: 4 }] },
  });
  t.equal(run.batch_size, 2, 'all keys of the run, with what it left to defaults');
  t.ok(memory_bytes.length === 1 && memory_bytes[0] > 2 ** 20);
  const gpu = await sdxl('plan', runFile('plan', {}), '--quiet', '--device', 'cuda');
  t.match(gpu.out, /memory +0\.\d+ GiB at the most, estimated\n/, 'on a GPU, without one');
  // Its tokenizers are learnt from the captions, which training leaves beside its checkpoints.
  const scratch = await sdxl('plan', runFile('plan-preset', { model: presets.tiny }), '--quiet');
  t.equal(scratch.status, 0, scratch.err);
  t.notOk(existsSync(join(folder, 'plan-preset-out')), 'a plan leaves nothing behind');
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

test('a device that fails amid an update or a checkpoint leaves the last checkpoint whole', async (t) => {
  const library = findLibrary();
  if ('reason' in library) return;
  const device = adopt(nativeDevice(library.path));
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
