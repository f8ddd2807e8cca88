// IP-Adapters from a small hub of our own, with the layout of h94/IP-Adapter: what is downloaded, and what cannot be had.
import { createHash } from 'node:crypto';
import { cpSync, existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { locateIPAdapter } from '../models/locate_ip_adapter.ts';
import { encoderConfig, writeEncoder, writeIPAdapter } from './ip_adapter_golden.ts';

const commit = '0123456789abcdef0123456789abcdef01234567';

/** The files of `folder`/repo as h94/IP-Adapter on the hub, with an empty cache beside it; gives the paths that are asked for. */
async function hubOf(t: Test, folder: string): Promise<string[]> {
  const asked: string[] = [];
  const repo = join(folder, 'repo');
  const files = readdirSync(repo, { recursive: true, encoding: 'utf8' }).filter((name) =>
    statSync(join(repo, name)).isFile(),
  );
  const siblings = files.map((rfilename) => {
    const bytes = readFileSync(join(repo, rfilename));
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    return { rfilename, size: bytes.length, blobId: sha256.slice(24), lfs: { sha256, size: bytes.length } };
  });
  const server = createServer((request, response) => {
    const path = request.url?.split(`/resolve/${commit}/`)[1];
    if (path) asked.push(path);
    if (path) response.end(readFileSync(join(repo, path)));
    else response.end(JSON.stringify({ sha: commit, siblings }));
  });
  await new Promise<void>((ready) => server.listen(0, '127.0.0.1', ready));
  t.teardown(() => {
    server.closeAllConnections();
    server.close();
  });
  const { port } = server.address() as AddressInfo;
  Object.assign(process.env, {
    HF_ENDPOINT: `http://127.0.0.1:${port}`,
    HF_HUB_CACHE: join(folder, 'cache'),
  });
  return asked;
}

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
