// `sdxl plan`: what a run comes to, what to set for it to fit, and the word of that with which one is begun that does not.
import { existsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { adopt } from '../../engine/device.ts';
import { presets } from '../../models/formats/presets.ts';
import { sdxl } from '../support/command_line.ts';
import { noLibrary, ownDevice } from '../support/native_library.ts';
import { folder, model, refuses, runFile } from '../support/run_files.ts';

test('plan', async (t) => {
  const { status, out } = await sdxl(
    'plan',
    runFile('plan', { batch_size: 2, gradient_accumulation_steps: 2 }),
    '--quiet',
  );
  t.equal(status, 0);
  for (const line of [
    /images +4 from [^,]*\n/,
    /batch +4 \(2 x 2/,
    /updates +2: 1 an epoch, 2 epochs/,
    /trained +unet: 714660/,
    /objective +epsilon, mse\n/,
    /checkpoints every epoch, the newest 3 kept\n/,
    /memory +0\.\d+ GiB/,
  ])
    t.match(out, line);
  const larger = await sdxl(
    'plan',
    runFile('plan', { steps: 4, checkpoints: { every_steps: 2, keep: 1 } }),
    '--quiet',
    '--set',
    'dataset.resolution=64',
  );
  t.match(larger.out, /checkpoints every 2 updates, the newest one kept\n/);
  t.match(larger.out, /updates +4: 4 an epoch, 1 epoch\n/);
  t.match(larger.out, /images +4 from [^,]*, 4 of them enlarged\n/);
  const objective = { snr_gamma: 5, noise_offset: 0.05, debiased: false, timesteps: 'later' };
  const told = await sdxl('plan', runFile('plan', { train: { target: 'lora' }, objective }), '--quiet');
  t.match(told.out, /trained +lora \(rank 8, alpha 8\): /);
  t.match(told.out, /objective +epsilon, mse, snr_gamma 5, noise_offset 0\.05, timesteps later\n/);
  const rounding = { name: 'adamw', lr: 1e-4, moments_dtype: 'bfloat16' };
  const halved = await sdxl('plan', runFile('plan', { optimizer: rounding }), '--quiet');
  t.match(halved.out, /optimizer +adamw \(moments in bfloat16\), lr 0\.0001 /);
  const locon = { rank: 4, alpha: 2, conv_rank: 3, targets: ['to_q', 'conv1'] };
  const divided = await sdxl('plan', runFile('plan', { train: { target: 'lora' }, lora: locon }), '--quiet');
  t.match(divided.out, /lora \(rank 4, alpha 2, convolutions larger than 1x1 rank 3, alpha 2\): /);
  const memory = async (...prompts: object[]) => {
    const told = await sdxl('plan', runFile('plan', { previews: { prompts } }), '--quiet', '--json');
    return JSON.parse(told.out).memory_bytes[0];
  };
  const [small, large] = [
    { width: 32, height: 32 },
    { width: 512, height: 512 },
  ].map((size) => ({
    ...{ prompt: 'a cat', guidance_scale: 1 },
    ...size,
  }));
  const { size: vae } = statSync(join(model, 'vae', 'diffusion_pytorch_model.safetensors'));
  t.ok((await memory(small)) > (await memory()) + 0.9 * vae, 'previews take a VAE, which nothing else does');
  t.ok((await memory(small, large)) > 2 * (await memory(small)), 'the largest counts');
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

const flagsOf = (set: readonly string[]) => set.flatMap((each) => ['--set', each]);

test('a plan tells what to set for a run to fit', async (t) => {
  const file = runFile('fit', { batch_size: 4 });
  const planned = async (vram: number, ...more: string[]) => {
    const { out, err } = await sdxl('plan', file, '--vram', `${vram}`, '--json', '--quiet', ...more);
    t.equal(err, '');
    return JSON.parse(out);
  };
  const share = 0.75 * 2 ** 30;
  // A stand-in for the CPU, which plans no kernels, is several times as fast.
  for (const [device, parts] of [
    ['cuda', [0.75]],
    ['cpu', [0.9, 0.6]],
  ] as const) {
    const on = ['--device', device];
    const { memory_bytes, fit } = await planned(2 ** 30, ...on);
    const [bytes] = memory_bytes;
    t.same(fit, { set: [], bytes, fits: true });
    for (const part of parts) {
      const room = Math.floor(part * bytes);
      const { set, bytes: least, fits } = (await planned(share + room, ...on)).fit;
      t.ok(fits && least <= room, `${part}: ${set}`);
      const flags = flagsOf(set);
      const { memory_bytes: then, effective_batch_size } = await planned(2 ** 30, ...on, ...flags);
      t.equal(then[0], least, 'what it tells is so');
      t.equal(effective_batch_size, 4, 'of as many pictures an update');
      for (const [i, each] of set.entries()) {
        const fewer = flags.filter((_, k) => k >> 1 !== i);
        if (!/batch_size|accumulation/.test(each))
          t.ok((await planned(2 ** 30, ...on, ...fewer)).memory_bytes[0] > room, `${each} is needed`);
      }
    }
  }
  t.match((await sdxl('plan', file, '--vram', '12GB', '--quiet')).out, /vram +it fits\n/);
  const more = ['batch_size=3', 'gradient_accumulation_steps=2'];
  const two = ['plan', file, '--quiet', '--device', 'cuda:0,cuda:1', ...flagsOf(more)];
  const hopeless = (await sdxl(...two, '--vram', '0.75GiB')).out;
  const [, told] =
    /vram +it does not fit; the least it takes is 0\.\d\d GiB, with --set ([a-z].*)\n/.exec(hopeless) ?? [];
  const set = told.split(' --set ');
  t.ok(set.length > 1, hopeless);
  t.equal((await sdxl(...two, ...flagsOf(set))).status, 0, `two GPUs have passes: ${told}`);
  await refuses(t, 'no size', /--vram takes a size such as 10GB, not "much"/, 'plan', file, '--vram', 'much');
});

test('a run that takes more than is free is begun, with a word of what would help', {
  skip: noLibrary,
}, async (t) => {
  const device = adopt(ownDevice());
  const told = async (free: number, name: string, ...more: string[]) => {
    device.driver.room = () => ({ free, total: free });
    const file = runFile(name, { steps: 1, batch_size: 4 });
    const { status, err } = await sdxl('train', file, '--device', 'cpu', ...more);
    t.equal(status, 0, err);
    return err;
  };
  const warning = /warning: that is more than is free; it fits with --set [a-z]/;
  t.match(await told(10e6, 'tight'), warning);
  t.notMatch(
    await told(10e6, 'tight', '--resume', '--set', 'steps=2'),
    /warning/,
    'a run that goes on stays what it is',
  );
  t.notMatch(await told(1e9, 'roomy'), /warning/);
  adopt(ownDevice());
});
