// What a scheduler_config.json may say, key by key: what no class can use is refused before a model is loaded.
import { test } from 'tap';
import { parseSchedulerConfig } from '../../models/samplers/config.ts';
import { createSampler } from '../../models/samplers/registry.ts';

const says = (message: RegExp) => ({ name: 'UserError', message });

test('values that no scheduler can use', (t) => {
  const short = Array<number>(999).fill(0.5);
  for (const [json, message] of [
    [{ _class_name: 5 }, /^scheduler_config\.json: _class_name is 5, but must be the name of a scheduler/],
    [{ num_train_timesteps: 0 }, /num_train_timesteps is 0, but must be a whole number from 2/],
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
