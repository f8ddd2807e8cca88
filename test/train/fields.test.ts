// The keys of a run: what a value on the command line is read as, and what is refused at the edge of what may stand there.
import { test } from 'tap';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { refuses } from '../support/io_helpers.ts';

const resolved = (...assignments: string[]) => resolveRun({}, 'the file', 'test', assignments);

test('a written value is read as its key takes it', (t) => {
  const at = (assignment: string): unknown => {
    const keys = assignment.slice(0, assignment.indexOf('=')).split('.');
    return keys.reduce<unknown>(
      (value, key) => (value as Record<string, unknown>)[key],
      resolved(assignment),
    );
  };
  for (const [assignment, want] of [
    ['optimizer.lr=.5', 0.5],
    ['optimizer.lr=1e-5', 1e-5],
    ['steps=12', 12],
    ['steps=0x10', 16],
    ['vae=12', '12'],
    ['name=true', 'true'],
    ['dataset.random_flip=true', true],
    ['dataset.caption_separator==', '='],
    ['dataset.instance_prompt=', ''],
    ['lora.targets=to_q', ['to_q']],
    ['train.parts=attn1, attn2', ['attn1', 'attn2']],
    ['train.parts=["a,b"]', ['a,b']],
    ['previews.prompts=', []],
    ['controlnet.transformer_layers_per_block=', []],
    ['dataset.resolution=512', 512],
    ['dataset.resolution=1024, 512', [1024, 512]],
    ['optimizer.betas=0.8,0', [0.8, 0]],
    ['optimizer.betas=[0.8,0.9]', [0.8, 0.9]],
    ['ema.decay=1', 1],
    ['ema.decay=0', 0],
    ['lora.rank=1', 1],
    ['objective.prior_loss_weight=0', 0],
  ] as const)
    t.strictSame(at(assignment), want, assignment);
  t.end();
});

test('what is left out is as in the scripts of diffusers, or off', (t) => {
  t.match(resolved(), {
    ...{ seed: 0, dtype: 'float32', batch_size: 1, gradient_accumulation_steps: 1, steps: 0 },
    train: { target: 'unet', parts: [], text_encoders: false, gradient_checkpointing: false },
    lora: { rank: 8, alpha: 8, targets: ['to_q', 'to_k', 'to_v', 'to_out.0'] },
    dataset: {
      crops: 1,
      random_flip: false,
      caption_dropout_rate: 0,
      caption_tag_dropout_rate: 0,
      broken: 'fatal',
    },
    objective: {
      ...{
        loss: 'mse',
        huber_delta: 1,
        prior_loss_weight: 1,
        snr_gamma: 0,
        debiased: false,
        timesteps: 'uniform',
      },
      ...{
        noise_offset: 0,
        pyramid_noise: 0,
        input_perturbation: 0,
        zero_terminal_snr: false,
        timestep_bias: 0.25,
      },
    },
    vae_objective: { l1: 1, mse: 1, kl: 1e-4 },
    optimizer: { name: 'adamw', betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, max_grad_norm: 1 },
    lr_scheduler: { name: 'constant', warmup_steps: 0, num_cycles: 1, power: 1 },
    ema: { decay: 0 },
    checkpoints: { every_steps: 0, keep: 3 },
    validation: { samples: 0 },
  });
  t.end();
});

