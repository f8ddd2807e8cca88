// Models from random weights: the spread that PyTorch's, transformers' and the original SDXL's initialisations have, the
// same numbers for the same seed, and configs that read back as they were.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { componentConfigs } from '../../models/formats/diffusers_config.ts';
import { type ModelPreset, presets, sdxlScheduler } from '../../models/formats/presets.ts';
import { randomModel } from '../../models/formats/random_weights.ts';
import { parseTextConfig, textEncoder } from '../../models/text/clip.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { parseVaeConfig, vae } from '../../models/vae/vae.ts';

const device = openDevice('auto');

const tiny: ModelPreset = {
  unet: {
    ...presets['sdxl-base'].unet,
    block_out_channels: [32, 64],
    down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D'],
    up_block_types: ['CrossAttnUpBlock2D', 'UpBlock2D'],
    attention_head_dim: [1, 2],
    transformer_layers_per_block: [0, 1],
    cross_attention_dim: 64,
  },
  vae: { ...presets['sdxl-base'].vae, block_out_channels: [32, 32] },
  text_encoder: {
    ...presets['sdxl-base'].text_encoder!,
    hidden_size: 32,
    num_hidden_layers: 2,
    vocab_size: 100,
  },
  text_encoder_2: { ...presets['sdxl-base'].text_encoder_2, hidden_size: 32, vocab_size: 100 },
  scheduler: sdxlScheduler,
  requires_aesthetics_score: false,
};

const deviation = (values: Float32Array): number =>
  Math.sqrt(values.reduce((sum, x) => sum + x * x, 0) / values.length);

