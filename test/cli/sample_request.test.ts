// The flags of `sdxl sample` and the requests that they come to, by diffusers' names: each flag reaches what it names, and what
// is not given stays open for the pipeline to fill in.
import { join } from 'node:path';
import { Command } from 'commander';
import { test } from 'tap';
import { bytes } from '../../cli/option_values.ts';
import { addSampleOptions } from '../../cli/sample/flags.ts';
import {
  checkSample,
  checkScores,
  checkSizes,
  loraOf,
  type SampleOptions,
} from '../../cli/sample/options.ts';
import {
  baseRequests,
  canvasOf,
  hiresRequest,
  type Inputs,
  plannedSecond,
  refinerRequest,
} from '../../cli/sample/request.ts';
import { toGrey } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Request } from '../../models/request.ts';
import type { Latents } from '../../models/vae/latents.ts';

function optionsOf(...argv: string[]): SampleOptions {
  const command = addSampleOptions(new Command('sample').exitOverride());
  command.parse(['--prompt', 'a fox', ...argv], { from: 'user' });
  const options = command.opts<SampleOptions>();
  checkSample(options);
  return options;
}

const sizes = { ratio: 8, sampleSize: 64 } as Parameters<typeof canvasOf>[1];
const requestsOf = (options: SampleOptions, prompts: readonly string[], inputs: Inputs = {}) =>
  baseRequests(options, canvasOf(options, sizes, inputs), prompts, 5);
const base = (options: SampleOptions, inputs?: Inputs) => requestsOf(options, ['a fox'], inputs)[0];
/** Those of a request's fields that are given and no pixels. */
function given({ generators, image, mask, latents, last, ...fields }: ReturnType<typeof base>) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

const karras = {
  ...{ use_karras_sigmas: true, use_exponential_sigmas: false, use_beta_sigmas: false },
  sigma_schedule: 'karras' as const,
};

/** What a request has that nothing was said of. */
const plain = {
  prompt: ['a fox'],
  width: 64,
  height: 64,
  num_inference_steps: 50,
  guidance_scale: 5,
  guidance_rescale: 0,
  guidance_start: 0,
  guidance_stop: 1,
  num_images_per_prompt: 1,
  emphasis: 'none',
  scheduler: { name: undefined, config: {} },
  aesthetic_score: 6,
  negative_aesthetic_score: 2.5,
};

test('the requests of several prompts share their picture, and nothing that is used up', (t) => {
  const image = { width: 64, height: 40, channels: 3 as const, data: new Uint8Array(64 * 40 * 3) };
  const [first, second, ...more] = requestsOf(optionsOf(), ['a fox', 'a cat'], { image });
  t.same([first.prompt, second.prompt, more.length], [['a fox'], ['a cat'], 0]);
  t.ok(first.image && first.image === second.image, 'resized once, kept once');
  t.not(first.generators[0], second.generators[0]);
  t.same([first.last, second.last], [false, true]);
  t.end();
});

test('batches count the seed on, prompt by prompt', (t) => {
  const options = optionsOf('--batch-count', '2');
  const requests = requestsOf(options, ['a fox', 'a cat']);
  t.same(
    requests.map(({ prompt, last }) => [prompt?.[0], last]),
    [
      ['a fox', false],
      ['a fox', false],
      ['a cat', false],
      ['a cat', true],
    ],
  );
  const drawn = requests.map(({ generators: [generator] }) => generator.randn(1)[0]);
  const of = (seed: number) => new TorchGenerator(seed).randn(1)[0];
  t.same(drawn, [5, 6, 5, 6].map(of));
  t.end();
});

