// Learning rates of the UNet's blocks: which block a weight is of, by a table of kohya's numbers for SDXL; that each block's weights and
// adapters move by its rate and those of rate 0 not at all, as torch's parameter groups; and what no run may ask.
import { join } from 'node:path';
import { test } from 'tap';
import { namedParameters } from '../../engine/module.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { blockCount, blockOf } from '../../models/formats/unet_blocks.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { openMaterials } from '../../train/materials.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { basic, device, locate, model, resumes, run, silent } from '../support/small_runs.ts';

const source = openModel(model);
const config = parseUNetConfig(source.config('unet'));
const keys = [...namedParameters(unet(config)).keys()];

/** kohya's numbers, by how diffusers' keys begin. */
const numbers: [prefix: string, block: number][] = [
  ['time_embedding.', 0],
  ['add_embedding.', 0],
  ['conv_in.', 1],
  ...[0, 1, 2].flatMap((level): [string, number][] => [
    [`down_blocks.${level}.resnets.0.`, 2 + 3 * level],
    [`down_blocks.${level}.attentions.0.`, 2 + 3 * level],
    [`down_blocks.${level}.resnets.1.`, 3 + 3 * level],
    [`down_blocks.${level}.attentions.1.`, 3 + 3 * level],
    [`down_blocks.${level}.downsamplers.0.`, 4 + 3 * level],
  ]),
  ['mid_block.resnets.0.', 10],
  ['mid_block.attentions.0.', 11],
  ['mid_block.resnets.1.', 12],
  ...[0, 1, 2].flatMap((level): [string, number][] =>
    [0, 1, 2].flatMap((layer): [string, number][] => [
      [`up_blocks.${level}.resnets.${layer}.`, 13 + 3 * level + layer],
      [`up_blocks.${level}.attentions.${layer}.`, 13 + 3 * level + layer],
      ...(layer === 2
        ? [[`up_blocks.${level}.upsamplers.0.`, 15 + 3 * level] satisfies [string, number]]
        : []),
    ]),
  ),
  ['conv_norm_out.', 22],
  ['conv_out.', 22],
];
const blockByTable = (key: string): number =>
  (numbers.find(([prefix]) => key.startsWith(prefix)) as [string, number])[1];

test("every weight is of kohya's block", (t) => {
  t.equal(blockCount(config), 23);
  for (const key of keys) t.equal(blockOf(key, config), blockByTable(key), key);
  t.same(
    [...new Set(keys.map(blockByTable))].sort((a, b) => a - b),
    [...Array(23).keys()],
    'all have some',
  );
  t.end();
});

/** Of the 23 blocks every fourth is not trained, and each other one has its own rate. */
const block_lr = Array.from({ length: 23 }, (_, block) => (block % 4 === 1 ? 0 : 1e-3 * (1 + block / 23)));
const once: RunInput = { steps: 1, ema: { decay: 0 }, lr_scheduler: { name: 'constant' } };
const optimizer = { lr: 1e-3, block_lr, weight_decay: 0, max_grad_norm: 0 };

/** How far the numbers of each block moved at the most, of those whose key fits. */
function farthest(moved: Iterable<readonly [key: string, by: Float32Array]>): number[] {
  const most = Array<number>(23).fill(0);
  for (const [key, by] of moved) {
    const block = blockByTable(key);
    most[block] = Math.max(most[block], ...by.map(Math.abs));
  }
  return most;
}

test('weights move by the rate of their block, and not at all where it is 0', async (t) => {
  for (const fused_backward_pass of [false, true]) {
    const final = await run({
      ...{ ...basic(`blocks-${fused_backward_pass}`), ...once, optimizer },
      ...{ train: { fused_backward_pass }, gradient_accumulation_steps: 1 },
    });
    const [before, after] = [join(model, 'unet'), join(final.folder, 'unet')].map((path) =>
      openSafetensors(join(path, 'diffusion_pytorch_model.safetensors')),
    );
    const floats = (file: typeof before, key: string) =>
      decodeFloats(file.read(key), file.tensors.get(key)?.dtype ?? 'float32');
    const moved = keys.map((key) => {
      const [a, b] = [floats(before, key), floats(after, key)];
      return [key, a.map((x, i) => x - b[i])] as const;
    });
    // AdamW's first step is the rate, where a gradient is well above eps.
    for (const [block, most] of farthest(moved).entries()) {
      const rate = block_lr[block];
      t.ok(
        rate === 0 ? most === 0 : Math.abs(most / rate - 1) < 1e-3,
        `block ${block}: ${most}, rate ${rate}`,
      );
    }
    before.close();
    after.close();
    const state = openSafetensors(
      join(listCheckpoints(final.folder.replace(/.final$/, '')).at(-1) as string, 'optimizer.safetensors'),
    );
    const kept = [...state.tensors.keys()].flatMap((name) => /^exp_avg\.unet\.(.*)/.exec(name)?.[1] ?? []);
    t.ok(kept.length > 100 && kept.every((key) => block_lr[blockByTable(key)] > 0), 'nor has it moments');
    state.close();
  }
});

