// `sdxl export --lora`: weights with adapters merged in, held against mergeLora's of a loaded pipeline (which test/models/models_lora.test.ts
// holds to diffusers), as a folder and as a single file; and mistakes.
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { joined } from '../../models/vae/latents.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLora, maxDifference } from '../support/golden.ts';
import { writeAdapter } from '../support/tiny_adapter.ts';

const model = join(goldenFolder, 'tiny-sdxl');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-merged-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const device = openDevice('cpu');

/** Every weight of a pipeline in float32, end to end. */
function weightsOf(source: ModelSource, merge: readonly [path: string, scale: number][] = []): Float32Array {
  const pipeline = loadPipeline(source, { device, dtype: 'float32' });
  for (const [path, scale] of merge) mergeLora(pipeline, path, scale);
  const modules: AnyModule[] = [
    pipeline.unet,
    ...pipeline.text.encoders.map(({ encoder }) => encoder),
    pipeline.vae.module,
  ];
  const all = joined(
    modules.flatMap((each) => [...namedParameters(each).values()].map((p) => p.tensor.floats())),
  );
  pipeline.release();
  return all;
}

test('the weights of a pipeline with the same adapters', async (t) => {
  const mine = writeAdapter(at('mine.safetensors'));
  const style = goldenLora('lora/scaled_kohya.safetensors');
  const lora = ['--lora', `${mine}:0.5`, '--lora', `${style}:-0.7`, '--dtype', 'float32', '--quiet'];
  const want = weightsOf(openModel(model), [
    [mine, 0.5],
    [style, -0.7],
  ]);
  const plain = weightsOf(openModel(model));
  t.ok(maxDifference(plain, want) > 0.1, 'which differ from the model');
  t.match(await sdxl('export', model, at('fused'), ...lora), { status: 0 });
  t.equal(maxDifference(weightsOf(openModel(at('fused'))), want), 0, 'a folder');
  const single = at('fused.safetensors');
  t.match(await sdxl('export', model, single, '--format', 'single-file', ...lora), { status: 0 });
  const file = openSingleFile(single, { configs: openModel(model) });
  t.equal(maxDifference(weightsOf(file), want), 0, 'a single file');
  const again = ['--lora', `${mine}:-0.5`, '--lora', `${style}:0.7`, '--dtype', 'float32', '--quiet'];
  t.match(await sdxl('export', single, at('back'), '--configs', model, ...again), { status: 0 });
  t.ok(maxDifference(weightsOf(openModel(at('back'))), plain) < 1e-6, 'and out again, from the file');
});

test('a weight keeps its type where none is asked for', async (t) => {
  const mine = writeAdapter(at('small.safetensors'), { size: 0.01 });
  t.match(await sdxl('export', model, at('half'), '--lora', mine, '--quiet'), { status: 0 });
  const [before, after] = [openModel(model), openModel(at('half'))].map((source) => {
    const weights = source.weights('unet');
    const types = weights.names.map((name) => `${name} ${weights.info(name)?.dtype}`).sort();
    weights.close();
    return types;
  });
  t.same(after, before);
});

test('mistakes', async (t) => {
  const foreign = at('foreign.safetensors');
  const bytes = encodeNumbers(new Float32Array(8), 'float32');
  writeSafetensors(
    foreign,
    ['down', 'up'].map((part) => ({
      ...{ name: `lora_unet_nowhere.lora_${part}.weight`, dtype: 'float32' as const },
      ...{ shape: [2, 4], bytes },
    })),
  );
  const large = writeAdapter(at('large.safetensors'), { size: 1e4 });
  const out = at('none');
  const call = (...argv: string[]) => sdxl('export', model, out, '--quiet', ...argv);
  await refusesEach(t, call, [
    [['--lora', foreign], /2 of its names match no weight of this model: lora_unet_nowhere/],
    [['--lora', at('nothing')], /no LoRA at/],
    [['--lora', large, '--dtype', 'float16'], /holds -?\d.*, more than float16 can; export it as bfloat16/],
    [
      ['--lora', large, '--save-keys', 'vae,tokenizer'],
      /--lora changes nothing of what --save-keys names \(vae, tokenizer\); leave it out/,
    ],
    [['--unet', model, '--save-keys', 'text_encoder'], /--unet changes nothing of what --save-keys names/],
    [
      ['--lora', large, '--format', 'lora-kohya'],
      /--lora is merged into a model, and without --base a LoRA is exported as it is/,
    ],
  ]);
  t.notOk(existsSync(out), 'nothing is written');
  const parts = ['--lora', large, '--save-keys', 'unet,vae', '--dtype', 'float32'];
  t.match(await call(...parts), { status: 0 }, 'where it changes one of them, it may be asked for');
});