test('each flag reaches what it names', (t) => {
  t.same(given(base(optionsOf())), plain);
  const cases: [argv: string, fields: object][] = [
    ['--prompt-2 two', { prompt_2: ['two'] }],
    ['--negative-prompt no', { negative_prompt: ['no'] }],
    ['--negative-prompt=', { negative_prompt: [''] }],
    ['--negative-prompt-2 nor', { negative_prompt_2: ['nor'] }],
    ['--prompt-2= --negative-prompt-2=', {}],
    ['--clip-skip 1', { clip_skip: 1 }],
    ['--emphasis no-norm', { emphasis: 'no-norm' }],
    ['--width 128 --height 40', { width: 128, height: 40 }],
    ['--num-images 3', { num_images_per_prompt: 3 }],
    ['--vae-tiling', { vae_tiling: true }],
    ['--steps 7', { num_inference_steps: 7 }],
    ['--timesteps 999,500,1', { timesteps: [999, 500, 1], num_inference_steps: 3 }],
    ['--sigmas 14.6,3,0', { sigmas: [14.6, 3, 0], num_inference_steps: 2 }],
    ['--guidance-scale 1.5', { guidance_scale: 1.5 }],
    ['--guidance-rescale 0.7', { guidance_rescale: 0.7 }],
    ['--apg --apg-eta 0.5', { adaptive_projected_guidance: { momentum: -0.5, rescale: 15, eta: 0.5 } }],
    ['--guidance-start 0.2 --guidance-stop 0.8', { guidance_start: 0.2, guidance_stop: 0.8 }],
    ['--eta 0.25', { eta: 0.25 }],
    ['--eta-ancestral 0.5', { eta_ancestral: 0.5 }],
    [
      '--scheduler euler --karras --timestep-spacing trailing',
      { scheduler: { name: 'euler', config: { ...karras, timestep_spacing: 'trailing' } } },
    ],
    ['--original-size 1024x768', { original_size: [768, 1024] }],
    ['--crops-coords-top-left 3,4', { crops_coords_top_left: [3, 4] }],
    ['--target-size 512x256', { target_size: [256, 512] }],
    ['--negative-original-size 32x16', { negative_original_size: [16, 32] }],
    ['--negative-crops-coords-top-left 5,6', { negative_crops_coords_top_left: [5, 6] }],
    ['--negative-target-size 8X16', { negative_target_size: [16, 8] }],
    [
      '--aesthetic-score 7 --negative-aesthetic-score -1',
      { aesthetic_score: 7, negative_aesthetic_score: -1 },
    ],
    ['--denoising-end 0.8', { denoising_end: 0.8 }],
    ['--image x.png --denoising-start 0.4', { denoising_start: 0.4 }],
    ['--image x.png --strength 0.6', { strength: 0.6 }],
    ['--refiner r --denoising-start 0.6', { denoising_end: 0.6 }],
    [
      '--controlnet c:0.5 --control-image x.png --control-guidance-end 0.5 --guess-mode',
      {
        ...{ control_image: [], controlnet_conditioning_scale: [0.5] },
        ...{ control_guidance_end: 0.5, guess_mode: true },
      },
    ],
    [
      '--controlnet c --controlnet a:b:-1 --control-image x --control-image y --control-guidance-start 0.1 --control-guidance-start 0',
      {
        ...{ control_image: [], controlnet_conditioning_scale: [undefined, -1] },
        control_guidance_start: [0.1, 0],
      },
    ],
    ['--refiner r --denoising-end 0.7 --denoising-start 0.6', { denoising_end: 0.7 }],
  ];
  for (const [argv, fields] of cases)
    t.same(given(base(optionsOf(...argv.split(' ')))), { ...plain, ...fields }, argv);
  t.end();
});

test('a picture has its own size, cut to whole latents', (t) => {
  const image = { width: 50, height: 33, channels: 3, data: new Uint8Array(3 * 50 * 33).fill(255) } as const;
  const sides = (...argv: string[]) => {
    const { width, height, ...request } = base(optionsOf('--image', 'x.png', ...argv), { image });
    t.same(request.image?.shape, [1, 3, height, width]);
    return [width, height];
  };
  t.same(sides(), [48, 32]);
  t.same(sides('--width', '24'), [24, 32], 'where none is given');
  t.end();
});

test('the refiner goes on, or begins over the finished picture', (t) => {
  const latents = {} as Latents;
  const refined = (...argv: string[]) => {
    const options = optionsOf('--refiner', 'r', ...argv);
    const request = refinerRequest(options, base(options), latents);
    t.same([request.image, request.latents], [latents, undefined], 'as diffusers hands them over');
    const { guidance_scale, strength, denoising_start, denoising_end } = request;
    return [guidance_scale, strength, denoising_start, denoising_end];
  };
  t.same(refined(), [5, undefined, undefined, undefined]);
  t.same(refined('--strength', '0.2', '--guidance-scale', '7'), [7, 0.2, undefined, undefined]);
  t.same(refined('--denoising-end', '0.8'), [5, undefined, 0.8, undefined], 'where the base stopped');
  t.same(refined('--denoising-end', '0.8', '--denoising-start', '0.7'), [5, undefined, 0.7, undefined]);
  t.same(refined('--refiner-guidance-scale', '2'), [2, undefined, undefined, undefined]);
  t.same(
    refined('--image', 'x.png', '--strength', '0.9'),
    [5, 0.3, undefined, undefined],
    "with a picture the strength is the base's",
  );
  const projected = (...argv: string[]) => {
    const options = optionsOf('--apg', ...argv);
    const [first, larger] = [base(options), { width: 64, height: 64 }];
    const second = argv.includes('--hires')
      ? plannedSecond(options, first, larger)
      : refinerRequest(options, first, latents);
    return second.adaptive_projected_guidance === first.adaptive_projected_guidance;
  };
  t.same([projected('--refiner', 'r'), projected('--hires')], [true, true], "the base's projection, too");
  const unguided = [
    ['--refiner', 'r', '--refiner-guidance-scale', '1'],
    ['--hires', '--hires-guidance-scale', '1'],
  ];
  t.same(
    unguided.map((argv) => projected(...argv)),
    [false, false],
    'where there is guidance',
  );
  const kept = (...argv: string[]) => {
    const [image, mask] = [{}, {}] as Latents[];
    const options = optionsOf('--refiner', 'r', '--image', 'x.png', ...argv);
    const request = refinerRequest(options, { ...base(options), image, mask }, latents);
    return [request.image === image, request.latents === latents, request.mask === mask];
  };
  t.same(kept('--denoising-end', '0.8'), [true, true, true], 'the picture stays what the mask keeps');
  t.same(kept(), [false, false, true], 'a finished picture has what was kept');
  t.end();
});

