// The benchmark command and what it counts: the full-size UNet's arithmetic against PyTorch's own count, walked on the
// device that computes nothing; and a small model measured for real.
import { test } from 'tap';
import { benchModel } from '../../bench/model.ts';
import { opCases } from '../../bench/ops.ts';
import { buildSubject } from '../../bench/subjects.ts';
import { type Device, openDevice } from '../../engine/device.ts';
import { profiled, standInCuda, standInDevice } from '../../engine/profile.ts';
import { presets } from '../../models/formats/presets.ts';
import { sdxl as run } from '../support/command_line.ts';
import { nonEmpty } from '../support/non_empty.ts';

const square = (side: number) => ({ width: side, height: side, batch: 1 });

test('operations are counted as torch.utils.flop_counter counts them', (t) => {
  // FlopCounterMode over diffusers' UNet2DConditionModel; the VAE's decoder from a log of its calls in PyTorch, in which three
  // convolutions of doubled images are 2.7831 TFLOP: ours (engine/doubled.ts) take 16 products where those take 36.
  const want = { unet: 6.76123639808e12, vae: 10.4704e12 - (20 / 36) * 2.7831e12 };
  for (const name of ['unet', 'vae'] as const) {
    let flops = 0;
    const device = profiled(standInDevice(), ({ record, tensors, attrs }) => {
      flops += record.flops?.(tensors, attrs) ?? 0;
    });
    const subject = buildSubject(name, presets['sdxl-base'], square(1024), device, 'bfloat16');
    subject.run();
    t.ok(Math.abs(flops / want[name] - 1) < 1e-5, `${name}: ${flops}`);
    subject.release();
    t.equal(device.memory.live, 0);
  }
  t.end();
});

test('the stand-in device foretells the memory of a real run', (t) => {
  const peak = (device: ReturnType<typeof openDevice>) => {
    const before = device.memory.live;
    device.memory.peak = before;
    const subject = buildSubject('unet', presets.tiny, square(64), device, 'float32');
    subject.run();
    subject.release();
    t.equal(device.memory.live, before);
    return device.memory.peak - before;
  };
  t.equal(peak(standInDevice()), peak(openDevice('auto')));
  t.end();
});

test('bench reports a forward pass', async (t) => {
  const size = ['--width', '64', '--height', '48', '--batch', '2'];
  const { status, out } = await run('bench', 'unet', '--preset', 'tiny', ...size, '--json', '--quiet');
  t.equal(status, 0);
  const report = JSON.parse(out);
  t.match(report, { subject: 'unet', preset: 'tiny', width: 64, height: 48, batch: 2, dtype: 'float32' });
  t.ok(report.seconds.median > 0 && report.flops > 0 && report.peak_bytes > 0 && report.parameters > 7e5);
  const total = report.ops.reduce((sum: number, op: { share: number }) => sum + op.share, 0);
  t.ok(Math.abs(total - 1) < 1e-12, `shares add up to ${total}`);
  t.ok(report.ops.some((op: { op: string; calls: number }) => op.op === 'conv2d' && op.calls === 51));
});

test('a device that queues its work is waited for, and watched op by op in a run of its own', (t) => {
  const report = (device: Device) =>
    benchModel('unet', { preset: 'tiny', ...square(64), dtype: 'float32', runs: 2 }, device);
  const gpu = standInCuda();
  let waits = 0;
  const told: number[] = [];
  gpu.driver.synchronize = () => void waits++;
  const runs = report({
    ...gpu,
    execute(record, direction, tensors, attrs) {
      told.push(waits);
      gpu.execute(record, direction, tensors, attrs);
    },
  });
  const calls = told.length / 4;
  t.equal(
    new Set(told.slice(0, 3 * calls)).size,
    3,
    'warming up and the two timed runs wait at their ends alone',
  );
  t.equal(new Set(told.slice(3 * calls)).size, calls, 'the watched run waits for each op');
  const here = report(openDevice('cpu'));
  const counts = ({ flops, ops }: typeof here) => [
    flops,
    ...ops.map(({ op, calls }) => `${op} ${calls}`).sort(),
  ];
  t.same(counts(runs), counts(here));
  t.end();
});

test('bench times an update, of all weights or of adapters', async (t) => {
  const update = async (...more: string[]) => {
    const { out } = await run(
      'bench',
      'train',
      '--preset',
      'tiny',
      '--runs',
      '1',
      '--json',
      '--quiet',
      ...more,
    );
    return JSON.parse(out);
  };
  const [whole, adapters] = [await update(), await update('--lora-rank', '4')];
  t.equal(whole.parameters, 714_660);
  t.equal(adapters.parameters, 39_104);
  t.ok(whole.flops > adapters.flops, 'frozen weights need no gradients');
  const calls = (name: string) => whole.ops.find((op: { op: string }) => op.op === name).calls;
  t.equal(calls('linear backward'), 213);
  t.equal(calls('adafactor'), 620, 'one step for each parameter');
});

test('bench unet --q8 decodes each matrix once', async (t) => {
  const size = ['--width', '64', '--height', '64'];
  const { out } = await run(
    'bench',
    'unet',
    '--preset',
    'tiny',
    ...size,
    '--runs',
    '1',
    '--q8',
    '--json',
    '--quiet',
  );
  const { q8, ops } = JSON.parse(out);
  t.equal(q8, true);
  const { calls } = ops.find(({ op }: { op: string }) => op === 'from_q8');
  t.ok(calls > 50, `${calls} calls`);
});

test('bench times every op of the models, each distinct call once', async (t) => {
  const { out } = await run('bench', 'ops', '--preset', 'tiny', '--op', 'attention', '--json', '--quiet');
  const { timings } = JSON.parse(out);
  t.equal(
    timings.length,
    opCases('tiny', square(64), 'float32').filter((c) => c.record.name === 'attention').length,
  );
  const speeds = timings.map((each: { gflops_per_second: number }) => each.gflops_per_second) as number[];
  t.ok(nonEmpty(speeds).every((each) => each > 0));
});

test('a wrong benchmark is one sentence', async (t) => {
  for (const [argv, word] of [
    [['bench', 'unet', '--preset', 'tinny'], 'sdxl-refiner'],
    [['bench', 'vae', '--width', '60'], 'divisible by 8'],
    [['bench', 'text', '--dtype', 'int8'], 'bfloat16'],
    [['bench', 'ops', '--preset', 'tiny', '--op', 'atention'], 'attention'],
    [['bench', 'ops', '--preset', 'tiny', '--op', 'lion'], /"lion"; their ops are (?!.*lion).*attention/],
    [['bench', 'ops', '--preset', 'tiny', '--op', 'attention', '--runs', '1'], "unknown option '--runs'"],
    [['bench', 'text', '--preset', 'tiny', '--width', '64'], "unknown option '--width'"],
  ] as const) {
    const { status, err } = await run(...argv, '--quiet');
    t.equal(status, 2);
    t.match(err, word);
  }
});
