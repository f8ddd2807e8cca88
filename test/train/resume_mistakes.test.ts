// Mistakes in what a run is to go on from: each is one clear sentence with status 2, and the checkpoints stay as they were.
import { cpSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { sdxl } from '../support/command_line.ts';
import { dataset, folder, model, refuses, runFile } from '../support/run_files.ts';

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
  await refuses(
    t,
    'other moments',
    /is of another run: optimizer\.moments_dtype was "float32" and is "bfloat16"/,
    ...['train', file, '--resume', first, '--set', 'optimizer.moments_dtype=bfloat16'],
  );
  const { err } = await sdxl('train', file, '--resume', first, ...other);
  t.notMatch(err, /looking at pictures/, 'refused before the pictures are looked at');
  const elsewhere = runFile('elsewhere', { dataset: { path: dataset('others', 5), resolution: 32 } });
  await refuses(t, 'other pictures', /was trained on other pictures/, 'train', elsewhere, '--resume', first);
  const copy = join(folder, 'copy');
  cpSync(first, copy, { recursive: true });
  await refuses(
    t,
    'a stray one',
    /kept-out holds a run of which .*copy is no/,
    'train',
    file,
    '--resume',
    copy,
  );
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
  writeFileSync(join(damaged, 'state.json'), state);
  cpSync(join(model, 'unet'), join(damaged, 'unet'), { recursive: true });
  await refuses(
    t,
    'other weights',
    /unet does not fit this run: \S+ is float16 \[[\d,]+\], not float32 \[[\d,]+\]; resume with/,
    ...['train', runFile('fresh', { steps: 9 }), '--resume', damaged],
  );
  t.equal(names(), before, 'the checkpoints are as they were');
  t.equal((await sdxl('train', file, '--resume', '--quiet')).status, 0, 'a finished run resumed is no error');
});
