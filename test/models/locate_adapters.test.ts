// Adapters from a small hub of our own, LoRAs, and IP-Adapters in the layout of h94/IP-Adapter: which files of a repository are taken, and
// what cannot be had.
import { copyFileSync, cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'tap';
import { readPicture } from '../../io/image.ts';
import { locateImageEncoder, locateIPAdapter } from '../../models/locate/locate_ip_adapter.ts';
import { locateLora } from '../../models/locate/locate_lora.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLora } from '../support/golden.ts';
import { encoderConfig, writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import { hubOf } from '../support/small_hub.ts';

const golden = goldenLora('lora/scaled_kohya.safetensors');

test('a LoRA of the hub', async (t) => {
  const folder = t.testdir({ repo: { more: {} } });
  const at = (name: string): string => join(folder, 'repo', name);
  const usual = 'pytorch_lora_weights.safetensors';
  for (const name of [usual, 'other.safetensors']) copyFileSync(golden, at(name));
  copyFileSync(goldenLora('lora/scaled_sgm.safetensors'), at('more/deep.safetensors'));
  writeFileSync(at('README.md'), 'of no interest');
  const asked = await hubOf(t, folder);
  const told: string[] = [];
  const found = await locateLora('owner/name', { onProgress: (path) => told.push(path) });
  t.same(asked, [usual], 'the one that diffusers names');
  t.same([...new Set(told)], ['owner/name']);
  t.same(readFileSync(found), readFileSync(golden));
  t.match(await locateLora('owner/name/more/deep.safetensors'), /more.deep\.safetensors$/);
  t.same(asked.length, 2);
  await t.rejects(locateLora('owner/name/absent.safetensors'), {
    name: 'UserError',
    message: /^owner\/name on the hub has no absent\.safetensors; give a \.safetensors or \.gguf file/,
  });
  await t.rejects(locateLora('owner/name.safetensors'), {
    message: /^no LoRA at owner\/name\.safetensors; give/,
  });
  t.equal(asked.length, 2, 'a mistaken path is not asked for');
});

test('another name, peft, and several', async (t) => {
  const folder = t.testdir({ repo: {} });
  const at = (name: string): string => join(folder, 'repo', name);
  for (const name of ['a.safetensors', 'b.safetensors', 'adapter_model.safetensors'])
    copyFileSync(golden, at(name));
  writeFileSync(at('adapter_config.json'), '{}');
  const asked = await hubOf(t, folder);
  await locateLora('peft/one');
  t.same(asked.sort(), ['adapter_config.json', 'adapter_model.safetensors']);
  rmSync(at('adapter_model.safetensors'));
  mkdirSync(at('step-5'));
  copyFileSync(golden, at('step-5/adapter_model.safetensors'));
  writeFileSync(at('step-5/adapter_config.json'), '{ "lora_alpha": 2 }');
  const deep = await hubOf(t, folder);
  const file = await locateLora('peft/deep/step-5/adapter_model.safetensors');
  t.same(deep.sort(), ['step-5/adapter_config.json', 'step-5/adapter_model.safetensors']);
  t.match(readFileSync(join(dirname(file), 'adapter_config.json'), 'utf8'), /2/, 'alpha, beside its file');
  rmSync(at('step-5'), { recursive: true });
  const again = await hubOf(t, folder);
  await t.rejects(locateLora('several/ones'), {
    message:
      /^several\/ones has several files of weights: give one of them, several\/ones\/a\.safetensors or several\/ones\/b/,
  });
  t.same(again, []);
  for (const name of ['a.safetensors', 'b.safetensors']) rmSync(at(name));
  await hubOf(t, folder);
  await t.rejects(locateLora('only/config'), { message: /^only\/config on the hub has no LoRA; give/ });
});

test('sdxl sample --lora OWNER/NAME:SCALE', async (t) => {
  const folder = t.testdir({ repo: {} });
  copyFileSync(golden, join(folder, 'repo', 'style.safetensors'));
  const asked = await hubOf(t, folder);
  const output = join(folder, 'out.png');
  const drawn = async (lora: string) => {
    const { status, err } = await sdxl(
      ...[
        'sample',
        '--model',
        join(goldenFolder, 'tiny-sdxl'),
        '--prompt',
        'a fox',
        '--seed',
        '1',
        '--quiet',
      ],
      ...['--width', '64', '--height', '64', '--steps', '1', '--lora', lora, '--output', output],
    );
    t.equal(status, 0, err);
    return (await readPicture(output)).data;
  };
  t.same(await drawn('owner/style:0.5'), await drawn(`${golden}:0.5`));
  t.same(asked, ['style.safetensors']);
});

test('an IP-Adapter, and of two vision encoders the one of its width', async (t) => {
  const folder = t.testdir({ repo: { sdxl_models: {}, models: {} } });
  const at = (name: string): string => join(folder, 'repo', name);
  // "Plus" reads hidden states; of the encoder beside it these are of another width.
  writeEncoder(at('models/image_encoder'));
  writeEncoder(at('sdxl_models/image_encoder'), { ...encoderConfig, hidden_size: 24 });
  writeFileSync(at('models/image_encoder/pytorch_model.bin'), '');
  writeIPAdapter(at('sdxl_models/ip-adapter_sdxl.safetensors'), 'plain');
  writeIPAdapter(at('sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors'), 'plus');
  cpSync(at('sdxl_models/ip-adapter_sdxl.safetensors'), at('models/ip-adapter_sd15.safetensors'));
  const [plain, plus] = ['ip-adapter_sdxl', 'ip-adapter-plus_sdxl_vit-h'].map(
    (name) => `sdxl_models/${name}.safetensors`,
  );

  const asked = await hubOf(t, folder);
  const told: string[] = [];
  const found = await locateIPAdapter(`h94/IP-Adapter/${plus}`, { onProgress: (path) => told.push(path) });
  t.match(found.path, new RegExp(`${plus}$`));
  t.match(found.imageEncoder.path, /[^_]models.image_encoder$/);
  const both = ['sdxl_models/image_encoder/config.json', 'models/image_encoder/config.json'];
  t.same(asked, [plus, ...both, 'models/image_encoder/model.safetensors']);
  t.same([...new Set(told)], [`h94/IP-Adapter/${plus}`, 'h94/IP-Adapter/models/image_encoder']);
  asked.length = 0;
  const other = await locateIPAdapter(`h94/IP-Adapter/${plain}`);
  t.match(other.imageEncoder.path, /sdxl_models.image_encoder$/);
  t.same(asked, [plain, 'sdxl_models/image_encoder/model.safetensors']);
  t.ok(existsSync(join(other.imageEncoder.path, 'model.safetensors')));

  asked.length = 0;
  for (const place of ['models/image_encoder', 'models']) {
    const encoder = await locateImageEncoder(`h94/IP-Adapter/${place}`);
    t.match(encoder.path, /[^_]models.image_encoder$/);
    t.equal(encoder.config('image_encoder').hidden_size, 48);
  }
  t.same(asked, [], 'it is there already');
  await t.rejects(locateImageEncoder('h94/IP-Adapter/elsewhere'), {
    name: 'UserError',
    message: /h94\/IP-Adapter on the hub has no image encoder in elsewhere; give the folder of a CLIPVision/,
  });

  await t.rejects(locateIPAdapter('h94/IP-Adapter/sdxl_models/none.safetensors'), {
    name: 'UserError',
    message: /h94\/IP-Adapter on the hub has no sdxl_models\/none\.safetensors; give an IP-Adapter's/,
  });
  await t.rejects(locateIPAdapter('h94/IP-Adapter'), {
    message: /h94\/IP-Adapter has several IP-Adapters: give one of them, .*ip-adapter_sdxl\.safetensors/,
  });
});

test('a repository without an IP-Adapter', async (t) => {
  await hubOf(t, t.testdir({ repo: { 'config.json': '{}' } }));
  await t.rejects(locateIPAdapter('h94/IP-Adapter'), {
    message: /h94\/IP-Adapter on the hub has no IP-Adapter; give/,
  });
});
