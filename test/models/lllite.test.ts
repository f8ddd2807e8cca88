// ControlNet-LLLites against kohya's modules in diffusers' pipelines (golden/lllite.jsonl): whole calls, alone and with all else that draws;
// kohya's keys; and what is refused.
import { readFileSync } from 'node:fs';
import { test } from 'tap';
import { namedParameters } from '../../engine/module.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { preprocess, preprocessControl, writePng } from '../../io/image.ts';
import { openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { lllite, llliteConfig, openLLLite } from '../../models/control/lllite.ts';
import { inspect } from '../../models/inspect.ts';
import { locateControlNet } from '../../models/locate/locate.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { picture, writeControlNet } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { at, latentsOf, sampleSmall } from '../support/golden_calls.ts';
import type { Of } from '../support/ip_adapter_golden.ts';
import { llliteKeys, writeLLLite } from '../support/lllite_golden.ts';
import { devices } from '../support/models_golden.ts';

interface Call {
  kind: 'text2img' | 'controlled' | 'img2img' | 'perturbed';
  nets: readonly (readonly [name: string, of: Of, scale: number, start: number, end: number])[];
  settings: Omit<Asked, 'scheduler'> & { scheduler?: string; controlnet_conditioning_scale?: number };
  seed: number;
  atol: number;
  values: string;
}
const calls = goldenLines<Call>('lllite').filter(({ kind }) => kind !== undefined);
const files = Object.fromEntries(
  Object.keys(llliteKeys).map((name) => [name, writeLLLite(at(`${name}.safetensors`), name)]),
);
const full = openComponent(writeControlNet(at('full'), 'full'));
const model = openModel(`${goldenFolder}/tiny-sdxl`);

function requestOf({ kind, nets, settings, seed }: Call): Asked {
  const { scheduler, controlnet_conditioning_scale: ofFull = 1, ...more } = settings;
  const { width = 64, height = 64 } = more;
  const others = kind === 'controlled' ? [['', [1, 64, 64] as Of, ofFull, 0, 1] as const] : [];
  const all = [...others, ...nets];
  return {
    ...more,
    scheduler: { name: scheduler },
    image: kind === 'img2img' ? preprocess(picture(4, 64, 64)) : undefined,
    control_image: all.map(([, of]) => preprocessControl(picture(...of), width, height)),
    controlnet_conditioning_scale: all.map(([, , scale]) => scale),
    control_guidance_start: all.map(([, , , start]) => start),
    control_guidance_end: all.map(([, , , , end]) => end),
    generators: [new TorchGenerator(seed)],
  };
}

for (const device of devices)
  test(`whole calls on ${device.name}`, { timeout: 300_000 }, async (t) => {
    const before = device.memory.storages;
    t.equal(calls.length, 8);
    for (const call of device.name === 'reference' ? [calls[1]] : calls) {
      const { kind, nets, settings, atol } = call;
      const controlnet = [
        ...(kind === 'controlled' ? [full] : []),
        ...nets.map(([name]) => openLLLite(files[name])),
      ];
      const pipeline = loadPipeline(model, { device, dtype: 'float32', controlnet });
      const some = (await latentsOf(pipeline, requestOf(call))).filter((_, i) => i % 5 === 0);
      const want = decodeFloats(Buffer.from(call.values, 'base64'), 'float32');
      allClose(t, `${kind} ${JSON.stringify([nets, settings])}`, some, want, { atol, rtol: 0 });
      pipeline.release();
    }
    t.equal(device.memory.storages, before, 'live tensors');
  });

test("kohya's keys, and what a file is told to be", async (t) => {
  for (const [name, keys] of Object.entries(llliteKeys)) {
    const own = namedParameters(lllite(llliteConfig(await locateControlNet(files[name]))));
    t.same(Object.fromEntries([...own].map(([key, { shape }]) => [key, shape])), keys);
    const { kind, problems } = inspect(files[name]);
    t.same([kind, problems], ['ControlNet-LLLite', []]);
  }
});

test('sdxl sample, and what is refused', async (t) => {
  const [edges, drawn, again] = [at('edges.png'), at('drawn.png'), at('again.png')];
  writePng(edges, picture(1, 64, 64));
  const flags = (file: string) => ['--controlnet', `${file}:0.7`, '--control-image', edges];
  const { status, err } = await sampleSmall(...flags(files.edges), '--output', drawn);
  t.equal(status, 0, err);
  t.equal((await sampleSmall('--output', again)).status, 0);
  t.notOk(readFileSync(again).equals(readFileSync(drawn)), 'it is followed');
  const keys = Object.entries(llliteKeys.edges);
  const wide = Object.fromEntries(
    keys.map(([key, shape]) => [
      key,
      /\.(down|up)\.0\./.test(key) ? shape.map((side) => (side > 20 ? 40 : side)) : shape,
    ]),
  );
  const other = Object.fromEntries(
    keys.map(([key, shape]) => [key.replace('attn1_to_q', 'ff_net_2'), shape]),
  );
  for (const [argv, want] of [
    [[...flags(files.edges), '--width', '48'], /squares of 32x32 pixels, into which 48x64 does not divide/],
    [[...flags(files.edges), '--guess-mode'], /guess_mode .+ leave them out/],
    [[...flags(files.edges), '--control-balance', 'more_prompt'], /control_balance .+ leave them out/],
    [[...flags(files.edges), '--control-mode', 'depth'], /control_mode is 1 for a ControlNet of one kind/],
    [
      flags(writeLLLite(at('wide.safetensors'), 'edges', wide)),
      /40 features of squares of 16 pixels, and the UNet 24 of 16/,
    ],
    [
      flags(writeLLLite(at('other.safetensors'), 'edges', other)),
      /has lllite_unet_.+ff_net_2, and a ControlNet-LLLite/,
    ],
  ] as const) {
    const { status, err } = await sampleSmall(...argv, '--output', drawn);
    t.equal(status, 2, err);
    t.match(err, want);
  }
});