test('values under which nothing would be trained are refused', (t) => {
  const lora = 'train.target=lora';
  refuses(t, /"lora\.alpha" is 0, .*kohya's 0 means the rank: set lora\.alpha to 8$/, () =>
    resolved(lora, 'lora.alpha=0'),
  );
  for (const name of ['adamw', 'adamw8bit'])
    refuses(t, /"optimizer\.eps" is 0, .* to NaN; .* such as 1e-8$/, () =>
      resolved('optimizer.eps=0', `optimizer.name=${name}`),
    );
  t.doesNotThrow(() => resolved('optimizer.eps=0', 'optimizer.name=lion'), 'where it is not used');
  for (const value of ['', '1024,4', '[]', '1024.5'])
    refuses(t, /"dataset\.resolution" takes a whole number from 8, or a list of such$/, () =>
      resolved(`dataset.resolution=${value}`),
    );
  refuses(t, /text_encoder_lr" takes a number from 0, or a list of up to 2 such$/, () =>
    resolved('train.text_encoders=true', 'optimizer.text_encoder_lr=1,2,3'),
  );
  refuses(t, /text_encoder_lr" is 0 for both text encoders, .* to false instead$/, () =>
    resolved('train.text_encoders=true', 'optimizer.text_encoder_lr=0,0'),
  );
  const own = 'dataset.bucket_no_upscale=true';
  refuses(t, /"dataset\.bucket_no_upscale" gives .*; set that too, or leave it out$/, () => resolved(own));
  t.doesNotThrow(() => resolved(own, 'dataset.aspect_ratio_buckets=true'));
  const huber = 'objective.loss=huber';
  refuses(t, /"objective\.huber_delta" is 0, /, () => resolved(huber, 'objective.huber_delta=0'));
  const weightless = ['l1', 'mse', 'kl'].map((term) => `vae_objective.${term}=0`);
  refuses(t, /"vae_objective" has only weights of 0/, () => resolved('train.target=vae', ...weightless));
  t.doesNotThrow(() => resolved('train.target=vae', ...weightless.slice(1)), 'one term is enough');
  t.doesNotThrow(() => resolved('lora.alpha=0'), 'where it is not used');
  const adafactor = 'optimizer.name=adafactor';
  refuses(t, /"optimizer\.clip_threshold" is 0, /, () => resolved(adafactor, 'optimizer.clip_threshold=0'));
  for (const [key, value, name] of [
    ['warmup_steps', '100', 'constant_with_warmup'],
    ['num_cycles', '3', 'cosine_with_restarts'],
    ['power', '2', 'polynomial'],
    ['step_rules', '1:10,0.1', 'piecewise_constant'],
  ]) {
    const unheeded = new RegExp(
      `"lr_scheduler\\.${key}" is .*"constant" does not follow; set that to "${name}"`,
    );
    refuses(t, unheeded, () => resolved(`lr_scheduler.${key}=${value}`));
    t.doesNotThrow(() => resolved(`lr_scheduler.${key}=${value}`, `lr_scheduler.name=${name}`));
  }
  t.end();
});

test('what Prodigy cannot find a learning rate with is refused', (t) => {
  const prodigy = ['optimizer.name=prodigy', 'optimizer.lr=1'];
  t.doesNotThrow(() => resolved(...prodigy, 'optimizer.growth_rate=1.02', 'train.text_encoders=true'));
  t.doesNotThrow(() => resolved(...prodigy, 'train.text_encoders=true', 'optimizer.text_encoder_lr=1,0'));
  const texts = ['train.text_encoders=true', 'optimizer.text_encoder_lr=0.5'];
  for (const [says, ...assignments] of [
    [/"optimizer\.lr" is 0\.00001, and Prodigy takes .*; set it to 1$/, 'optimizer.lr=0.00001'],
    [/"optimizer\.text_encoder_lr" is 0\.5, and Prodigy has one/, ...texts],
    [/"optimizer\.text_encoder_lr" is 2, /, texts[0], 'optimizer.text_encoder_lr=1,2'],
    [/"optimizer\.d0" is 0, with which Prodigy finds no/, 'optimizer.d0=0'],
    [/"optimizer\.d_coef" is 0, /, 'optimizer.d_coef=0'],
    [/"optimizer\.eps" is 0, /, 'optimizer.eps=0'],
    [/"optimizer\.growth_rate" is 0\.5, .*0 for no bound$/, 'optimizer.growth_rate=0.5'],
  ] as const)
    refuses(t, says, () => resolved(...prodigy, ...assignments));
  refuses(t, /"optimizer\.lr" is 0\.00001, /, () => resolved('optimizer.name=prodigy'));
  t.end();
});

