// A1111's `parameters` text, read as its own program and others write it, and written as they read it.
import { test } from 'tap';
import { readParameters } from '../../cli/sample/a1111_read.ts';
import { writeParameters } from '../../cli/sample/a1111_write.ts';
import type { SampleOptions } from '../../cli/sample/options.ts';
import { labelledParameters } from '../../cli/serve/a1111_infotext.ts';
import { complete } from '../../models/request.ts';
import { sigmaSchedules } from '../../models/samplers/config.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';

const read = (fields: string) => readParameters(`a fox\n${fields}`).settings;

test('samplers with their schedule types', (t) => {
  for (const [fields, scheduler, timestepSpacing] of [
    ['Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 1', 'DPM++ 2M Karras', 'linspace'],
    ['Steps: 20, Sampler: DPM++ 2M Karras, Seed: 1', 'DPM++ 2M Karras', 'linspace'], // before 1.9
    ['Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Exponential', 'DPM++ 2M SDE Exponential', 'linspace'],
    ['Steps: 20, Sampler: Euler, Schedule type: Beta', 'Euler Beta', 'linspace'],
    ['Steps: 20, Sampler: Euler, Schedule type: Automatic', 'Euler Uniform', 'linspace'],
    ['Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Automatic', 'DPM++ 2M SDE Exponential', 'linspace'],
    ['Steps: 20, Sampler: DPM++ 3M SDE, Schedule type: Automatic', 'DPM++ 3M SDE Exponential', 'linspace'],
    ['Steps: 20, Sampler: DPM++ 2S a Karras, Version: v1.6.0', 'DPM++ 2S a Karras', 'linspace'],
    ['Steps: 20, Sampler: dpm++2s_a karras, Version: stable-diffusion.cpp', 'dpm++2s_a karras', 'linspace'],
    ['Steps: 20, Sampler: DPM++ 2M', 'DPM++ 2M Uniform', 'linspace'],
    ['Steps: 20, Sampler: Euler a, Schedule type: SGM Uniform', 'Euler a SGM Uniform', 'linspace'],
    ['Steps: 20, Sampler: Euler a, Schedule type: Karras', 'Euler a Karras', 'linspace'],
    ['Steps: 20, Sampler: UniPC, Schedule type: Karras, Version: v1.10.1', 'UniPC', undefined], // which does not heed it
    ['Steps: 20, Sampler: DDIM, Schedule type: Automatic', 'DDIM', undefined],
    ['Steps: 20, Sampler: euler_a, Version: stable-diffusion.cpp', 'euler_a Uniform', 'linspace'],
    ['Steps: 20, Sampler: euler_a discrete, Version: stable-diffusion.cpp', 'euler_a normal', 'linspace'],
    [
      'Steps: 20, Sampler: dpm++2m sgm_uniform, Version: stable-diffusion.cpp',
      'dpm++2m sgm_uniform',
      'linspace',
    ],
    ['Steps: 20, Sampler: dpm++2m gits, Version: stable-diffusion.cpp', 'dpm++2m gits', 'linspace'],
    [
      'Steps: 20, Sampler: heun kl_optimal, Version: stable-diffusion.cpp',
      'heun kl_optimal_zero',
      'linspace',
    ],
    ['Steps: 20, Sampler: euler beta, Version: stable-diffusion.cpp', 'euler beta_timesteps', 'linspace'],
    ['Steps: 20, Sampler: dpm++2m karras, Version: stable-diffusion.cpp', 'dpm++2m karras', 'linspace'],
    ['Steps: 20, Sampler: Euler, Version: sdxl 0.1.0', 'Euler', undefined],
  ] as const) {
    const settings = read(fields);
    t.same([settings.scheduler, settings.timestepSpacing], [scheduler, timestepSpacing], fields);
    t.ok(createSampler(scheduler).name, 'which we have');
  }
  t.equal(
    read('Steps: 2, Sampler: euler, Custom Sigmas: [14.6000, 2.5000, 0.0000], ').sigmas,
    '14.6000, 2.5000, 0.0000',
  );
  t.equal(read('Steps: 2, Sampler: Euler a, Eta: 0.67, Version: v1.10.1').etaAncestral, '0.67');
  t.equal(read('Steps: 2, Sampler: DDIM, Eta DDIM: 0.5, Version: v1.10.1').eta, '0.5');
  t.equal(
    read('Steps: 2, Sampler: euler_a, Eta: 0.000000, Version: stable-diffusion.cpp').etaAncestral,
    undefined,
  );
  t.end();
});

