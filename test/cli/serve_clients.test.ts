// Bodies that other programs send to A1111's routes and OpenAI's, with all that they put in by themselves: they draw, or are told in one
// sentence what is in the way.
import { Script } from 'node:vm';
import { test } from 'tap';
import { orderOf } from '../../cli/serve/a1111_order.ts';
import { fox, pixels, serve, small } from '../support/served.ts';

const served = {
  ...{ name: 'tiny-sdxl', loras: () => [], embeddings: new Map(), followed: new Map(), networks: new Map() },
  ...{ texts: {}, tellIgnored() {} },
};
const settingsOf = (body: Record<string, unknown>) => orderOf({ ...fox, ...body }, false, served).settings;

/** What A1111's page of its API shows as an example. */
const example = {
  ...{ prompt: '', negative_prompt: '', styles: ['string'], seed: -1, subseed: -1, subseed_strength: 0 },
  ...{ seed_resize_from_h: -1, seed_resize_from_w: -1, sampler_name: 'string', scheduler: 'string' },
  ...{ batch_size: 1, n_iter: 1, steps: 50, cfg_scale: 7, width: 512, height: 512, restore_faces: true },
  ...{ tiling: true, do_not_save_samples: false, do_not_save_grid: false, eta: 0, denoising_strength: 0 },
  ...{ s_min_uncond: 0, s_churn: 0, s_tmax: 0, s_tmin: 0, s_noise: 0, override_settings: {} },
  ...{ override_settings_restore_afterwards: true, refiner_checkpoint: 'string', refiner_switch_at: 0 },
  ...{ disable_extra_networks: false, firstpass_image: 'string', comments: {}, enable_hr: false },
  ...{ firstphase_width: 0, firstphase_height: 0, hr_scale: 2, hr_upscaler: 'string' },
  ...{ hr_second_pass_steps: 0, hr_resize_x: 0, hr_resize_y: 0, hr_checkpoint_name: 'string' },
  ...{ hr_sampler_name: 'string', hr_scheduler: 'string', hr_prompt: '', hr_negative_prompt: '' },
  ...{ force_task_id: 'string', sampler_index: 'Euler', script_name: 'string', script_args: [] },
  ...{ send_images: true, save_images: false, alwayson_scripts: {}, infotext: 'string' },
};

test("A1111's example draws without what it only names", (t) => {
  t.throws(() => settingsOf(example), {
    message:
      'styles ["string"], restore_faces true, refiner_checkpoint "string", script_name "string", infotext "string" are not there; leave them out',
  });
  const { styles, restore_faces, refiner_checkpoint, infotext, script_name, ...rest } = example;
  t.throws(() => settingsOf(rest), /scheduler takes Automatic.* not "string"/);
  const { scheduler, ...named } = rest;
  t.throws(() => settingsOf(named), /^sampler_name "string": unknown scheduler "string"/);
  const { sampler_name, ...taken } = named;
  t.match(settingsOf(taken), { scheduler: 'Euler Uniform', steps: 50, seamless: 'xy', width: 512 });
  t.throws(
    () => settingsOf({ ...taken, enable_hr: true, hr_upscaler: 'Latent' }),
    /^firstpass_image "string", hr_checkpoint_name "string" are not there/,
  );
  t.end();
});

test('noise in each step is as much as A1111 puts there', (t) => {
  for (const eta of [0, 0.5, 1])
    t.match(settingsOf({ eta, sampler_name: 'Euler a' }), { eta, etaAncestral: eta });
  t.throws(() => settingsOf({ eta: 2 }), /^eta takes a number from 0 to 1/);
  for (const sampler_name of ['Euler', 'Euler a', 'Heun', 'DPM++ 2M', 'DDIM', undefined])
    t.same(
      settingsOf({ sampler_name, s_noise: 0 }),
      settingsOf({ sampler_name }),
      's_noise is not read there',
    );
  t.ok(
    settingsOf({ sampler_index: 'DPM++ SDE Karras', eta: 0, s_noise: 0 }),
    'as Dify has it: there is no noise',
  );
  const second = { enable_hr: true, sampler_name: 'Euler', hr_sampler_name: 'DPM2 a' };
  for (const [body, whose] of [
    [{ sampler_name: 'DPM++ SDE', s_noise: 0 }, 'sampler_name "DPM++ SDE"'],
    [{ sampler_index: 'DPM++ 2M SDE', s_noise: 0 }, 'sampler_index "DPM++ 2M SDE"'],
    [{ ...second, s_noise: 0 }, 'hr_sampler_name "DPM2 a"'],
  ] as const)
    t.throws(() => settingsOf(body), {
      message: `${whose}: s_noise 0 is not there; leave s_noise out, or say how much noise by eta`,
    });
  t.end();
});

const shared = serve(...small);

const size = { width: 64, height: 64, steps: 2 };

