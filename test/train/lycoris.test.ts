// LoHa, LoKr and OFT as they train: shapes, results and gradients of a layer against LyCORIS's modules and peft's layers, steps of OFT, and
// how they begin (golden/lycoris.py); runs, whose files are read again; and what no run may ask.
import { join } from 'node:path';
import { test } from 'tap';
import { noGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import {
  type Algo,
  factorization,
  type LoraSizes,
  matricesFor,
} from '../../models/adapters/adapter_kinds.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { inspect } from '../../models/inspect.ts';
import { exportLora, kohyaModule } from '../../models/lora/export_lora.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { numbersOf } from '../../train/data/draws.ts';
import { openMaterials } from '../../train/materials.ts';
import { describe, planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { Run, RunInput } from '../../train/run/run.ts';
import {
  adaptedLayer,
  checkLayer,
  checkSteps,
  type LayerCase,
  release,
  type SteppedCase,
} from '../support/adapter_golden.ts';
import { goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { predictions } from '../support/small_adapters.ts';
import { basic, device, folder, locate, losses, model, resumes, run, silent } from '../support/small_runs.ts';

interface Starts {
  by: 'starts';
  algo: Algo;
  weight: number[];
  rank: number;
  starts: [name: string, shape: number[], spread: number, most: number][];
}

interface Divided {
  by: 'factorization';
  sides: number[];
  factors: number[];
  divided: [number, number][][];
}

const lines = goldenLines<LayerCase | Starts | Divided>('lycoris');
const cases = lines.filter((line): line is LayerCase => ['lycoris', 'peft'].includes(line.by));

const hasSteps = (golden: LayerCase): golden is SteppedCase => 'after' in golden;

test('shapes, results and gradients are those of LyCORIS and peft', (t) => {
  t.equal(cases.length, 16);
  for (const on of devices) {
    const before = on.memory.storages;
    for (const golden of cases) {
      const { root, adapter } = adaptedLayer(golden, on);
      const shapes = adapter.matrices.map(({ key, parameter: { shape } }) => [key, [...shape]]);
      t.same(shapes, golden.shapes, `${golden.by}, ${golden.algo} [${golden.weight}]`);
      release(root, adapter);
      checkLayer(t, golden, on);
      if (hasSteps(golden)) checkSteps(t, golden, on);
    }
    t.equal(on.memory.storages, before, 'live tensors');
  }
  t.end();
});

test('they begin as in LyCORIS, and change nothing', (t) => {
  for (const { by, starts, weight, ...config } of nonEmpty(
    lines.filter((line): line is Starts => line.by === 'starts'),
  )) {
    const golden = { ...config, by, weight, alpha: 1, padding: 1 } as unknown as LayerCase;
    const { matrices } = matricesFor(weight, { ...config, alpha: 1 });
    const drawn = numbersOf(5);
    const values = matrices.map(({ key, parameter: { size, shape }, start }) => {
      if (start === 'zeros' || start === 'ones') return new Float32Array(size);
      const bound = 1 / Math.sqrt(size / shape[0]);
      return start === 'uniform'
        ? drawn(key, size, 'uniform').map((u) => (2 * u - 1) * bound)
        : drawn(key, size, 'normal').map((x) => x * start);
    });
    for (const [k, [name, shape, spread, most]] of starts.entries()) {
      const what = `${config.algo} of rank ${config.rank}: ${name}`;
      t.same([matrices[k].key, matrices[k].parameter.shape], [name, shape], what);
      const own = Math.sqrt(values[k].reduce((sum, x) => sum + x * x, 0) / values[k].length);
      // Of few numbers theirs is far from the true one, too.
      const few = 4 / Math.sqrt(values[k].length);
      t.ok(Math.abs(own - spread) <= few * spread, `${what}: spread ${own}, theirs ${spread}`);
      const greatest = values[k].reduce((a, x) => Math.max(a, Math.abs(x)), 0);
      t.ok(
        Math.abs(greatest - most) <= Math.max(0.3, few) * most,
        `${what}: at most ${greatest}, theirs ${most}`,
      );
    }
    const { root, adapter } = adaptedLayer(golden, device);
    for (const [k, { parameter }] of adapter.matrices.entries())
      if (adapter.matrices[k].start === 'zeros') parameter.tensor.clear();
    const delta = noGrad(() =>
      scope(() => adapter.bounded(adapter.matrices.map((m) => m.parameter.tensor)).floats()),
    );
    t.ok(
      delta.every((x) => x === 0),
      `${config.algo}: no difference at first`,
    );
    release(root, adapter);
  }
  t.end();
});

test('sides are divided as LyCORIS does', (t) => {
  const golden = lines.find((line): line is Divided => line.by === 'factorization') as Divided;
  for (const [i, side] of golden.sides.entries())
    for (const [k, factor] of golden.factors.entries())
      t.same(factorization(side, factor), golden.divided[i][k], `${side} by ${factor}`);
  t.end();
});

const kinds: (Partial<Run['lora']> & LoraSizes)[] = [
  { algo: 'loha', rank: 2, alpha: 3, conv_rank: 1, conv_alpha: 2, rank_dropout: 0.2, module_dropout: 0.1 },
  { algo: 'lokr', rank: 2, alpha: 1, factor: 4, rank_dropout: 0.3 },
  { algo: 'lokr', rank: 1, alpha: 2, conv_rank: 100, decompose_both: true, scale_weight_norms: 0.02 },
  {
    algo: 'oft',
    rank: 4,
    alpha: 8,
    conv_rank: 3,
    rescaled: true,
    module_dropout: 0.1,
    scale_weight_norms: 0.01,
  },
];

const firstOf = { lora: 'lora_down', loha: 'hada_w1', lokr: 'lokr_w1', oft: 'oft_blocks' };

const targets = [
  'to_q',
  'to_out.0',
  'ff.net.0.proj',
  'conv1',
  'conv_shortcut',
  'downsamplers.0.conv',
  'time_emb_proj',
];

for (const [k, lora] of kinds.entries())
  test(`a run of ${JSON.stringify(lora)}`, async (t) => {
    const before = device.memory.storages;
    const name = `lycoris-${k}`;
    const more: RunInput = {
      train: { target: 'lora', gradient_checkpointing: k > 0, q8: k % 2 === 1, fused_backward_pass: k === 2 },
      gradient_accumulation_steps: k === 2 ? 1 : 2,
      lora: { ...lora, targets },
      previews: { prompts: ['stripes'], num_inference_steps: 1 },
      ema: { decay: k === 0 ? 0.9 : 0 },
    };
    const final = await resumes(t, name, more);
    const path = join(final, 'pytorch_lora_weights.safetensors');
    const file = openSafetensors(path);
    const layer = 'lora_unet_down_blocks_0_resnets_0_conv1';
    t.ok(
      [...file.tensors.keys()].some((key) => key.startsWith(`${layer}.${firstOf[lora.algo ?? 'lora']}`)),
      'spelled as LyCORIS',
    );
    t.same(file.tensors.get(`${layer}.alpha`)?.shape, []);
    if (lora.algo === 'oft') {
      const norms = [...file.tensors.keys()]
        .filter((key) => key.endsWith('.oft_blocks'))
        .map((key) => Math.hypot(...decodeFloats(file.read(key), 'float32')));
      t.ok(Math.max(...norms) < 0.01001 && Math.max(...norms) > 0.0099, `bounded: ${norms}`);
      t.equal(decodeFloats(file.read(`${layer}.alpha`), 'float32')[0], 0, 'no constraint');
    }
    file.close();
    t.match(inspect(path).kind.toLowerCase(), new RegExp(`^${lora.algo},`));
    const [base, live, merged] = predictions(
      [path],
      { ...lora, targets },
      (layer, key) => `${kohyaModule(layer)}.${key}`,
    );
    t.ok(maxDifference(base, live) > 1e-3, 'it has learnt');
    t.ok(
      maxDifference(live, merged) < 2e-5,
      `the file merged computes what the adapters do: ${maxDifference(live, merged)}`,
    );
    const again = join(folder, `${name}.safetensors`);
    const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
    t.ok(exportLora(path, again, 'lora-kohya', pipeline) > 20, 'exported');
    t.throws(() => exportLora(path, again, 'lora-peft', pipeline), /diffusers' files hold no/);
    pipeline.release();
    const materials = await openMaterials(
      resolveRun({ ...basic(name), ...more }, 'test', 'test'),
      locate,
      silent,
    );
    const plan = planOf(materials);
    t.equal(plan.trained_parameters, plan.parameters);
    const counted = `${lora.algo}, rank ${lora.rank}.*\\): ${plan.trained_parameters} parameters\\n`;
    t.match(describe(plan).join('\n'), new RegExp(`trained +lora \\(${counted}`));
    t.equal(device.memory.storages, before, 'live tensors');
  });

test('adapters of text encoders have their own learning rate, and their names', async (t) => {
  const input: RunInput = {
    ...basic('lycoris-texts'),
    train: { target: 'lora', text_encoders: true },
    lora: { algo: 'loha', rank: 2, alpha: 2, text_encoder_targets: ['q_proj', 'fc1'] },
    ...{ steps: 1, ema: { decay: 0 }, lr_scheduler: { name: 'constant' } },
    optimizer: { lr: 1e-3, text_encoder_lr: 1e-4, weight_decay: 0 },
  };
  const path = join((await run(input)).folder, 'pytorch_lora_weights.safetensors');
  const file = openSafetensors(path);
  for (const [network, rate] of [
    ['unet', 1e-3],
    ['te1', 1e-4],
    ['te2', 1e-4],
  ] as const) {
    // Which begins at zero.
    const names = [...file.tensors.keys()].filter(
      (name) => name.startsWith(`lora_${network}_`) && name.endsWith('w2_a'),
    );
    const moved = names.flatMap((name) => [...decodeFloats(file.read(name), 'float32')].map(Math.abs));
    t.ok(Math.abs(Math.max(...moved) / rate - 1) < 1e-4, `${network}: ${Math.max(...moved)}`);
  }
  file.close();
  // A1111 does not list a file with metadata beside an SDXL model unless this begins with sdxl_.
  t.match(file.metadata, {
    ss_base_model_version: 'sdxl_base_v1-0',
    ss_network_module: 'lycoris.kohya',
    'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora',
  });
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  t.ok(mergeLora(pipeline, path) > 30, 'its names are known');
  pipeline.release();
});

test('the loss falls', async (t) => {
  const input: RunInput = {
    ...basic('lokr-falls'),
    train: { target: 'lora' },
    lora: { algo: 'lokr', rank: 4, alpha: 4, factor: 4, targets: ['to_q', 'to_v', 'ff.net.2', 'conv1'] },
    ...{ steps: 30, lr_scheduler: { name: 'constant' }, validation: { samples: 6, every_steps: 10 } },
    optimizer: { lr: 3e-3 },
  };
  await run(input);
  const measured = losses(input.output as string).flatMap(([, , validation]) => validation ?? []);
  t.ok(measured.length === 3 && measured[2] < measured[0], `${measured}`);
});

test('what does not go together is refused', (t) => {
  const refused = (lora: RunInput['lora'], message: RegExp, target: 'lora' | 'unet' = 'lora') =>
    t.throws(() => resolveRun({ train: { target }, lora }, 'test', 'test'), { name: 'UserError', message });
  refused({ factor: 4 }, /"lora\.factor" is of LoKr, and "lora\.algo" is "lora"/);
  refused(
    { algo: 'loha', decompose_both: true },
    /"lora\.decompose_both" is of LoKr, and "lora\.algo" is "loha"/,
  );
  refused({ algo: 'lokr', factor: 0 }, /"lora\.factor" is 0, by which nothing is divided; set it to -1/);
  refused(
    { algo: 'loha', network_dropout: 0.1 },
    /"lora\.network_dropout" drops what is behind the A of a LoRA/,
  );
  refused({ rescaled: true }, /"lora\.rescaled" is of OFT, and "lora\.algo" is "lora"/);
  refused({ algo: 'oft', alpha: 4 }, /"lora\.alpha" is what a difference is multiplied by, and OFT turns/);
  refused({ algo: 'oft', conv_alpha: 4 }, /"lora\.conv_alpha" is what a difference is multiplied by/);
  refused({ algo: 'oft', rank_dropout: 0.1 }, /"lora\.rank_dropout" would drop numbers of rotations/);
  refused({ algo: 'oft', factor: 4 }, /"lora\.factor" is of LoKr, and "lora\.algo" is "oft"/);
  refused({ algo: 'loha', loraplus_lr_ratio: 4 }, /"lora\.loraplus_lr_ratio" is of the B of a LoRA/);
  const prodigy = { train: { target: 'lora' }, lora: { loraplus_lr_ratio: 4 } } as const;
  t.throws(
    () => resolveRun({ ...prodigy, optimizer: { name: 'prodigy', lr: 1 } }, 'test', 'test'),
    /"lora\.loraplus_lr_ratio" is 4, and Prodigy has one learning rate/,
  );
  refused({ algo: 'lokr', network_weights: 'x' }, /"lora\.network_weights" goes on with a plain LoRA/);
  refused(
    { algo: 'loha' },
    /"lora\.algo" is of adapters, and "train\.target" is "unet"; leave it out, or set/,
    'unet',
  );
  refused(
    { algo: 'locon' } as unknown as RunInput['lora'],
    /"lora\.algo" is "locon"; it takes "lora" or "loha" or "lokr" or "oft"/,
  );
  t.end();
});