test('what else made a picture is told', (t) => {
  const { settings, further } = readParameters(
    'a <lora:style:0.8> fox, red <lora:more:1>\nNegative prompt: rain\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 3, ' +
      'Size: 512x768, Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Variation seed: 2, Variation seed strength: 0.4, ' +
      'Seed resize from: 64x96, Denoising strength: 0.5, Mask blur: 4, Masked content: fill, Hires checkpoint: other, ' +
      'Lora hashes: "style: 1, more: 2", Version: v1.10.1',
  );
  t.match(settings, { prompt: 'a fox, red', negativePrompt: 'rain', width: '512', height: '768', seed: '3' });
  t.match(settings, {
    ...{ subseed: '2', subseedStrength: '0.4', seedResizeFromW: '64', seedResizeFromH: '96' },
  });
  t.same(further, [
    { text: '<lora:style:0.8>', option: 'lora' },
    { text: '<lora:more:1>', option: 'lora' },
    { text: 'Model: sd_xl_base_1.0', option: 'model' },
    { text: 'Denoising strength: 0.5', option: 'strength' },
    { text: 'Mask blur: 4', option: 'maskBlur' },
    { text: 'Masked content: fill', option: 'maskedContent' },
    { text: 'Hires checkpoint: other', option: undefined },
  ]);
  t.same(readParameters('a fox\nSteps: 20, Seed: 1').further, []);
  for (const [fields, sampler, type] of [
    ['Sampler: Euler, Schedule type: Karras Exponential', 'Euler', 'Karras Exponential'],
    ['Sampler: dpm++2m bong_tangent, Version: stable-diffusion.cpp', 'dpm++2m', 'bong_tangent'],
  ]) {
    const said = `Steps: 20, ${fields}`;
    t.equal(read(said).scheduler, sampler, said);
    t.same(readParameters(`a fox\n${said}`).further, [
      { text: `Schedule type: ${type}`, option: 'scheduler' },
    ]);
  }
  t.end();
});

test('a quoted text as long as a file', (t) => {
  const long = 'a'.repeat(2e7); // more letters than a stack has room for choices
  const text = `fox\nSteps: 3, Hires prompt: "${long}", Hires upscale: 2`;
  t.equal(readParameters(text).settings.hiresPrompt?.toString().length, 2e7);
  t.equal(labelledParameters(text)['Hires prompt']?.toString().length, 2e7);
  t.end();
});

