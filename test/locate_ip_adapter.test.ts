// IP-Adapters from a small hub of our own, with the layout of h94/IP-Adapter: what is downloaded, and what cannot be had.
import { cpSync, existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { locateImageEncoder, locateIPAdapter } from '../models/locate_ip_adapter.ts';
import { encoderConfig, writeEncoder, writeIPAdapter } from './ip_adapter_golden.ts';
import { hubOf } from './small_hub.ts';

test('the adapter, and of two vision encoders the one of its width', async (t) => {
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

test('a repository without an adapter', async (t) => {
  await hubOf(t, t.testdir({ repo: { 'config.json': '{}' } }));
  await t.rejects(locateIPAdapter('h94/IP-Adapter'), {
    message: /h94\/IP-Adapter on the hub has no IP-Adapter; give/,
  });
});
