// DoRA as it trains: a layer's start, results, gradients and steps against peft's and torch's AdamW (golden/dora.py); runs, whose files
// are merged again and gone on from; and what no run may ask.
import { join } from 'node:path';
import { test } from 'tap';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { type Algo, partsOf } from '../../models/adapters/adapter_kinds.ts';
import { addAdapters } from '../../models/adapters/adapters.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { inspect } from '../../models/inspect.ts';
import { exportLora } from '../../models/lora/export_lora.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { openMaterials } from '../../train/materials.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import {
  adaptedLayer,
  checkLayer,
  checkSteps,
  release,
  type SteppedCase,
  unpacked,
} from '../support/adapter_golden.ts';
import { goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { inPeft, predictions } from '../support/small_adapters.ts';
import { basic, device, folder, locate, losses, model, resumes, run, silent } from '../support/small_runs.ts';

interface DoraCase extends SteppedCase {
  /** The magnitude at first. */
  start: string;
}

const cases = goldenLines<DoraCase>('dora');

test('shapes, starts, results and gradients are those of peft', (t) => {
  t.equal(cases.length, 3);
  for (const on of devices) {
    const before = on.memory.storages;
    for (const golden of cases) {
      const { root, adapter, begun = new Float32Array() } = adaptedLayer(golden, on);
      const shapes = partsOf(adapter).map(({ key, parameter }) => [key, [...parameter.shape]]);
      t.same(shapes, golden.shapes, `[${golden.weight}]`);
      t.ok(maxDifference(begun, unpacked(golden.start)) < 1e-6, `[${golden.weight}]: as long as its rows`);
      release(root, adapter);
      checkLayer(t, golden, on);
    }
    t.equal(on.memory.storages, before, 'live tensors');
  }
  t.end();
});

test('steps of AdamW end where those of torch over peft do', (t) => {
  for (const on of devices) for (const golden of cases) checkSteps(t, golden, on);
  t.end();
});

const targets = [
  'to_q',
  'to_out.0',
  'ff.net.0.proj',
  'conv1',
  'conv_shortcut',
  'downsamplers.0.conv',
  'upsamplers.0.conv',
  'time_emb_proj',
];
const lora = { rank: 2, alpha: 3, conv_rank: 1, conv_alpha: 2, use_dora: true, targets };
const name = 'pytorch_lora_weights.safetensors';

const runs: Record<string, RunInput> = {
  plain: { ema: { decay: 0.9 }, previews: { prompts: ['stripes'], num_inference_steps: 1 } },
  q8: { train: { target: 'lora', gradient_checkpointing: true, q8: true }, ema: { decay: 0 } },
  dropping: {
    train: { target: 'lora', gradient_checkpointing: true },
    lora: { ...lora, network_dropout: 0.2, rank_dropout: 0.1, module_dropout: 0.1, scale_weight_norms: 0.02 },
  },
  fused: {
    train: { target: 'lora', fused_backward_pass: true },
    gradient_accumulation_steps: 1,
    lora: { ...lora, loraplus_lr_ratio: 4 },
    optimizer: { name: 'adafactor', lr: 1e-2 },
  },
  bfloat16: { dtype: 'bfloat16', optimizer: { lr: 1e-3, stochastic_rounding: true } },
  // Prodigy's small first steps move no number of bfloat16 and would tell nothing here.
  prodigy: { optimizer: { name: 'prodigy', lr: 1, d0: 1e-3 } },
};

for (const [kind, more] of Object.entries(runs))
  test(`a run, ${kind}`, async (t) => {
    const before = device.memory.storages;
    const input: RunInput = { train: { target: 'lora' }, lora, optimizer: { lr: 1e-2 }, ...more };
    const final = await resumes(t, `dora-${kind}`, input);
    const path = join(final, name);
    const file = openSafetensors(path);
    const layer = 'unet.down_blocks.0.resnets.0.conv1';
    const info = file.tensors.get(`${layer}.lora_magnitude_vector`);
    t.same([info?.dtype, info?.shape], ['float32', [1, 16, 1, 1]], "peft's name and shape");
    t.match(JSON.parse(file.metadata.lora_adapter_metadata), { 'unet.use_dora': true });
    file.close();
    t.match(JSON.stringify(inspect(path)), /DoRA/);
    const again = join(folder, `dora-${kind}.safetensors`);
    const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
    t.ok(exportLora(path, again, 'lora-kohya', pipeline) > 20, 'exported');
    pipeline.release();
    const exported = openSafetensors(again);
    t.same(
      exported.tensors.get('lora_unet_down_blocks_0_resnets_0_conv1.dora_scale')?.shape,
      [16, 1, 1, 1],
      "kohya's",
    );
    exported.close();
    const [base, live, merged, kohya] = predictions(
      [path, again],
      { ...lora, ...input.lora, targets },
      inPeft,
    );
    t.ok(maxDifference(base, live) > 1e-3, `it has learnt: ${maxDifference(base, live)}`);
    for (const [format, y] of Object.entries({ peft: merged, kohya }))
      t.ok(
        maxDifference(live, y) < 3e-5,
        `${format}'s file merged computes what the adapters do: ${maxDifference(live, y)}`,
      );
    t.equal(device.memory.storages, before, 'live tensors');
  });

test('it begins as the model is, and its plan counts the magnitudes', async (t) => {
  const first = async (own: RunInput['lora']) => {
    const output = `dora-first-${own?.use_dora}`;
    await run({ ...basic(output), steps: 1, train: { target: 'lora' }, lora: own });
    return losses(join(folder, output))[0][1] as number;
  };
  const [dora, plain] = [await first(lora), await first({ ...lora, use_dora: false })];
  t.ok(Math.abs(dora / plain - 1) < 1e-6, `${dora}, ${plain}`);
  const planned = async (own: RunInput['lora']) =>
    planOf(
      await openMaterials(
        resolveRun({ ...basic('dora-plan'), train: { target: 'lora' }, lora: own }, 'test', 'test'),
        locate,
        silent,
      ),
    );
  const [one, other] = [await planned(lora), await planned({ ...lora, use_dora: false })];
  t.ok(one.trained_parameters > other.trained_parameters, 'more parameters');
  t.ok(one.memory_bytes[0] > other.memory_bytes[0], `${one.memory_bytes}, ${other.memory_bytes}`);
  t.match(describe(one).join('\n'), /trained +lora \(rank 2, alpha 3, .*use_dora/);
});

test('text encoders have magnitudes too, by their own learning rate', async (t) => {
  const input: RunInput = {
    ...basic('dora-texts'),
    train: { target: 'lora', text_encoders: true },
    lora: { rank: 2, use_dora: true, text_encoder_targets: ['q_proj', 'fc1'] },
    ...{ steps: 1, ema: { decay: 0 }, lr_scheduler: { name: 'constant' } },
    optimizer: { lr: 1e-3, text_encoder_lr: 1e-4, weight_decay: 0 },
  };
  const final = (await run(input)).folder;
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  const file = openSafetensors(join(final, name));
  const [{ encoder }] = pipeline.text.encoders;
  const [adapter] = addAdapters(
    encoder,
    { rank: 1, alpha: 1, use_dora: true, targets: ['layers.0.mlp.fc1'] },
    (_, n) => new Float32Array(n),
  );
  const magnitude = [...file.tensors.keys()].find((key) =>
    /^text_encoder\..*layers\.0\.mlp\.fc1\.lora_magnitude_vector$/.test(key),
  ) as string;
  const moved = maxDifference(
    decodeFloats(file.read(magnitude), 'float32'),
    adapter.magnitude?.parameter.tensor.floats() ?? new Float32Array(),
  );
  t.ok(Math.abs(moved / 1e-4 - 1) < 2e-3, `moved by ${moved}`);
  file.close();
  t.ok(mergeLora(loadPipeline(openModel(model), { device, dtype: 'float32' }), join(final, name)) > 20);
  pipeline.release();
});

test('a run goes on from a DoRA, and from a plain LoRA', async (t) => {
  const input = (output: string, more: RunInput): RunInput => ({
    ...{ ...basic(output), steps: 2, train: { target: 'lora' }, lora, ema: { decay: 0 } },
    ...more,
  });
  const optimizer = { lr: 1e-2 };
  const dora = join((await run(input('dora-from', { optimizer }))).folder, name);
  const plain = { ...lora, use_dora: false };
  const other = join((await run(input('lora-from', { optimizer, lora: plain }))).folder, name);
  const config = { ...lora, alpha: 6, conv_alpha: 1 };
  for (const [k, from] of [dora, other].entries()) {
    const more = { ...lora, alpha: 6, conv_alpha: 1, network_weights: from };
    const on = await run(input(`dora-on-${k}`, { optimizer: { lr: 0 }, lora: more }));
    const [, live, merged, theirs] = predictions([join(on.folder, name), from], config, inPeft);
    t.ok(maxDifference(live, merged) < 2e-5, 'its own');
    t.ok(maxDifference(live, theirs) < 2e-5, `what the file makes: ${maxDifference(live, theirs)}`);
  }
  await t.rejects(run(input('dora-refused', { lora: { ...plain, network_weights: dora } })), {
    name: 'UserError',
    message: /names are of a DoRA: .*; set lora\.use_dora$/,
  });
});

test('what does not go together is refused', (t) => {
  const refused = (own: RunInput['lora'], message: RegExp, target: 'lora' | 'unet' = 'lora') =>
    t.throws(() => resolveRun({ train: { target }, lora: own }, 'test', 'test'), {
      name: 'UserError',
      message,
    });
  for (const algo of ['loha', 'lokr'] as Algo[])
    refused(
      { algo, use_dora: true },
      new RegExp(`"lora\\.use_dora" is of LoRA, and "lora\\.algo" is "${algo}"`),
    );
  refused(
    { use_dora: true },
    /"lora\.use_dora" is of adapters, and "train\.target" is "unet"; leave it out, or set/,
    'unet',
  );
  for (const key of ['dora_wd', 'weight_decompose'])
    refused({ [key]: true } as RunInput['lora'], /unknown key "lora\.\w+"; here it is "lora\.use_dora"/);
  t.throws(() => resolveRun({ use_dora: true } as RunInput, 'test', 'test'), /here it is "lora\.use_dora"/);
  t.end();
});