test('a second pass over the picture enlarged', (t) => {
  for (const [fields, settings] of [
    [
      'Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: Latent (bicubic antialiased), Version: v1.10.1',
      {
        ...{ hiresScale: '1.5', hiresSteps: '12', hiresDenoisingStrength: '0.5' },
        ...{ hiresUpscaler: 'Latent (bicubic antialiased)', hiresWidth: undefined },
      },
    ],
    [
      'Denoising strength: 0.7, Hires resize: 0x1536, Hires upscaler: Lanczos, Version: v1.10.1',
      { hiresScale: undefined, hiresWidth: undefined, hiresHeight: '1536', hiresUpscaler: 'Lanczos' },
    ],
    [
      'Seed: 3, Denoising strength: 0.7, Hires prompt: "a \\"hare\\", Seed: 4, \\nin snow", Hires negative prompt: fog, Hires CFG Scale: 4, Hires upscale: 2',
      {
        ...{ hiresPrompt: 'a "hare", Seed: 4, \nin snow', hiresNegativePrompt: 'fog', seed: '3' },
        ...{ hiresGuidanceScale: '4', hiresScale: '2' },
      },
    ],
    [
      'Hires upscale: 2, Hires sampler: DPM++ 2M, Hires schedule type: Karras, Version: v1.10.1',
      { scheduler: 'Euler Uniform', hiresScheduler: 'DPM++ 2M Karras', hiresTimestepSpacing: 'linspace' },
    ],
    [
      'Schedule type: Beta, Hires upscale: 2, Hires sampler: Euler a, Version: v1.10.1',
      { scheduler: 'Euler Beta', hiresScheduler: 'Euler a Beta', hiresTimestepSpacing: 'linspace' },
    ],
    [
      'Hires upscale: 2, Hires schedule type: Karras, Version: v1.10.1',
      { hiresScheduler: 'Euler Karras', hiresTimestepSpacing: 'linspace' },
    ],
    [
      'Hires upscale: 2, Hires sampler: DDIM, Version: v1.10.1',
      { timestepSpacing: 'linspace', hiresScheduler: 'DDIM', hiresTimestepSpacing: undefined },
    ],
    [
      'Hires prompt: "a" 5" and a "6" nail, Hires negative prompt: 7" board, Seed: 3, Hires upscale: 2',
      { hiresPrompt: '"a" 5" and a "6" nail', hiresNegativePrompt: '7" board', seed: '3', hiresScale: '2' },
    ],
    [
      'Hires upscale: Latent, Hires scale: 2.000000, Hires resize: 0x0, Hires steps: 0, Denoising strength: 0.700000, Version: stable-diffusion.cpp',
      { hiresScale: '2.000000', hiresHeight: undefined, hiresSteps: undefined, hiresUpscaler: 'Latent' },
    ],
  ] as const) {
    const { settings: found, further } = readParameters(`a fox\nSteps: 20, Sampler: Euler, ${fields}`);
    t.match(found, { hires: true, ...settings }, fields);
    t.same(further, [], 'nothing else');
  }
  const unheeded = 'Hires schedule type: Bong Tangent';
  t.same(readParameters(`a fox\nSteps: 20, Sampler: Euler, Hires upscale: 2, ${unheeded}`).further, [
    { text: unheeded, option: 'hiresScheduler' },
  ]);
  const foreign = readParameters(
    'a fox\nSteps: 20, Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: 4x-UltraSharp',
  );
  t.equal(foreign.settings.hires, undefined, 'an upscaler that is none of ours is told of');
  t.same(foreign.further, [{ text: 'a second pass by the upscaler 4x-UltraSharp', option: 'hires' }]);
  const request = complete({ ratio: 8, sampleSize: 64 }, { prompt: ['a fox'] });
  const texts = { hires: true, hiresPrompt: '"big"', hiresNegativePrompt: '5" (fog) "' };
  const told = { ...texts, rng: 'cuda', emphasis: 'none' } as SampleOptions;
  const text = writeParameters(told, request, 3, createSampler('euler'));
  t.match(readParameters(text).settings, { ...texts, emphasis: 'none' }, 'of brackets there alone, too');
  const config = { timestep_spacing: 'linspace' as const };
  for (const [name, fields] of [
    ['euler_karras', 'Hires schedule type: Karras'],
    ['dpm++2m_normal', 'Hires sampler: DPM++ 2M'],
    ['euler', ''],
  ]) {
    const second = writeParameters(
      told,
      request,
      3,
      createSampler('euler', config),
      createSampler(name, config),
    );
    t.equal(/Hires s(ampler|chedule).*(?=, Emphasis)/.exec(second)?.[0] ?? '', fields, name);
  }
  t.end();
});

