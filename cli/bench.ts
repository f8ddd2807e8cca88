// `sdxl bench`: how fast this machine runs a preset's models, or each op they are made of, on random weights.
import { type Command, Option } from 'commander';
import { benchModel, type ModelReport } from '../bench/model.ts';
import { absentOps, type OpTiming, opCases, timeCase } from '../bench/ops.ts';
import { type SubjectName, subjectNames } from '../bench/subjects.ts';
import { openDevice } from '../engine/device.ts';
import { gib } from '../io/byte_sizes.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { presets } from '../models/formats/presets.ts';
import { devices, number, oneOf, side } from './option_values.ts';
import { progressBar } from './progress.ts';
import type { Terminal } from './terminal.ts';

interface Options {
  preset: string;
  width?: number;
  height?: number;
  batch: number;
  dtype: FloatDType | 'auto';
  device: string;
  runs: number;
  op?: string;
  loraRank?: number;
  q8?: boolean;
  json?: boolean;
  quiet?: boolean;
}

const examples = `
Examples:
  sdxl bench unet --preset sdxl-base --width 512 --height 512
  sdxl bench train --preset sdxl-base --width 256 --height 256 --lora-rank 8
  sdxl bench ops --preset sdxl-base --width 512 --height 512 --op attention --json`;

export function addBench(bench: Command, terminal: Terminal): void {
  bench.addHelpText('after', examples);
  for (const subject of [...subjectNames, 'train', 'ops'] as const) {
    const command = bench
      .command(subject)
      .description(descriptions[subject])
      .addOption(
        new Option('--preset <NAME>', 'the model').choices(Object.keys(presets)).default('sdxl-base'),
      )
      .option('--batch <N>', 'images', number('--batch', { min: 1, max: 64, whole: true }), 1)
      .option(
        '--dtype <NAME>',
        'auto, float32, bfloat16 or float16; auto is bfloat16, but float32 for tiny, the VAE and the reference device',
        oneOf('--dtype', ['auto', 'float32', 'bfloat16', 'float16']),
        'auto',
      )
      .option('--device <NAME>', devices, 'auto')
      .option('--json', 'one JSON object on stdout')
      .option('--quiet', 'no progress')
      .action((options: Options) => run(subject, options, terminal));
    if (subject !== 'text')
      command
        .option('--width <N>', "pixels, divisible by 8 (default: the model's size)", side('--width'))
        .option('--height <N>', "pixels, divisible by 8 (default: the model's size)", side('--height'));
    // An op is run for half a second, however often that is.
    if (subject !== 'ops')
      command.option('--runs <N>', 'timed runs', number('--runs', { min: 1, max: 1000, whole: true }), 3);
    if (subject === 'ops') command.option('--op <NAME>', 'this one alone');
    if (subject === 'unet') command.option('--q8', 'its matrices in 8-bit integers, as sdxl sample --q8');
    if (subject === 'train')
      command.option(
        '--lora-rank <N>',
        'train adapters of this rank on the attention layers in place of the weights',
        number('--lora-rank', { min: 1, max: 1024, whole: true }),
      );
  }
}

type Subject = SubjectName | 'train' | 'ops';

const descriptions: Record<Subject, string> = {
  unet: 'one pass of the UNet',
  vae: "the VAE's decoder",
  text: 'the text encoders on 77 tokens',
  train: 'one update of the UNet: gradient checkpointing, Adafactor',
  ops: "each distinct op of the preset's models, alone",
};

function run(subject: Subject, options: Options, terminal: Terminal): void {
  const device = openDevice(options.device, (line) => terminal.err(`warning: ${line}\n`));
  const trained = presets[options.preset].vae.sample_size;
  const { width = trained, height = trained, batch, preset, runs, quiet = false } = options;
  const small = preset === 'tiny' || subject === 'vae' || device.name === 'reference';
  const dtype = options.dtype === 'auto' ? (small ? 'float32' : 'bfloat16') : options.dtype;
  const sizes = { width, height, batch };
  if (subject === 'ops') {
    const all = opCases(preset, sizes, dtype);
    const cases = all.filter(({ record }) => !options.op || record.name === options.op);
    if (cases.length === 0) {
      const theirs = [...new Set(all.map(({ record }) => record.name))].join(', ');
      throw new UserError(`these models never run an op "${options.op}"; their ops are ${theirs}`);
    }
    const bar = progressBar(terminal, 'ops', quiet);
    const timings = cases.map((each, i) => {
      const timing = timeCase(each, device);
      bar.update(i + 1, cases.length);
      return timing;
    });
    bar.end();
    const absent = options.op ? [] : absentOps(cases);
    if (options.json) {
      terminal.out(`${JSON.stringify({ preset, ...sizes, dtype, device: device.name, timings, absent })}\n`);
    } else terminal.out(opsTable(timings, absent));
    return;
  }
  const bar = progressBar(terminal, `${preset} ${subject}`, quiet);
  const onRun = (done: number) => bar.update(done + 1, runs + 1);
  const report = benchModel(
    subject,
    { preset, ...sizes, dtype, runs, loraRank: options.loraRank, q8: options.q8, onRun },
    device,
  );
  bar.end();
  terminal.out(options.json ? `${JSON.stringify(report)}\n` : modelTable(report));
}

const milliseconds = (seconds: number): string => (seconds * 1000).toFixed(seconds < 0.1 ? 3 : 1);

function modelTable(r: ModelReport): string {
  const { median, min, max, runs } = r.seconds;
  const lines = [
    `${r.preset} ${r.subject}${r.lora_rank ? ` (LoRA, rank ${r.lora_rank})` : ''}, ${r.width}x${r.height}, batch ${r.batch}, ${r.dtype}${r.q8 ? ' in 8-bit integers' : ''} on ${r.device}`,
    `parameters   ${r.parameters.toLocaleString('en')}`,
    `median time  ${median.toFixed(3)} s of ${runs} (${min.toFixed(3)} to ${max.toFixed(3)})`,
    `rate         ${r.tflops_per_second.toFixed(4)} TFLOP/s (${(r.flops / 1e12).toFixed(4)} TFLOP)`,
    `peak memory  ${gib(r.peak_bytes)} in tensors, ${gib(r.peak_process_bytes)} in all`,
    '',
    `${'op'.padEnd(26)}${'calls'.padStart(7)}${'ms'.padStart(12)}${'share'.padStart(9)}`,
  ];
  for (const { op, calls, seconds, share } of r.ops) {
    const percent = `${(100 * share).toFixed(1)} %`;
    lines.push(
      `${op.padEnd(26)}${String(calls || '').padStart(7)}${milliseconds(seconds).padStart(12)}${percent.padStart(9)}`,
    );
  }
  return `${lines.join('\n')}\n`;
}

function opsTable(timings: readonly OpTiming[], absent: readonly string[]): string {
  const head = `${'op'.padEnd(20)}${'calls'.padStart(6)}${'ms'.padStart(11)}${'GFLOP/s'.padStart(10)}${'GB/s'.padStart(8)}  shapes`;
  const rows = timings.map((t) => {
    const rate = t.gflops_per_second > 0 ? t.gflops_per_second.toFixed(1) : '';
    return `${t.op.padEnd(20)}${String(t.count).padStart(6)}${milliseconds(t.seconds).padStart(11)}${rate.padStart(10)}${t.gb_per_second.toFixed(1).padStart(8)}  ${t.shapes}`;
  });
  const rest = absent.length ? [`not in these models' forward passes: ${absent.join(', ')}`] : [];
  return `${[head, ...rows, ...rest].join('\n')}\n`;
}