test('masks of IP-Adapters are as large as what each pass draws, and cut as it is', (t) => {
  const argv = ['--ip-adapter', 'a.safetensors:up.block_0=0,1,0:mid=1', '--ip-adapter-image', 'a.png'];
  const options = optionsOf(...argv, '--ip-adapter-mask', 'm.png', '--hires');
  const pixels = (light: (x: number, y: number) => boolean): Picture => {
    const data = Uint8Array.from({ length: 64 * 64 * 3 }, (_, i) => {
      const at = Math.floor(i / 3);
      return light(at % 64, Math.floor(at / 64)) ? 255 : 0;
    });
    return { width: 64, height: 64, channels: 3, data };
  };
  const left = pixels((x) => x < 32);
  const inputs: Inputs = { ipAdapterImages: [left], ipAdapterMasks: [left] };
  const masksOf = ({ ip_adapter_masks = [] }: Request) => ip_adapter_masks.flat() as Latents[];
  const first = base({ ...options, width: 48, height: 32 }, inputs);
  t.same(first.ip_adapter_scale, [{ up: { block_0: [0, 1, 0] }, mid: 1 }]);
  t.same(
    masksOf(first).map(({ shape }) => shape),
    [[1, 1, 32, 48]],
  );
  const latents = { shape: [1, 4, 4, 6], data: new Float32Array(96) };
  const larger = { width: 96, height: 64, uncut: { width: 96, height: 64 } };
  const second = hiresRequest({ options, larger, inputs, seed: 5 }, [first], 0, () => latents);
  t.same(
    masksOf(second).map(({ shape }) => shape),
    [[1, 1, 64, 96]],
  );
  t.equal(refinerRequest(options, first, latents).ip_adapter_masks, undefined);
  // Of the left half alone its mask is white.
  const corner = toGrey(pixels((x, y) => x < 16 && y < 16));
  const part = base({ ...options, paddingMaskCrop: 0 }, { ...inputs, image: left, mask: corner });
  const [{ data }] = masksOf(part);
  t.ok(data.length === 64 * 64 && data.every((x) => x === 1));
  t.ok(masksOf(base(options, inputs))[0].data.some((x) => x === 0));
  t.end();
});

test('what is told of, and counts for nothing', (t) => {
  const scores = (argv: string, taken = false) => checkScores(optionsOf(...argv.split(' ')), taken);
  for (const flag of ['--aesthetic-score', '--negative-aesthetic-score']) {
    const message = `${flag} is told to a refiner, and there is none: give --refiner, or leave it out`;
    t.throws(() => scores(`${flag} 7`), { name: 'UserError', message });
    scores(`${flag} 7 --refiner r`);
    scores(`${flag} 7`, true);
  }
  scores('--aesthetic-score 6 --negative-aesthetic-score 2.5');
  const said = (argv: string) => checkSizes(optionsOf(...argv.split(' '))).length;
  for (const alone of ['original-size 8x8', 'target-size 8x8', 'crops-coords-top-left 1,2']) {
    t.equal(said(`--negative-${alone}`), 1, alone);
    t.equal(said(`--negative-${alone} --image x.png`), 0, 'over a picture each counts');
  }
  t.equal(said('--negative-original-size 8x8 --negative-target-size 8x8'), 0);
  t.equal(said('--original-size 8x8'), 0);
  t.end();
});

test('types by their names', (t) => {
  const types = (...argv: string[]) => {
    const { dtype, vaeDtype } = optionsOf(...argv);
    return [dtype, vaeDtype];
  };
  t.same(types(), ['auto', 'auto']);
  for (const name of ['auto', 'float32', 'bfloat16', 'float16'])
    t.same(types('--dtype', name, '--vae-dtype', name), [name, name]);
  t.end();
});