test('programs draw with what they send by themselves', async (t) => {
  const server = await shared;
  const options = (await server.get('/sdapi/v1/options')).body;
  const bodies: Record<string, Record<string, unknown>> = {
    SillyTavern: {
      ...{
        ...size,
        url: server.url,
        auth: '',
        prompt: 'a red fox',
        negative_prompt: '',
        sampler_name: 'DDIM',
      },
      ...{ scheduler: 'normal', cfg_scale: 7, restore_faces: false, enable_hr: false, hr_upscaler: 'Latent' },
      ...{ hr_scale: 2, denoising_strength: 0.7, hr_second_pass_steps: 0, clip_skip: 1, save_images: true },
      ...{ override_settings: { CLIP_stop_at_last_layers: 1 }, override_settings_restore_afterwards: true },
      ...{ send_images: true, do_not_save_grid: false, do_not_save_samples: false },
    },
    'KoboldAI Lite': {
      ...{
        ...size,
        ...fox,
        sampler_name: 'Euler a',
        batch_size: 1,
        n_iter: 1,
        cfg_scale: 7,
        negative_prompt: '',
      },
      ...{
        do_not_save_samples: true,
        do_not_save_grid: true,
        enable_hr: false,
        eta: 0,
        s_churn: 0,
        s_tmax: 0,
      },
      ...{ s_tmin: 0, s_noise: 1, scheduler: 'sgm_uniform' },
      override_settings: {
        ...{ sd_model_checkpoint: options.sd_model_checkpoint, eta_noise_seed_delta: 0 },
        ...{ CLIP_stop_at_last_layers: 1, ddim_discretize: 'uniform', img2img_fix_steps: false },
        ...{ sd_hypernetwork: 'None', inpainting_mask_weight: 1, initial_noise_multiplier: 1 },
      },
    },
    'Auto-Photoshop': {
      ...{
        ...size,
        alwayson_scripts: {},
        prompt: 'a red fox',
        negative_prompt: '',
        original_prompt: 'a red fox',
      },
      ...{ clip_skip: 1, sampler_index: 'Euler a', denoising_strength: 0.5, batch_size: 1, cfg_scale: 7 },
      ...{
        seed: '5',
        mask_blur: 4,
        use_sharp_mask: 'none',
        use_prompt_shortcut: false,
        restore_faces: false,
      },
      ...{ prompt_shortcut_ui_dict: {}, uniqueDocumentId: 'a', mode: 'txt2img', tiling: false },
    },
    StableStudio: {
      ...{ ...size, seed: -1, cfgScale: 7, sampler_name: '', sampler_index: '', prompt: 'a red fox' },
      ...{ negative_prompt: '', batch_size: 1, save_images: true },
    },
  };
  for (const [name, body] of Object.entries(bodies)) {
    const answer = await server.post('/sdapi/v1/txt2img', body);
    t.equal(answer.status, 200, `${name} ${answer.body.detail ?? ''}`);
    t.equal((await pixels(answer.body.images[0])).width, 64);
    const told = (await server.post('/sdapi/v1/png-info', { image: answer.body.images[0] })).body.info;
    t.match(told.split('\n').at(-1), /^Steps: 2, .*, Seed: \d+, /);
    t.equal(/, Eta: 0,/.test(told), body.eta === 0, 'with as little noise as is asked for');
  }
  t.same(
    (await server.post('/sdapi/v1/options', { ...options, sd_model_checkpoint: '' })).status,
    200,
    'Open WebUI gives all options back',
  );
  t.ok('samples_format' in options, 'by which KoboldAI Lite knows them');

  const asked = { model: 'dall-e-3', ...fox, n: 1, size: '64x64', quality: 'standard', style: 'vivid' };
  const [url, silent, file] = await Promise.all(
    ['url', undefined, 'b64_json'].map(async (response_format) => {
      const { body } = await server.post('/v1/images/generations', { ...asked, response_format });
      return body.data[0];
    }),
  );
  t.equal(url.url, `data:image/png;base64,${file.b64_json}`, 'a URL is the picture itself');
  t.equal(url.b64_json, undefined);
  t.same(silent, url, "LibreChat's DALL-E reads it without asking for it");
});

test('a stream has previews, and each picture as soon as it is finished', async (t) => {
  const server = await shared;
  const asked = { ...fox, size: '64x64', n: 2, num_inference_steps: 8 };
  const whole = (await server.post('/v1/images/generations', asked)).body.data;
  const response = await fetch(`${server.url}/v1/images/generations`, {
    ...{ method: 'POST', headers: { 'Content-Type': 'application/json' } },
    body: JSON.stringify({ ...asked, stream: true, partial_images: 20 }),
  });
  const events = (await response.text()).split('\n\n').slice(0, -1);
  const sent = events.map((event) => JSON.parse(event.split('\ndata: ')[1]));
  const finished = sent.flatMap(({ type }, i) => (type === 'image_generation.completed' ? [i] : []));
  t.match(
    finished.map((i) => sent[i]),
    whole,
    'the pictures that one answer has',
  );
  t.equal(finished.at(-1), sent.length - 1);
  t.ok(finished[0] > 0 && finished[1] > finished[0] + 1, 'previews come before each');
  t.same(
    sent.flatMap(({ partial_image_index: i }) => i ?? []),
    sent.slice(2).map((_, i) => i),
  );
});

test('the page is a script that runs', async (t) => {
  const text = await (await fetch((await shared).url)).text();
  const [, script] = /<script>(.*)<\/script>/s.exec(text) ?? [];
  t.doesNotThrow(() => new Script(script));
  t.match(script, /split\('\\n\\n'\)/, 'with its line ends escaped');
  t.match(script, /fetch\('v1/, 'beside itself, wherever a proxy shows it');
  t.equal(await (await shared).end(), 143);
});