test('keys that would do nothing are refused, with what they are for', (t) => {
  const vae = 'train.target=vae';
  for (const [key, value, of, owner, ...more] of [
    ['optimizer.d_coef', '2', 'Prodigy', 'optimizer.name=prodigy', 'optimizer.lr=1'],
    ['optimizer.d0', '1e-5', 'Prodigy', 'optimizer.name=prodigy', 'optimizer.lr=1'],
    ['optimizer.beta3', '0.9', 'Prodigy', 'optimizer.name=prodigy', 'optimizer.lr=1'],
    ['optimizer.growth_rate', '2', 'Prodigy', 'optimizer.name=prodigy', 'optimizer.lr=1'],
    ['optimizer.use_bias_correction', 'true', 'Prodigy', 'optimizer.name=prodigy', 'optimizer.lr=1'],
    ['optimizer.safeguard_warmup', 'true', 'Prodigy', 'optimizer.name=prodigy', 'optimizer.lr=1'],
    ['optimizer.clip_threshold', '2', 'Adafactor', 'optimizer.name=adafactor'],
    ['optimizer.decay_rate', '-0.5', 'Adafactor', 'optimizer.name=adafactor'],
    ['objective.huber_delta', '0.1', 'the Huber loss', 'objective.loss=huber'],
    ['objective.huber_c', '0.2', 'the pseudo-Huber loss', 'objective.loss=pseudo_huber'],
    ['objective.huber_schedule', 'constant', 'the pseudo-Huber loss', 'objective.loss=pseudo_huber'],
    ['lcm.huber_c', '0.1', 'the pseudo-Huber loss', 'lcm.loss_type=huber', 'train.method=lcm'],
    ['vae_objective.kl', '0', 'a VAE', vae],
  ]) {
    const [by, name] = owner.split('=');
    const mend = new RegExp(
      `"${key}" is of ${of}, and "${by}" is "\\w+"; leave it out, or set "${by}" to "${name}"$`,
    );
    const others = key.startsWith('lcm') ? more : [];
    refuses(t, mend, () => resolved(`${key}=${value}`, ...others));
    t.doesNotThrow(() => resolved(`${key}=${value}`, owner, ...more), key);
  }
  t.doesNotThrow(() => resolved('objective.huber_c=0.2', 'objective.loss=smooth_l1'), 'one of two');
  for (const [key, value] of [
    ['objective.snr_gamma', '5'],
    ['objective.loss', 'huber'],
    ['train.gradient_checkpointing', 'true'],
  ]) {
    refuses(t, new RegExp(`"${key}" is of a UNet, and "train.target" is "vae"; leave it out$`), () =>
      resolved(vae, `${key}=${value}`),
    );
    t.doesNotThrow(() => resolved(`${key}=${value}`), key);
  }
  t.end();
});

test('moments in bfloat16 are for AdamW', (t) => {
  const bfloat16 = 'optimizer.moments_dtype=bfloat16';
  for (const given of [[], ['dtype=bfloat16'], ['dtype=bfloat16', 'optimizer.stochastic_rounding=true']])
    t.equal(resolved(bfloat16, ...given).optimizer.moments_dtype, 'bfloat16');
  for (const name of ['adamw8bit', 'adafactor', 'lion'])
    refuses(
      t,
      new RegExp(`"optimizer\\.moments_dtype" is for AdamW's moments, and .* is "${name}"; leave it out, `),
      () => resolved(bfloat16, `optimizer.name=${name}`),
    );
  refuses(t, /"optimizer\.moments_dtype" takes /, () => resolved('optimizer.moments_dtype=float16'));
  t.end();
});

test('what does not fit is refused', (t) => {
  for (const [assignment, says] of [
    ['=5', /--set takes KEY=VALUE/],
    ['steps', /--set takes KEY=VALUE/],
    ['x=1', /no key "x"/],
    ['steps=', /"steps" takes a whole number from 0/],
    ['steps=1.5', /"steps" takes a whole number from 0/],
    ['steps=-1', /"steps" takes a whole number from 0/],
    ['objective.timestep_bias=1.5', /takes a number from 0 to 1/],
    ['checkpoints.keep=0', /takes a whole number from 1/],
    ['lr_scheduler.warmup_steps=1.5', /takes a whole number, or a share below 1/],
    ['lr_scheduler.warmup_steps=-0.1', /takes a whole number, or a share below 1/],
    ['seed=9007199254740993', /"seed" takes a whole number from 0 to 9007199254740991/],
    ['previews.seed=1e300', /"previews\.seed" takes a whole number from 0 to 9007199254740991/],
    ['lora.rank=0', /"lora\.rank" takes a whole number from 1/],
    ['dataset.caption_separator=', /"dataset\.caption_separator" takes a text that is not empty/],
    ['lora.rank=1e12', /"lora\.rank" takes a whole number from 1 to 16384/],
    ['lora.conv_rank=1e12', /"lora\.conv_rank" takes a whole number from 0 to 16384/],
    ['dataset.crops=1e12', /"dataset\.crops" takes a whole number from 1 to 1000/],
    ['controlnet.transformer_layers_per_block=[0,0,5000]', /each entry a whole number from 0 to 100/],
    ['textual_inversion.num_vectors=1e12', /takes a whole number from 1 to 16384/],
    ['lcm.unet_time_cond_proj_dim=1e12', /takes a whole number from 0 to 16384/],
    ['ema.decay=1.001', /"ema\.decay" takes a number from 0 to 1/],
    ['optimizer.betas=0.9,1', /"optimizer\.betas" takes a list of two, each a number from 0 to below 1/],
    ['optimizer.betas=0.9', /takes a list of two/],
    ['optimizer.betas=0.9,', /takes a list of two/],
    ['optimizer.lr=Infinity', /"optimizer\.lr" takes a number from 0/],
    ['dataset.random_flip=yes', /takes true or false/],
    ['optimizer=1', /"optimizer" is a group; name one of its keys: name, lr/],
    ['optimizer.lr.x=1', /no key "optimizer\.lr\.x"/],
    ['optimizer.eqs=1', /no key "optimizer\.eqs".*"optimizer\.eps"/],
    ['step=1', /no key "step".*"steps"/],
    ['toString=1', /no key "toString"; the keys here are name, /],
  ] as const)
    refuses(t, says, () => resolved(assignment));
  const circle: { rank?: unknown } = {};
  circle.rank = circle;
  for (const [given, says] of [
    [{ dtype: Object.create(null) }, /"dtype" is \{\}; it takes "float32" or "bfloat16"$/],
    [{ steps: 10n }, /"steps" is 10n; it takes a whole number/],
    [{ lora: circle }, /"lora\.rank" is <ref \*1> \{ rank: \[Circular \*1\] \}; it takes a whole number/],
    // biome-ignore lint/suspicious/noSparseArray: what a comma too many makes
    [{ lora: { targets: ['to_q', , 'to_k'] } }, /"lora\.targets" is \["to_q",null,"to_k"\]; it takes a list/],
    // biome-ignore lint/suspicious/noSparseArray: the same
    [{ optimizer: { betas: [0.9, ,] } }, /"optimizer\.betas" is \[0\.9,null\]; it takes a list of two/],
  ] as const)
    refuses(t, says, () => resolveRun(given, 'the file', 'test'));
  t.end();
});

