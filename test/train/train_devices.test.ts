// Two devices that take a run's passes in turn end in the bytes of one, whatever is trained. Here both are the CPU, and tensors go from one
// to the other by way of the host.
import { join } from 'node:path';
import { test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import type { Driver, Exchange } from '../../engine/driver.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import type { RunInput } from '../../train/run/run.ts';
import { writeEncoder } from '../support/ip_adapter_golden.ts';
import { noLibrary, ownDevice } from '../support/native_library.ts';
import {
  basic,
  control,
  device,
  digest,
  folder,
  losses,
  paired,
  pictures,
  run,
} from '../support/small_runs.ts';

/** A second device, between which and the first tensors are copied by the host. */
function another(): Device {
  const other = noLibrary ? openDevice('reference') : ownDevice();
  const exchanges = new Map<Exchange, Driver>();
  for (const { driver } of [device, other]) {
    const exchange: Exchange = {
      mark: () => 0n,
      after() {},
      finish() {},
      copy(to, from, source, bytes) {
        const carried = new Uint8Array(bytes);
        exchanges.get(source)?.download(from, 0, carried);
        driver.upload(to, 0, carried);
      },
    };
    exchanges.set(exchange, driver);
    Object.assign(driver, { exchange });
  }
  return other;
}

// An update is of two passes, but each epoch's last one of a single one: the second, which is made on one device again. In a third the
// other joins in again.
test('two devices end in the bytes of one, whatever is trained, and resume on one or two', async (t) => {
  const further = [another()];
  const held = () => [device, ...further].map(({ memory }) => memory.storages);
  const before = held();
  const tasks: Record<string, RunInput> = {
    unet: { train: { gradient_checkpointing: true } },
    parts: { dtype: 'bfloat16', train: { parts: ['attn2'] } },
    'all-bfloat16': {
      dtype: 'bfloat16',
      train: { parts: ['attn2'] },
      optimizer: { moments_dtype: 'bfloat16', stochastic_rounding: true },
    },
    lora: { train: { target: 'lora' }, lora: { rank: 2, alpha: 4, targets: ['to_q', 'conv1'] } },
    texts: { train: { text_encoders: true } },
    'tags anew': { dataset: { ...basic('tags').dataset, path: pictures, shuffle_caption: true } },
    'lora-texts': {
      train: { target: 'lora', text_encoders: true },
      lora: { rank: 2, text_encoder_targets: ['q_proj', 'fc1'] },
      optimizer: { lr: 1e-3, text_encoder_lr: 1e-4 },
    },
    prodigy: { train: { parts: ['attn2', 'time_'] }, optimizer: { name: 'prodigy', lr: 1 } },
    'schedule-free': {
      dtype: 'bfloat16',
      train: { parts: ['attn2'] },
      optimizer: { name: 'adamw_schedule_free', lr: 1e-3 },
      ...{ lr_scheduler: {}, ema: {} },
    },
    vae: { train: { target: 'vae' } },
    controlnet: { ...control, train: { target: 'controlnet', gradient_checkpointing: true } },
    t2i_adapter: { ...control, train: { target: 't2i_adapter' }, controlnet: {} },
    ip_adapter: {
      train: { target: 'ip_adapter', gradient_checkpointing: true },
      ip_adapter: { image_encoder_path: writeEncoder(join(folder, 'image_encoder')) },
    },
    'lora-regular': {
      train: { target: 'lora', gradient_checkpointing: true },
      lora: { rank: 2, network_dropout: 0.2, module_dropout: 0.1, scale_weight_norms: 0.01 },
    },
    lokr: {
      ...{ dtype: 'bfloat16', train: { target: 'lora' } },
      lora: {
        algo: 'lokr',
        rank: 2,
        factor: 4,
        targets: ['to_q', 'conv1'],
        scale_weight_norms: 0.01,
        rank_dropout: 0.2,
      },
    },
    oft: {
      ...{ dtype: 'bfloat16', train: { target: 'lora' } },
      lora: { algo: 'oft', rank: 4, rescaled: true, targets: ['to_q', 'conv1'], module_dropout: 0.2 },
    },
    dora: { dtype: 'bfloat16', train: { target: 'lora' }, lora: { rank: 2, use_dora: true } },
    blocks: {
      train: { parts: ['attn', 'time_'] },
      optimizer: { lr: 1e-3, block_lr: Array.from({ length: 23 }, (_, block) => (block % 3) * 1e-3) },
    },
    token: {
      train: { target: 'textual_inversion', gradient_checkpointing: true },
      textual_inversion: {
        ...{ placeholder_token: '<stripes>', initializer_token: 'red', num_vectors: 2 },
        learnable_property: 'style',
      },
    },
    lcm: { dtype: 'bfloat16', train: { target: 'lora', method: 'lcm' }, lora: { rank: 2 } },
    'lcm-unet': { train: { method: 'lcm', parts: ['attn2'] }, ema: { decay: 0 } },
    dpo: {
      train: { method: 'dpo', parts: ['attn2'] },
      dataset: { ...basic('dpo').dataset, path: paired },
    },
    'lora-q8': { train: { target: 'lora', gradient_checkpointing: true, q8: true }, lora: { rank: 2 } },
  };
  // Every other's own test takes it up again on one device, from a checkpoint with these bytes; averages are of whatever is trained.
  const resumed = ['unet', 'all-bfloat16', 'texts', 'tags anew', 'vae'];
  const saved = (output: string) => listCheckpoints(join(folder, output)).map(digest);
  for (const [name, task] of Object.entries(tasks)) {
    const steps = name === 'unet' ? 3 : 2;
    const until = resumed.includes(name) ? 1 : undefined;
    const kept: RunInput = until
      ? { checkpoints: { every_steps: 1, keep: 3 } }
      : { checkpoints: { every_steps: steps }, ema: { decay: 0 } };
    const input = (ending: string): RunInput => ({ ...basic(`${name}-${ending}`), steps, ...kept, ...task });
    await run(input('one'));
    const { folder: checkpoint } = await run(input('two'), { until, further });
    if (name === 'unet') {
      await run(input('joined'), { checkpoint, further });
      t.equal(saved('unet-joined').at(-1), saved('unet-one').at(-1), 'the second joins in again');
    }
    if (until) await run(input('two'), { checkpoint });
    t.equal(saved(`${name}-one`).length, until ? steps : 1);
    t.same(saved(`${name}-two`), saved(`${name}-one`), name);
    t.same(losses(join(folder, `${name}-two`)), losses(join(folder, `${name}-one`)), `${name}: losses`);
  }
  t.same(held(), before, 'live tensors');
  t.ok(further[0].memory.peak > 0, 'the second device had its passes');
});