test('schedule types there and back', (t) => {
  const request = complete({ ratio: 8, sampleSize: 64 }, { prompt: ['a fox'] });
  const config = { timestep_spacing: 'linspace' as const };
  const written = (sampler: Sampler) =>
    writeParameters({ rng: 'cuda', emphasis: 'none' } as SampleOptions, request, 3, sampler);
  for (const name of ['euler', 'euler_a', 'dpm++2m', 'dpm++2s', 'unipc', 'deis'])
    for (const schedule of sigmaSchedules) {
      const sampler = createSampler(`${name}_${schedule}`, config);
      const text = written(sampler);
      const { settings, further } = readParameters(text);
      t.same(further, [], text);
      t.strictSame(
        createSampler(settings.scheduler as string, config).config,
        sampler.config,
        `${name} ${text}`,
      );
    }
  for (const [schedule, label] of [
    ['normal', 'Uniform'],
    ['sgm_uniform', 'SGM Uniform'],
    ['align_your_steps', 'Align Your Steps'],
    ['kl_optimal', 'KL Optimal'],
    ['ddim_uniform', 'DDIM'],
    ['kl_optimal_zero', 'kl_optimal_zero'], // which it has not
  ])
    t.match(written(createSampler(`euler_${schedule}`)), `Sampler: Euler, Schedule type: ${label}, `);
  t.end();
});

test('ours are in its words', (t) => {
  const options = { rng: 'cuda', emphasis: 'none' } as SampleOptions;
  const request = complete(
    { ratio: 8, sampleSize: 64 },
    { prompt: ['a fox'], height: 32, num_inference_steps: 4 },
  );
  for (const [name, said] of [
    ['dpm++2m_karras', 'Sampler: DPM++ 2M, Schedule type: Karras'],
    ['dpm++3m_sde_exponential', 'Sampler: DPM++ 3M SDE, Schedule type: Exponential'],
    ['dpm++2s_a_karras', 'Sampler: DPM++ 2S a, Schedule type: Karras'],
    ['dpm++2m_sde_heun_exponential', 'Sampler: DPM++ 2M SDE Heun, Schedule type: Exponential'],
    ['euler_a', 'Sampler: Euler a'],
    ['deis', 'Sampler: DEISMultistepScheduler'],
    ['ddim', 'Sampler: DDIM'],
  ]) {
    const text = writeParameters(options, request, 3, createSampler(name, { timestep_spacing: 'leading' }));
    t.match(
      text,
      new RegExp(`^a fox\nSteps: 4, ${said.replaceAll('+', '\\+')}, CFG scale: 5, Seed: 3, Size: 64x32, `),
    );
  }
  const over = { ...request, image: { shape: [], data: new Float32Array() }, strength: 0.4 };
  t.match(writeParameters(options, over, 3, createSampler('euler')), /, Denoising strength: 0.4, /);
  t.end();
});

test('fields by its own labels, as its png-info tells them', (t) => {
  const told = labelledParameters(
    'a fox,\n in snow\nNegative prompt: rain\nand: fog\nSteps: 20, Sampler: Euler a, Seed: 3, Size: 512x768, ' +
      'Hires prompt: "a fox, red: \\"x\\"", Lora hashes: "style: 1, more: 2", RNG: CPU, Version: v1.10.1',
  );
  t.match(told, {
    ...{ Prompt: 'a fox,\nin snow', 'Negative prompt': 'rain\nand: fog', Steps: '20', 'Size-1': '512' },
    ...{ 'Size-2': '768', 'Hires prompt': 'a fox, red: "x"', 'Lora hashes': 'style: 1, more: 2', RNG: 'CPU' },
    ...{ 'Clip skip': '1', 'Hires resize-1': 0, 'Schedule type': 'Automatic', Version: 'v1.10.1' },
  });
  t.notOk('Size' in told);
  t.match(labelledParameters('a fox, Steps: 20'), { Prompt: 'a fox, Steps: 20', 'Negative prompt': '' });
  t.match(labelledParameters(''), { Prompt: '', 'Negative prompt': '' });
  t.equal(labelledParameters('a '.repeat(500_000)).Prompt?.toString().length, 999_999, 'in no time');
  t.end();
});