test('a preview is a text, or a record with settings of its own', (t) => {
  const given = (...prompts: unknown[]) => resolveRun({ previews: { prompts } }, 'the file', 'test');
  const record = { prompt: 'a cat', width: 832, seed: 0, negative_prompt: undefined };
  t.same(given('a cat', record).previews.prompts, ['a cat', record]);
  const set = 'previews.prompts=["a cat",{"prompt":"a dog","num_inference_steps":4}]';
  t.same(resolved(set).previews.prompts, ['a cat', { prompt: 'a dog', num_inference_steps: 4 }]);
  for (const [prompt, says] of [
    [
      5,
      /"previews\.prompts" is \["a cat",5\]; it takes a list, each entry a text, or an object such as \{ prompt/,
    ],
    [{ width: 8 }, /"previews\.prompts\[1\]" has no "prompt"; its keys are prompt, negative_prompt, width/],
    [
      { ...record, widht: 8 },
      /unknown key "previews\.prompts\[1\]\.widht"; did you mean "previews\.prompts\[1\]\.width"/,
    ],
    [
      { ...record, cfg_scale: 8 },
      /"previews\.prompts\[1\]\.cfg_scale"; here it is "previews\.prompts\[1\]\.guidance_scale"/,
    ],
    [{ ...record, sample_steps: 8 }, /here it is "previews\.prompts\[1\]\.num_inference_steps"/],
    [{ ...record, seed: -1 }, /"previews\.prompts\[1\]\.seed" is -1; it takes a whole number from 0/],
    [{ ...record, height: 0 }, /"previews\.prompts\[1\]\.height" is 0; it takes a whole number from 1/],
    [
      'a cat, --prone --n blurry, bad --w 832 --d 7 --l 6.5 --s 28 --ss ddim',
      /"previews\.prompts\[1\]" is a line of kohya's sample_prompts; write \{ prompt: "a cat,", negative_prompt: "blurry, bad", width: 832, seed: 7, guidance_scale: 6\.5, num_inference_steps: 28, scheduler: "ddim" \}/,
    ],
  ] as const)
    refuses(t, says, () => given('a cat', prompt));
  t.doesNotThrow(() => given('a cat -- 2 --ow 3'), 'dashes that are none of its flags');
  refuses(t, /^--set .*"previews\.prompts\[0\]\.x"/, () =>
    resolved('previews.prompts=[{"prompt":"a","x":1}]'),
  );
  refuses(t, /unknown key "sample_steps"; here it is "previews\.num_inference_steps"/, () =>
    resolveRun({ sample_steps: 3 }, 'the file', 'test'),
  );
  t.end();
});
