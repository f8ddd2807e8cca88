// CLIP's vision encoder and IP-Adapters through the cuda device on the virtual GPU, beside the cpu device.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { preprocessClip } from '../../io/image.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { openComponent } from '../../models/checkpoint/checkpoint.ts';
import { loadAndClose, sourceOf } from '../../models/checkpoint/weights.ts';
import { parseVisionConfig, visionEncoder } from '../../models/ip_adapter/clip_vision.ts';
import { ipAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import { toDevice } from '../../models/vae/latents.ts';
import { picture } from '../support/controlnet_golden.ts';
import { configs, encoderConfig, writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-cuda-ip-adapter-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
writeEncoder(join(folder, 'image_encoder'));

/** Keys and values for all layers. */
function made(name: string, device: Device, dtype: FloatDType): Float32Array[] {
  const path = writeIPAdapter(join(folder, `${name}.safetensors`), name);
  return noGrad(() =>
    scope(() => {
      const encoder = visionEncoder(parseVisionConfig(encoderConfig));
      openComponent(join(folder, 'image_encoder')).load('image_encoder', encoder, device, dtype);
      const adapter = ipAdapter(configs[name]);
      loadAndClose(adapter, sourceOf(path, [openSafetensors(path)]), device, dtype);
      const pixels = toDevice(preprocessClip(picture(1, 117, 149), 56), device, dtype);
      const states = encoder(pixels, name === 'plus' ? 'penultimate' : 'image_embeds');
      return adapter(states).flatMap((pair) => pair.map((t) => t.floats()));
    }),
  );
}

const length = (values: Float32Array): number => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));

test('keys and values of a plus adapter in bfloat16 on Hopper', (t) => {
  const [cpu, gpu] = [openDevice('cpu'), cudaDevice(openVirtualGpu({ capability: [9, 0], races: false }))];
  const want = made('plus', cpu, 'float32');
  // What rounding alone does on the CPU.
  const [off, rounding] = [made('plus', gpu, 'bfloat16'), made('plus', cpu, 'bfloat16')].map((got) =>
    offOf(got, want),
  );
  t.equal(off.length, 34);
  off.forEach((error, i) => {
    const bound = 1.5 * rounding[i];
    t.ok(error <= bound, `${i}: ${error.toExponential(1)}, at most ${bound.toExponential(1)}`);
  });
  t.end();
});

/** Relative to the right numbers, root mean square. */
function offOf(got: readonly Float32Array[], want: readonly Float32Array[]): number[] {
  return got.map((values, i) => length(values.map((x, at) => x - want[i][at])) / length(want[i]));
}
