// What a scheduler's name and its scheduler_config.json may say, key by key: names as other programs write them, diffusers' defaults of each
// class, and what no class can use, which is refused before a model is loaded.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { type SchedulerClass, type SchedulerConfig, schedulerClasses } from '../../models/samplers/config.ts';
import { completeConfig, parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { createSampler, samplerNames, shortSchedulerNames } from '../../models/samplers/registry.ts';
import { goldenFolder, goldenLines } from '../support/golden.ts';
import { says } from '../support/mistake.ts';

const sdxl = parseSchedulerConfig(
  JSON.parse(readFileSync(join(goldenFolder, 'tiny-sdxl', 'scheduler', 'scheduler_config.json'), 'utf8')),
);
test('values that no scheduler can use', (t) => {
  const short = Array<number>(999).fill(0.5);
  for (const [json, message] of [
    [{ _class_name: 5 }, /^scheduler_config\.json: _class_name is 5, but must be the name of a scheduler/],
    [{ num_train_timesteps: 0 }, /num_train_timesteps is 0, but must be a whole number from 2 to/],
    [
      { num_train_timesteps: 1e9 },
      /num_train_timesteps is 1000000000, but must be a whole number from 2 to 1000000/,
    ],
    [{ beta_start: 5 }, /beta_start is 5, but must be a number between 0 and 1/],
    [{ beta_end: null }, /beta_end is null, but must be a number between/],
    [{ trained_betas: 'x' }, /trained_betas is "x", but must be a list of numbers from 0 to 1, or null/],
    [{ trained_betas: [0.1, 2] }, /trained_betas is \[0\.1,2\], but must be a list of numbers from 0 to 1/],
    [{ trained_betas: [] }, /trained_betas is \[\], but must be a list of 1000 numbers/],
    [{ trained_betas: short }, /trained_betas is \[[0.5,]{1,59}\.\.\., but must be a list of 1000 numbers/],
    [{ steps_offset: -1 }, /steps_offset is -1, but must be a whole number from 0/],
    [{ steps_offset: 1000 }, /steps_offset is 1000, but must be below num_train_timesteps, which is 1000/],
    [{ use_karras_sigmas: 'no' }, /use_karras_sigmas is "no", but must be true or false/],
    [{ sigma_max: 0 }, /sigma_max is 0, but must be a number above 0, or null/],
    [{ clip_sample_range: -1 }, /clip_sample_range is -1, but must be a number above 0/],
    [{ solver_order: 0 }, /solver_order is 0, but must be a whole number from 1/],
    [{ disable_corrector: null }, /disable_corrector is null, but must be a list of whole numbers/],
    [{ original_inference_steps: 0 }, /original_inference_steps is 0/],
    [{ timestep_scaling: '10' }, /timestep_scaling is "10"/],
  ] as const)
    t.throws(() => parseSchedulerConfig(json), says(message), Object.keys(json)[0]);
  const fourth = { solver_order: 4 };
  t.throws(() => createSampler('dpm++2m', fourth), says(/solver_order is 4, but must be 1, 2 or 3 for DPM/));
  t.equal(createSampler('unipc', fourth).plan(8).steps, 8, 'UniPC alone has any order');
  t.end();
});

test('keys that every object has are none of a scheduler', (t) => {
  const odd = { toString: 1, constructor: 'x', hasOwnProperty: [] };
  const plain = completeConfig('EulerDiscreteScheduler', sdxl);
  t.same(completeConfig('EulerDiscreteScheduler', { ...sdxl, ...odd }), plain);
  t.end();
});

test('values at the edge of what they can', (t) => {
  const betas = Array<number>(1000).fill(0.01);
  for (const [key, values] of [
    ['trained_betas', [null, betas, [...betas, 1]]],
    ['disable_corrector', [[], [0, 1]]],
    ['use_karras_sigmas', [true, false, null]],
    ['sigma_min', [null, 0.03]],
    ['solver_order', [1, 2, 3]],
    ['steps_offset', [0, 999]],
  ] as const)
    for (const value of values) t.same(parseSchedulerConfig({ [key]: value }), { [key]: value }, key);
  t.end();
});

test('names', (t) => {
  for (const spelling of ['DPM++ 2M Karras', 'dpmpp_2m_karras', 'dpm++2m_karras']) {
    const { name, config } = createSampler(spelling, sdxl);
    t.equal(`${name} ${config.use_karras_sigmas}`, 'DPMSolverMultistepScheduler true', spelling);
  }
  for (const [spelling, name] of [
    ['Euler a', 'EulerAncestralDiscreteScheduler'],
    ['k_euler_ancestral', 'EulerAncestralDiscreteScheduler'],
    ['K_DPM_2', 'KDPM2DiscreteScheduler'],
    ['DPMSolverMultistep', 'DPMSolverMultistepScheduler'],
    ['PLMS', 'PNDMScheduler'],
  ])
    t.equal(createSampler(spelling).name, name, spelling);
  const short = {
    ...{ euler: 'EulerDiscrete', euler_a: 'EulerAncestralDiscrete', ddim: 'DDIM', ddpm: 'DDPM' },
    ...{ 'dpm++2m': 'DPMSolverMultistep', 'dpm++2m_sde': 'DPMSolverMultistep' },
    ...{ 'dpm++2m_sde_heun': 'DPMSolverMultistep', 'dpm++2s': 'DPMSolverSinglestep' },
    ...{ 'dpm++sde': 'DPMSolverSDE', dpm2: 'KDPM2Discrete', dpm2_a: 'KDPM2AncestralDiscrete' },
    ...{ heun: 'HeunDiscrete', lms: 'LMSDiscrete', pndm: 'PNDM', plms: 'PNDM' },
    ...{ unipc: 'UniPCMultistep', deis: 'DEISMultistep', lcm: 'LCM', tcd: 'TCD', edm_euler: 'EDMEuler' },
    ...{ 'edm_dpm++2m': 'EDMDPMSolverMultistep', 'edm_dpm++2m_sde': 'EDMDPMSolverMultistep' },
  };
  const ofKDiffusion = [
    ['dpm++2s_a', 'sample_dpmpp_2s_ancestral', 'DPM++ 2S a', 'dpmpp_2s_ancestral'],
    ['dpm++3m_sde', 'sample_dpmpp_3m_sde', 'DPM++ 3M SDE', 'dpmpp_3m_sde'],
  ];
  for (const [spelling, name, ...more] of ofKDiffusion)
    for (const each of [spelling, name, ...more]) t.equal(createSampler(each).name, name, each);
  const all = [...Object.keys(short), ...ofKDiffusion.map(([spelling]) => spelling)];
  t.same([...shortSchedulerNames].sort(), all.sort());
  for (const [spelling, name] of Object.entries(short))
    t.equal(createSampler(spelling).name, `${name}Scheduler`, spelling);
  t.equal(createSampler('PLMS').config.skip_prk_steps, true, 'PLMS is PNDM without Runge-Kutta steps');
  const { algorithm_type, solver_type, use_karras_sigmas } = createSampler('DPM++ 2M SDE Heun Karras').config;
  t.same([algorithm_type, solver_type, use_karras_sigmas], ['sde-dpmsolver++', 'heun', true]);
  for (const [layout, key] of [
    ['exponential', 'use_exponential_sigmas'],
    ['beta', 'use_beta_sigmas'],
  ] as const)
    t.equal(createSampler(`Euler ${layout}`, { ...sdxl, use_karras_sigmas: true }).config[key], true, layout);
  for (const name of samplerNames) t.ok(createSampler(name, sdxl).plan(4).steps > 0, `${name} plans`);
  t.throws(() => createSampler('eulr'), {
    name: 'UserError',
    message: /unknown scheduler "eulr"; did you mean "euler"/,
  });
  for (const layout of ['', '_karras'])
    t.throws(
      () => createSampler(`dpmpp_2m_sde_gpu${layout}`),
      says(new RegExp(`is no part of a name here; take dpmpp_2m_sde${layout}, with --rng cuda`)),
    );
  t.throws(() => createSampler('DDIMSheduler'), { message: /did you mean "DDIMScheduler"/ });
  t.throws(() => parseSchedulerConfig({ prediction_type: 'epsilom' }), {
    name: 'UserError',
    message: /"epsilon"/,
  });
  t.throws(() => parseSchedulerConfig({ lambda_min_clipped: -5.1 }), {
    message: /lambda_min_clipped is not/,
  });
  t.throws(() => createSampler('dpm++2m', { algorithm_type: 'dpmsolver' }), { message: /"sigma_min"/ });
  t.throws(() => createSampler('ddpm', { variance_type: 'learned' as 'fixed_small' }), {
    message: /variance_type "learned" is not supported/,
  });
  t.end();
});

test('every class has the defaults that diffusers gives it', (t) => {
  const lines = goldenLines<{ class: SchedulerClass }>('scheduler_defaults');
  const theirs = schedulerClasses.filter((name) => name.endsWith('Scheduler'));
  t.equal(lines.length, theirs.length);
  for (const { class: name, ...want } of lines) {
    const got: Partial<SchedulerConfig> = completeConfig(name, {});
    if (name === 'DPMSolverSinglestepScheduler') {
      // Which it has not, and its even layout does not read.
      delete got.timestep_spacing;
      delete got.steps_offset;
    }
    t.strictSame(got, want, name);
  }
  t.end();
});