for (const algo of ['lora', 'loha'] as const)
  test(`adapters of ${algo} learn by the rate of their block, and there is none where it is 0`, async (t) => {
    const path = join(
      (
        await run({
          ...{ ...basic(`blocks-${algo}`), ...once, train: { target: 'lora', text_encoders: true } },
          lora: { algo, rank: 2, targets: ['to_q', 'conv1', 'conv'], text_encoder_targets: ['q_proj'] },
          optimizer: { ...optimizer, text_encoder_lr: 1e-4 },
        })
      ).folder,
      'pytorch_lora_weights.safetensors',
    );
    const file = openSafetensors(path);
    const layers = new Map(
      keys.flatMap((key) => {
        const layer = key.replace(/\.weight$/, '');
        const named =
          algo === 'lora'
            ? `unet.${layer}.lora_B.weight`
            : `lora_unet_${layer.replaceAll('.', '_')}.hada_w2_a`;
        return file.tensors.has(named) ? [[key, decodeFloats(file.read(named), 'float32')] as const] : [];
      }),
    );
    const withLayers = new Set(
      keys.filter((key) => /\.(to_q|conv1|conv)\.weight$/.test(key)).map(blockByTable),
    );
    const most = farthest(layers);
    for (const block of withLayers) {
      const rate = block_lr[block];
      t.ok(
        rate === 0 ? most[block] === 0 : Math.abs(most[block] / rate - 1) < 1e-3,
        `block ${block}: ${most[block]}, rate ${rate}`,
      );
    }
    t.ok(withLayers.size > 15, `${withLayers.size} blocks`);
    t.ok(
      [...layers.keys()].every((key) => block_lr[blockByTable(key)] > 0),
      'no adapter elsewhere',
    );
    const texts = [...file.tensors.keys()].filter((name) => /text_encoder.*lora_B|te\d.*w2_a/.test(name));
    const theirs = Math.max(
      ...texts.flatMap((name) => [...decodeFloats(file.read(name), 'float32')].map(Math.abs)),
    );
    t.ok(Math.abs(theirs / 1e-4 - 1) < 1e-4, `the text encoders have theirs: ${theirs}`);
    file.close();
  });

test('of two rates of text encoders each has its own, and none is trained by 0', async (t) => {
  const train = { text_encoders: true };
  const parts = ['text_encoder', 'text_encoder_2'];
  for (const text_encoder_lr of [
    [1e-4, 0],
    [1e-4, 3e-4],
  ]) {
    const own = { ...once, optimizer: { ...optimizer, block_lr: [], text_encoder_lr } };
    const name = `texts-${text_encoder_lr[1]}`;
    const { folder } = await run({ ...basic(name), ...own, train });
    for (const [i, part] of parts.entries()) {
      const rate = text_encoder_lr[i];
      const [before, after] = [model, folder].map((at) =>
        openSafetensors(join(at, part, 'model.safetensors')),
      );
      const moved = [...before.tensors].flatMap(([key, { dtype }]) => {
        if (/position_ids$/.test(key)) return [];
        const [a, b] = [before, after].map((file) => decodeFloats(file.read(key), dtype as 'float32'));
        return [...a.map((x, k) => Math.abs(x - b[k]))];
      });
      const most = moved.reduce((a, b) => Math.max(a, b));
      t.ok(rate === 0 ? most === 0 : Math.abs(most / rate - 1) < 1e-3, `${part}: ${most}, rate ${rate}`);
      for (const file of [before, after]) file.close();
    }
    const lora: RunInput = { ...basic(`${name}-lora`), ...own, train: { ...train, target: 'lora' } };
    const file = openSafetensors(join((await run(lora)).folder, 'pytorch_lora_weights.safetensors'));
    const most = (part: string): number =>
      [...file.tensors.keys()]
        .filter((key) => key.startsWith(`${part}.`) && /lora_B/.test(key))
        .flatMap((key) => [...decodeFloats(file.read(key), 'float32').map(Math.abs)])
        .reduce((a, b) => Math.max(a, b), -1);
    for (const [i, part] of parts.entries()) {
      const rate = text_encoder_lr[i];
      t.ok(
        rate === 0 ? most(part) === -1 : Math.abs(most(part) / rate - 1) < 1e-4,
        `adapters of ${part}: ${most(part)}, rate ${rate}`,
      );
    }
    file.close();
  }
});

