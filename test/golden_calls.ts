// Whole calls of diffusers' pipelines over the tiny models, recorded as deepcache.jsonl and pag.jsonl have them: every fifth number of the
// latents. The ControlNet and IP-Adapter that they take are written into a folder that goes with the process.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../engine/device.ts';
import { decodeFloats } from '../io/dtype.ts';
import { preprocess, preprocessControl, preprocessMask } from '../io/image.ts';
import { openComponent, openModel } from '../models/checkpoint.ts';
import { openIPAdapter } from '../models/ip_adapter.ts';
import { denoiseToEnd, loadPipeline, type Pipeline } from '../models/pipeline.ts';
import type { Asked } from '../models/request.ts';
import { TorchGenerator } from '../models/torch_random.ts';
import { disc, picture, writeControlNet } from './controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines } from './golden.ts';
import { writeEncoder, writeIPAdapter } from './ip_adapter_golden.ts';
import { devices } from './models_golden.ts';

export type Kind = 'text2img' | 'img2img' | 'inpaint' | 'refiner' | 'controlled' | 'adapted';

interface Call {
  kind: Kind;
  settings: Omit<Asked, 'scheduler'> & { scheduler?: string };
  seed: number;
  atol: number;
  values: string;
}

const folder = mkdtempSync(join(tmpdir(), 'sdxl-calls-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
/** A file of the test's own. */
export const at = (name: string): string => join(folder, name);
const net = openComponent(writeControlNet(at('full'), 'full'));
const adapter = openIPAdapter(writeIPAdapter(at('plain.safetensors'), 'plain'), writeEncoder(at('encoder')));

export const pipelineOf = (kind: Kind, device: Device): Pipeline =>
  loadPipeline(openModel(join(goldenFolder, kind === 'refiner' ? 'tiny-sdxl-refiner' : 'tiny-sdxl')), {
    ...{ device, dtype: 'float32' },
    controlnet: kind === 'controlled' ? [net] : [],
    ipAdapter: kind === 'adapted' ? [adapter] : [],
  });

function requestOf({ kind, settings: { scheduler, ...settings }, seed }: Call): Asked {
  const begins = ['img2img', 'inpaint', 'refiner'].includes(kind);
  return {
    ...{ width: 64, height: 64, ...settings },
    scheduler: { name: scheduler },
    image: begins ? preprocess(picture(4, 64, 64)) : undefined,
    mask: kind === 'inpaint' ? preprocessMask(disc()) : undefined,
    control_image: kind === 'controlled' ? [preprocessControl(picture(1, 64, 64))] : undefined,
    ip_adapter_image: kind === 'adapted' ? [picture(1, 117, 149)] : undefined,
    ip_adapter_scale: kind === 'adapted' ? 0.7 : undefined,
    generators: [new TorchGenerator(seed)],
  };
}

export const latentsOf = async (pipeline: Pipeline, asked: Asked): Promise<Float32Array> =>
  (await denoiseToEnd(pipeline, asked)).latents.data;

/** Tests the calls of a golden file, which are so many, on every device; of the reference, which is slow, the one at `slow` alone. */
export function testCalls(name: string, count: number, slow: number): void {
  const calls = goldenLines<Call>(name);
  for (const device of devices)
    test(`whole calls on ${device.name}`, { timeout: 300_000 }, async (t) => {
      const before = device.memory.storages;
      t.equal(calls.length, count);
      for (const call of device.name === 'reference' ? [calls[slow]] : calls) {
        const pipeline = pipelineOf(call.kind, device);
        const some = (await latentsOf(pipeline, requestOf(call))).filter((_, i) => i % 5 === 0);
        const want = decodeFloats(Buffer.from(call.values, 'base64'), 'float32');
        const { kind, settings, atol } = call;
        allClose(t, `${kind} ${JSON.stringify(settings)}`, some, want, { atol, rtol: 0 });
        pipeline.release();
      }
      t.equal(device.memory.storages, before, 'live tensors');
    });
}