test('random weights', (t) => {
  const before = device.memory.storages;
  const source = randomModel(tiny, { seed: 7 });
  const net = unet(parseUNetConfig(source.config('unet')));
  source.load('unet', net, device, 'float32');
  const weights = new Map([...namedParameters(net)].map(([name, p]) => [name, p.tensor.floats()]));
  const get = (name: string) => weights.get(name) as Float32Array;
  const fanIn = 32 * 9;
  const conv = get('down_blocks.0.resnets.0.conv1.weight');
  t.ok(Math.max(...conv.map(Math.abs)) <= 1 / Math.sqrt(fanIn), 'uniform within 1/sqrt(fan in)');
  t.ok(Math.abs(deviation(conv) * Math.sqrt(3 * fanIn) - 1) < 0.05, 'and filling that range');
  t.ok(deviation(get('down_blocks.0.resnets.0.conv1.bias')) > 0, 'biases too');
  t.same(new Set(get('down_blocks.0.resnets.0.norm1.weight')), new Set([1]), 'norms are one');
  for (const name of [
    'up_blocks.0.resnets.0.conv2.weight',
    'mid_block.attentions.0.proj_out.bias',
    'conv_out.weight',
  ])
    t.equal(deviation(get(name)), 0, `${name} starts at zero`);
  randomModel(tiny, { seed: 7 }).load('unet', net, device, 'float32');
  t.same(
    namedParameters(net).get('conv_in.weight')?.tensor.floats(),
    get('conv_in.weight'),
    'same seed, same weights',
  );
  randomModel(tiny, { seed: 8 }).load('unet', net, device, 'float32');
  t.not(
    namedParameters(net).get('conv_in.weight')?.tensor.floats()[0],
    get('conv_in.weight')[0],
    'another seed',
  );

  const text = textEncoder(parseTextConfig(source.config('text_encoder')));
  source.load('text_encoder', text, device, 'float32');
  const clip = namedParameters(text);
  const q = clip.get('text_model.encoder.layers.0.self_attn.q_proj.weight')!.tensor.floats();
  t.ok(Math.abs(deviation(q) * Math.sqrt(32 * 4) - 1) < 0.1, 'CLIP queries as transformers starts them');
  t.equal(
    deviation(clip.get('text_model.encoder.layers.0.mlp.fc1.bias')!.tensor.floats()),
    0,
    'CLIP biases are zero',
  );

  const coder = vae(parseVaeConfig(source.config('vae')));
  source.load('vae', coder.module, device, 'float32');
  t.ok(
    deviation(namedParameters(coder.module).get('decoder.conv_out.weight')!.tensor.floats()) > 0,
    'no zeros in the VAE',
  );
  for (const tree of [net, text, coder.module]) unload(tree);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('configs as diffusers writes them read back', (t) => {
  const configs = componentConfigs(tiny);
  t.match(parseUNetConfig(configs.unet), tiny.unet);
  t.match(parseVaeConfig(configs.vae), tiny.vae);
  t.same(parseTextConfig(configs.text_encoder), tiny.text_encoder);
  t.same(parseTextConfig(configs.text_encoder_2), tiny.text_encoder_2);
  t.end();
});

test('configs of what is not built are refused, by the field', (t) => {
  const { unet: net, vae: coder } = componentConfigs(tiny);
  const other: [Record<string, unknown>, RegExp][] = [
    [{ mid_block_scale_factor: 2 }, /"mid_block_scale_factor" is 2, not 1; is this an SDXL UNet/],
    [{ use_linear_projection: false }, /"use_linear_projection" is false, not true/],
    [{ block_out_channels: undefined }, /"block_out_channels" is undefined, not a list of widths/],
    [{ up_block_types: ['UpBlock2D'] }, /"up_block_types" is \["UpBlock2D"\], not a list of 2 block types/],
    [{ attention_head_dim: [8] }, /"attention_head_dim" is \[8\], not a whole .* at least 1 or a list of 2/],
    [{ attention_head_dim: 0 }, /"attention_head_dim" is 0, not a whole number of at least 1/],
    [{ attention_head_dim: [1, 0] }, /"attention_head_dim" is \[1,0\], not/],
    [{ transformer_layers_per_block: [[1], [2]] }, /"transformer_layers_per_block" is \[\[1\],\[2\]\], not/],
    [{ block_out_channels: [16, 'x'] }, /"block_out_channels" is \[16,"x"\], not a list of widths/],
    [{ layers_per_block: 0 }, /"layers_per_block" is 0, not a whole number from 1 to 100/],
    [{ norm_eps: '1e-5' }, /"norm_eps" is "1e-5", not a number above 0/],
    [{ cross_attention_dim: null }, /"cross_attention_dim" is null, not a whole number/],
  ];
  for (const [fields, message] of other) t.throws(() => parseUNetConfig({ ...net, ...fields }), { message });
  const vaes: [Record<string, unknown>, RegExp][] = [
    [{ scaling_factor: 0 }, /vae\/config\.json: "scaling_factor" is 0, not a number above 0; is this/],
    [{ scaling_factor: null }, /"scaling_factor" is null, not a number above 0/],
    [{ act_fn: 'gelu' }, /"act_fn" is "gelu", not "silu"; use another VAE/],
    [{ latents_mean: [0, 0, 0, 0] }, /"latents_std" is undefined, not a list of a number above 0 for each/],
    [
      { latents_mean: [0, 0], latents_std: [1, 1] },
      /"latents_mean" is \[0,0\], not a list of a number for each/,
    ],
    [{ latents_mean: [0, 0, 0, 0], latents_std: [1, 1, 1, 0] }, /"latents_std" is \[1,1,1,0\]/],
    [{ norm_num_groups: 0 }, /"norm_num_groups" is 0, not a whole number of at least 1/],
    [{ block_out_channels: [] }, /"block_out_channels" is \[\], not a list of widths/],
  ];
  for (const [fields, message] of vaes)
    t.throws(() => parseVaeConfig({ ...coder, ...fields }), { name: 'UserError', message });
  t.equal(parseVaeConfig({ ...coder, sample_size: [48, 64] }).sample_size, 48, 'of a pair the first');
  t.throws(() => parseVaeConfig({}), { message: /"block_out_channels" is missing/ });
  t.end();
});