test('runs resume, with other rates too, but with no other blocks', async (t) => {
  for (const [name, more] of Object.entries({
    unet: { optimizer: { ...optimizer, name: 'adafactor' } },
    lion: { optimizer: { ...optimizer, name: 'lion' } },
    adamw8bit: { dtype: 'bfloat16', optimizer: { ...optimizer, name: 'adamw8bit' } },
    prodigy: {
      train: { parts: ['attn2'] },
      optimizer: { name: 'prodigy', lr: 1, block_lr: block_lr.map((rate) => Number(rate > 0)) },
    },
    lora: { train: { target: 'lora' }, lora: { rank: 2, use_dora: true }, optimizer },
  } satisfies Record<string, RunInput>))
    await resumes(t, `blocks-${name}`, more);
  const input: RunInput = { ...basic('blocks-other'), steps: 3, optimizer };
  const { folder: checkpoint } = await run(input, { until: 1 });
  const others = (rates: number[]): RunInput => ({ ...input, optimizer: { ...optimizer, block_lr: rates } });
  await t.rejects(run(others(block_lr.map((rate) => rate || 1e-3)), { checkpoint }), {
    name: 'UserError',
    message: /is of another run: optimizer\.block_lr was \[/,
  });
  await t.resolves(run(others(block_lr.map((rate) => rate / 2)), { checkpoint }), 'lower rates');
  const train = { text_encoders: true };
  const texts = (...text_encoder_lr: number[]): RunInput => ({
    ...{ ...basic('texts-other'), steps: 3, train },
    optimizer: { lr: 1e-4, text_encoder_lr },
  });
  const begun = await run(texts(1e-4, 0), { until: 1 });
  await t.rejects(run(texts(1e-4, 1e-5), { checkpoint: begun.folder }), {
    name: 'UserError',
    message: /is of another run: optimizer\.text_encoder_lr was \[/,
  });
  await t.resolves(run(texts(1e-5, 0), { checkpoint: begun.folder }), 'a lower rate of the first');
  t.equal(device.memory.storages, 0, 'live tensors');
});

test('a plan tells the rates, and has less in memory', async (t) => {
  const planned = async (own: RunInput['optimizer']) =>
    planOf(
      await openMaterials(
        resolveRun({ ...basic('blocks-plan'), optimizer: own }, 'test', 'test'),
        locate,
        silent,
      ),
    );
  const half = Array.from({ length: 23 }, (_, block) => (block < 13 ? 0 : 1e-4));
  const [some, all] = [await planned({ lr: 1e-4, block_lr: half }), await planned({ lr: 1e-4 })];
  t.ok(some.trained_parameters < all.trained_parameters && some.memory_bytes[0] < all.memory_bytes[0]);
  t.match(describe(some).join('\n'), /lr 0\.0001 \(blocks 0 to 12: frozen, 13 to 22: 0\.0001\)/);
});

test('what does not go together is refused', async (t) => {
  const refused = (input: RunInput, message: RegExp) =>
    t.throws(() => resolveRun(input, 'test', 'test'), { name: 'UserError', message });
  const rates = (value: number) => Array<number>(23).fill(value);
  refused(
    { train: { target: 'vae' }, optimizer: { block_lr: rates(1e-4) } },
    /"optimizer\.block_lr" has learning rates of the UNet's blocks/,
  );
  refused({ optimizer: { block_lr: rates(0) } }, /"optimizer\.block_lr" has only rates of 0/);
  refused(
    { optimizer: { lr: 0, block_lr: rates(1) } },
    /"optimizer\.lr" is 0, of which "optimizer\.block_lr"/,
  );
  refused(
    { optimizer: { name: 'prodigy', lr: 1, block_lr: rates(0.5) } },
    /"optimizer\.block_lr" has 0\.5 beside "optimizer\.lr" 1, and Prodigy has one learning rate/,
  );
  refused({ optimizer: { block_lr: [-1] } }, /"optimizer\.block_lr" is \[-1\]; it takes a list/);
  refused({ block_lr: [1] } as RunInput, /here it is "optimizer\.block_lr"/);
  refused({ lora: { down_lr_weight: 'cosine' } } as RunInput, /here it is "optimizer\.block_lr"/);
  const rejected = (name: string, input: RunInput, message: RegExp) =>
    t.rejects(run({ ...basic(name), steps: 1, ...input }), { name: 'UserError', message });
  await rejected(
    'blocks-few',
    { optimizer: { block_lr: rates(1e-4).slice(1) } },
    /^optimizer\.block_lr has 22 rates, and the model's UNet 23 blocks: .*9 on the way down/,
  );
  const last = rates(0);
  last[22] = 1e-4;
  await rejected(
    'blocks-none',
    { train: { target: 'lora' }, optimizer: { block_lr: last } },
    /^optimizer\.block_lr is 0 for every block that has layers of lora\.targets/,
  );
  await rejected(
    'blocks-parts',
    { train: { parts: ['attn2'] }, optimizer: { block_lr: last } },
    /^optimizer\.block_lr is 0 for every block that has weights of train\.parts \["attn2"\]/,
  );
});
