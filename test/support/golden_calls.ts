// Whole calls of diffusers' pipelines over the tiny models, recorded as deepcache.jsonl, pag.jsonl, t2i_adapter.jsonl, inpainting.jsonl,
// instruct_pix2pix.jsonl and control_balance.jsonl have them: every fifth number of the latents. What they take beside tiny-sdxl is written
// into a folder that goes with the process.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { preprocess, preprocessControl, preprocessMask } from '../../io/image.ts';
import { type ModelSource, openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { openIPAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import { denoiseToEnd, loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { type Said, sdxl } from './command_line.ts';
import { savedLatents } from './contents.ts';
import { disc, picture, writeControlNet } from './controlnet_golden.ts';
import { allClose, goldenFolder, maxDifference } from './golden.ts';
import { writeInpainting, writeInstructPix2Pix } from './inpainting_golden.ts';
import { type Of, writeEncoder, writeIPAdapter } from './ip_adapter_golden.ts';
import { devices } from './models_golden.ts';
import { writeT2IAdapter } from './t2i_adapter_golden.ts';

type Plain = 'text2img' | 'img2img' | 'inpaint' | 'refiner' | 'controlled' | 'adapted';
/** Those whose names begin so are of an inpainting model. */
export type Kind = Plain | 'instruct_pix2pix' | 'inpainting' | 'inpainting controlled' | 'inpainting adapted';

export interface Call {
  kind: Kind;
  /** T2I-Adapters, each with a picture and a scale. */
  adapters?: readonly (readonly [name: string, of: Of, scale: number])[];
  /** `noise` is the seed of latents that are given. */
  settings: Omit<Asked, 'scheduler'> & { scheduler?: string; noise?: number };
  /** Or one for each image. */
  seed: number | number[];
  atol: number;
  values: string;
}

/** A guided call of a few steps, which is drawn from one seed. */
export const seeded = (more: Partial<Asked> = {}): Asked => ({
  ...{ prompt: 'a red fox in the snow', negative_prompt: 'rain', width: 64, height: 64 },
  ...{ num_inference_steps: 4, guidance_scale: 5, generators: [new TorchGenerator(3)] },
  ...more,
});

export const folder = mkdtempSync(join(tmpdir(), 'sdxl-calls-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
/** A file of the test's own. */
export const at = (name: string): string => join(folder, name);
const net = openComponent(writeControlNet(at('full'), 'full'));
const ipAdapter = openIPAdapter(
  writeIPAdapter(at('plain.safetensors'), 'plain'),
  writeEncoder(at('encoder')),
);

/** The inpainting model's folder. */
export const inpainting = writeInpainting(at('inpainting'));

/** InstructPix2Pix's. */
export const instructed = writeInstructPix2Pix(at('instruct_pix2pix'));

const isControlled = (kind: Kind) => kind.endsWith('controlled');
const isAdapted = (kind: Kind) => kind.endsWith('adapted');

function modelOf(kind: Kind): string {
  if (kind.startsWith('inpainting')) return inpainting;
  if (kind === 'instruct_pix2pix') return instructed;
  return join(goldenFolder, kind === 'refiner' ? 'tiny-sdxl-refiner' : 'tiny-sdxl');
}

export const pipelineOf = (
  kind: Kind,
  device: Device,
  adapter: readonly ModelSource[] = [],
  controls = 1,
): Pipeline =>
  loadPipeline(openModel(modelOf(kind)), {
    ...{ device, dtype: 'float32', adapter },
    controlnet: isControlled(kind) ? Array(controls).fill(net) : [],
    ipAdapter: isAdapted(kind) ? [ipAdapter] : [],
  });

const controlImages = [1, 3].map((seed) => preprocessControl(picture(seed, 64, 64)));
/** How many pictures ControlNets follow. */
const controlsOf = ({ control_balance: balances }: Call['settings']): number =>
  Array.isArray(balances) ? balances.length : 1;

function requestOf({ kind, adapters, settings: { scheduler, noise, ...settings }, seed }: Call): Asked {
  const masked = kind.startsWith('inpaint');
  const begins = masked || ['img2img', 'refiner', 'instruct_pix2pix'].includes(kind);
  const given = noise === undefined ? undefined : new TorchGenerator(noise).randn(4 * 8 * 8);
  return {
    ...{ width: 64, height: 64, ...settings },
    scheduler: { name: scheduler },
    image: begins ? preprocess(picture(4, 64, 64)) : undefined,
    mask: masked ? preprocessMask(disc()) : undefined,
    latents: given && { shape: [1, 4, 8, 8], data: given },
    control_image: isControlled(kind) ? controlImages.slice(0, controlsOf(settings)) : undefined,
    adapter_image: adapters?.map(([, of]) => picture(...of)),
    adapter_conditioning_scale: adapters?.map(([, , scale]) => scale),
    ip_adapter_image: isAdapted(kind) ? [picture(1, 117, 149)] : undefined,
    ip_adapter_scale: isAdapted(kind) ? 0.7 : undefined,
    generators: [seed].flat().map((each) => new TorchGenerator(each)),
  };
}

export const latentsOf = async (pipeline: Pipeline, asked: Asked): Promise<Float32Array> =>
  (await denoiseToEnd(pipeline, asked)).latents.data;

/** Tests calls, which are so many, on every device; of the reference, which is slow, the one at `slow` alone. */
export function testCalls(calls: readonly Call[], count: number, slow: number): void {
  for (const device of devices)
    test(`whole calls on ${device.name}`, { timeout: 300_000 }, async (t) => {
      const before = device.memory.storages;
      t.equal(calls.length, count);
      for (const call of device.name === 'reference' ? [calls[slow]] : calls) {
        const adapters = call.adapters?.map(([name]) => openComponent(writeT2IAdapter(at(name), name)));
        const pipeline = pipelineOf(call.kind, device, adapters, controlsOf(call.settings));
        const some = (await latentsOf(pipeline, requestOf(call))).filter((_, i) => i % 5 === 0);
        const want = decodeFloats(Buffer.from(call.values, 'base64'), 'float32');
        const { kind, settings, atol } = call;
        allClose(t, `${kind} ${JSON.stringify(settings)}`, some, want, { atol, rtol: 0 });
        pipeline.release();
      }
      t.equal(device.memory.storages, before, 'live tensors');
    });
}

/** `sdxl sample` of a small picture by the tiny model. */
export const sampleSmall = (...argv: string[]): Promise<Said> =>
  sdxl(
    ...['sample', '--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a red fox in the snow'],
    ...['--width', '64', '--height', '64', '--steps', '4', '--seed', '3', '--quiet', ...argv],
  );

/** Under these flags it draws what a program draws that asks for the same, and by `--from` the same file again. */
export const testSample = (flags: readonly string[], asked: Asked): void =>
  void test('sdxl sample', async (t) => {
    const [drawn, saved, again] = [at('drawn.png'), at('drawn.safetensors'), at('again.png')];
    const { status, err } = await sampleSmall(...flags, '--output', drawn, '--save-latents', saved);
    t.equal(status, 0, err);
    const pipeline = pipelineOf('text2img', openDevice('cpu'));
    const own = await latentsOf(pipeline, asked);
    pipeline.release();
    const latents = savedLatents(saved);
    t.equal(maxDifference(latents, own), 0, "as a program's");
    t.equal((await sdxl('sample', '--from', drawn, '--output', again, '--quiet')).status, 0);
    t.ok(readFileSync(again).equals(readFileSync(drawn)), 'the same picture and settings');
  });