test('values are bounded as they are read', (t) => {
  for (const [argv, says] of [
    ['--steps 0', /--steps takes a whole number from 1 to 1000, not "0"/],
    ['--steps 1001', /--steps takes/],
    ['--steps 2.5', /--steps takes a whole number/],
    ['--steps=', /--steps takes .* not ""/],
    ['--guidance-scale -1', /--guidance-scale takes a number from 0, not "-1"/],
    ['--guidance-scale x', /--guidance-scale takes/],
    ['--aesthetic-score Infinity', /--aesthetic-score takes a number, not/],
    ['--eta 1.01', /--eta takes a number from 0 to 1/],
    ['--seed -2', /--seed takes a whole number from -1/],
    ['--seed 9007199254740990 --batch-count 3', /--seed 9007199254740990 has no 2 seeds after it/],
    ['--timesteps 1,x', /--timesteps takes a number, not "x"/],
    ['--timesteps 999,500 --sigmas 14,0', /--timesteps and --sigmas both lay out the steps/],
    ['--scheduler karras', /"karras", but a layout of noise levels; put it .* as in dpm\+\+2m_karras/],
    ['--num-images 65', /--num-images takes a whole number from 1 to 64/],
    ['--clip-skip -1', /--clip-skip takes a whole number from 0,/],
    ['--width 0', /--width takes a whole number from 8/],
    ['--height 20', /--height 20 is not divisible by 8; 16 or 24 is/],
    ['--target-size 10', /--target-size takes WIDTHxHEIGHT such as 1024x768, not "10"/],
    ['--crops-coords-top-left 1', /--crops-coords-top-left takes TOP,LEFT such as 0,0, not "1"/],
    ['--dtype float23', /--dtype takes .*not "float23".*did you mean "float32"/],
    ['--dtype fp16', /--dtype takes .*not "fp16"; did you mean "float16"\?/],
    ['--vae-dtype bf16', /; did you mean "bfloat16"\?/],
    ['--timestep-spacing even', /--timestep-spacing takes leading, trailing, linspace, not "even"/],
    ['--strength 0.5', /--strength needs --image or --refiner/],
    ['--denoising-start 0.5', /--denoising-start needs --refiner or --image/],
    ['--refiner-guidance-scale 2', /--refiner-guidance-scale needs --refiner/],
    [
      '--refiner r --strength 0.5 --denoising-end 0.8',
      /^--strength and --denoising-end both say where the refiner begins; give one/,
    ],
    ['--refiner r --strength 0.5 --denoising-start 0.8', /^--strength and --denoising-start both say/],
    ['--denoising-end 0', /--denoising-end 0 leaves nothing to do/],
    ['--denoising-start 0 --refiner r', /--denoising-start 0 leaves the base nothing to do/],
    ['--mask m.png', /--mask needs --image/],
    ['--padding-mask-crop 8', /--padding-mask-crop needs --mask/],
    ['--lora absent.safetensors', /no LoRA at absent\.safetensors; give a/],
    ['--scheduler lms --karras --output x.jpg', /ends in \.png/],
    ['--scheduler euler_beta --karras', /--karras and --scheduler euler_beta lay out the noise levels/],
    ['--scheduler euler_a_ays --karras', /--karras and --scheduler euler_a_ays lay out the noise levels/],
    ['--scheduler ddim_ays', /"ddim_ays": DDIMScheduler goes by timesteps and has no noise levels/],
    ['--scheduler ddpm --karras', /--karras: DDPMScheduler has no Karras sigmas/],
  ] as const)
    t.throws(() => optionsOf(...argv.split(' ')), { name: 'UserError', message: says }, argv);
  t.end();
});

test('adapters with their scales, and sizes of files', (t) => {
  for (const [text, file, scale] of [
    ['a.safetensors', 'a.safetensors', 1],
    ['a.safetensors:0.8', 'a.safetensors', 0.8],
    ['a:b:-1', 'a:b', -1],
    ['a.safetensors:+0.5', 'a.safetensors', 0.5],
    ['a.safetensors:1e-3', 'a.safetensors', 0.001],
    ['a.safetensors:e1', 'a.safetensors:e1', 1],
    ['C:\\a', 'C:\\a', 1],
  ] as const)
    t.same(loraOf(text), { file, scale }, text);
  const there = join(t.testdir({ 'v1:2': {} }), 'v1:2');
  t.same(loraOf(there), { file: there, scale: 1 }, 'a folder of that name');
  t.same(loraOf(`${there}:0.5`), { file: there, scale: 0.5 });
  const size = bytes('--size');
  for (const [text, want] of [
    ['10', 10],
    ['10GB', 1e10],
    ['1.5kb', 1500],
    ['1.2345KB', 1234],
    ['2 MiB', 2 * 1024 ** 2],
    ['1T', 1e12],
  ] as const)
    t.equal(size(text), want, text);
  for (const text of ['0', '0GB', 'GB', '-1GB', '1 PB'])
    t.throws(() => size(text), { name: 'UserError', message: /--size takes a size such as 10GB/ }, text);
  t.end();
});
