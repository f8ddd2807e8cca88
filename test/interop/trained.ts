// What `sdxl train` makes of the tiny model in a few updates, as calls for both programs: diffusers must load it, and draw with it to the
// same latents.
import { cpSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { packageRoot } from '../../io/package_root.ts';
import type { RunInput } from '../../train/run/run.ts';
import { argvOf, type Call } from './call.ts';
import { base, type Pictures } from './calls.ts';
import type { Job } from './run.ts';

const pictures = join(packageRoot, 'test', 'golden', 'png');
const small = { width: 64, height: 64, num_inference_steps: 4, guidance_scale: 5 };

interface Made {
  run: Omit<RunInput, 'dataset'> & { dataset?: RunInput['dataset'] };
  /** The call for what lies in the run's `final`. */
  call(final: string): Omit<Partial<Job>, 'settings'> & { settings?: Call['settings'] };
}

const token = '<stripes>';

/** `encoder` is a vision encoder's folder. */
const makes = ({ odd, oddMask }: Pictures, encoder: string): Record<string, Made> => ({
  'a textual inversion': {
    run: {
      train: { target: 'textual_inversion' },
      dataset: { instance_prompt: '' },
      textual_inversion: {
        ...{
          placeholder_token: token,
          initializer_token: 'red',
          num_vectors: 2,
          learnable_property: 'style',
        },
      },
    },
    call: (final) => {
      const settings = { prompt: `a fox in ${token}` };
      const plain: Call = {
        label: '',
        pipeline: 'text2img',
        model: base,
        seed: 13,
        settings: { ...small, ...settings },
      };
      const ours = [...argvOf(plain), '--textual-inversion', final];
      return { settings, inversion: [join(final, `${token}.safetensors`), token], ours };
    },
  },
  'a T2I-Adapter': {
    run: { train: { target: 't2i_adapter' } },
    call: (final) => ({ t2iAdapters: [[final, odd, 0.8]] }),
  },
  'an IP-Adapter': {
    run: { train: { target: 'ip_adapter' }, ip_adapter: { image_encoder_path: encoder } },
    call: (final) => ({ ipAdapters: [[join(final, 'ip_adapter.safetensors'), odd, 0.8]] }),
  },
  'an LCM-LoRA': {
    run: { train: { target: 'lora', method: 'lcm' } },
    call: (final) => ({
      ...{
        loras: [[join(final, 'pytorch_lora_weights.safetensors'), 1]],
        scheduler: { class: 'LCMScheduler' },
      },
      settings: { guidance_scale: 1 },
    }),
  },
  'a UNet distilled whole, which is told the guidance': {
    run: { train: { target: 'unet', method: 'lcm' } },
    call: (final) => ({ model: final, scheduler: { class: 'LCMScheduler' } }),
  },
  'an inpainting model': {
    run: { inpainting: { mask_mode: 'random_mask' } },
    call: (final) => ({
      ...{ model: final, pipeline: 'inpaint', settings: { image: odd, mask_image: oddMask, strength: 0.9 } },
    }),
  },
  'an InstructPix2Pix model': {
    run: { dataset: { original_image_column: 'original_image' } },
    call: (final) => ({
      ...{ model: final, pipeline: 'edit', settings: { image: odd, image_guidance_scale: 1.7 } },
    }),
  },
});

/** Trains them, and gives the calls. */
export async function trained(
  sdxl: (...argv: string[]) => Promise<void>,
  folder: string,
  given: Pictures,
  encoder: string,
): Promise<Job[]> {
  const place = join(folder, 'pictures');
  cpSync(pictures, place, { recursive: true });
  for (const beside of ['conditioning_image', 'original_image'])
    cpSync(join(pictures, 'input.png'), join(place, `input.${beside}.png`));
  const jobs: Job[] = [];
  for (const [i, [label, { run, call }]] of Object.entries(makes(given, encoder)).entries()) {
    const output = join(folder, 'runs', String(i));
    mkdirSync(output, { recursive: true });
    const file = join(output, 'run.ts');
    const dataset = {
      path: place,
      resolution: 32,
      instance_prompt: 'a picture',
      broken: 'skip',
      ...run.dataset,
    };
    const whole = {
      output: join(output, 'made'),
      model: base,
      steps: 3,
      optimizer: { lr: 0.01 },
      ...run,
      dataset,
    };
    writeFileSync(file, `export default ${JSON.stringify(whole)};`);
    await sdxl('train', file);
    const { settings, ...own } = call(join(whole.output, 'final'));
    const common: Call = {
      label: `trained: ${label}`,
      pipeline: 'text2img',
      model: base,
      seed: 13 + i,
      settings: {},
    };
    jobs.push({ ...common, ...own, settings: { prompt: 'a red fox', ...small, ...settings } });
  }
  return jobs;
}
