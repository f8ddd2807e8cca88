// What clients ask `sdxl serve` before they draw: lists of what there is, each of which can be drawn with, also of a model of EDM; and its
// memory, which they free and take again.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { a1111Api } from '../../cli/serve/a1111_api.ts';
import type { HttpRequest } from '../../cli/serve/http.ts';
import type { Standing } from '../../cli/serve/messages.ts';
import { openaiApi } from '../../cli/serve/openai_api.ts';
import type { Queue } from '../../cli/serve/queue.ts';
import { servedOf } from '../../cli/serve/served.ts';
import { encodePng } from '../../io/png.ts';
import { picture } from '../support/controlnet_golden.ts';
import { writeEDM } from '../support/edm_golden.ts';
import { maxDifference, packageRoot } from '../support/golden.ts';
import { instructed } from '../support/golden_calls.ts';
import { drawers, eventually, fox, pixels, sampledTo, serve, small } from '../support/served.ts';

const inBase64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-lists-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

test('lists that programs ask for before they draw', async (t) => {
  const server = await serve(...small);
  const names = async (path: string) =>
    (await server.get(path)).body.map((each: { name: string }) => each.name);
  t.same((await server.get('/v1/models')).body.data[0].id, 'tiny-sdxl');
  t.match((await server.get('/v1/models/tiny%2Dsdxl')).body, { id: 'tiny-sdxl', object: 'model' });
  t.equal((await server.get('/v1/models/dall-e-3')).status, 404);
  t.match(await server.post('/v1/images/variations', {}), {
    status: 501,
    body: { detail: /images\/edits with a/ },
  });
  t.match(await server.post('/sdapi/v1/interrogate', {}), {
    status: 501,
    body: { detail: /not put into words/ },
  });
  t.same((await server.get('/sdapi/v1/sd-models')).body[0].title, 'tiny-sdxl');
  t.equal((await server.get('/sdapi/v1/options')).body.sd_model_checkpoint, 'tiny-sdxl');
  t.equal(
    (await server.post('/sdapi/v1/options', { sd_model_checkpoint: 'tiny-sdxl', sd_vae: 'Automatic' }))
      .status,
    200,
  );
  const samplers = await names('/sdapi/v1/samplers');
  t.ok(samplers.includes('DPM++ 2M') && samplers.includes('Euler a'));
  for (const sampler_name of samplers) {
    const { status, body } = await server.post('/sdapi/v1/txt2img', { ...fox, sampler_name });
    t.equal(status, 200, `${sampler_name} ${body.detail ?? ''}`);
  }
  t.same(await names('/sdapi/v1/loras'), []);
  t.same(await names('/sdapi/v1/upscalers'), ['None', 'Lanczos', 'Nearest']); // SillyTavern puts latent ones behind the first
  t.ok((await names('/sdapi/v1/latent-upscale-modes')).includes('Latent'));
  for (const each of ['automatic', 'sgm_uniform', 'align_your_steps', 'ddim', 'gits'])
    t.ok((await names('/sdapi/v1/schedulers')).includes(each), each);
  for (const path of [
    'hypernetworks',
    'face-restorers',
    'prompt-styles',
    'script-info',
    'realesrgan-models',
    'extensions',
  ])
    t.same((await server.get(`/sdapi/v1/${path}`)).body, []);
  t.ok((await server.get('/sdapi/v1/memory')).body.ram.total > 0);
  t.match((await server.get('/controlnet/control_types')).body.control_types, { All: { model_list: [] } });
  t.match(await (await fetch(server.url)).text(), /<title>sdxl/, 'a page');
  t.equal(await server.end(), 143);
});

test('models that are unloaded and opened again', async (t) => {
  const server = await serve(...small);
  const before = drawers();
  t.equal((await server.post('/sdapi/v1/unload-checkpoint', {})).status, 200);
  await eventually(async () => drawers().length === 0);
  const reloading = server.post('/sdapi/v1/reload-checkpoint', {});
  await eventually(async () => drawers().length === 1);
  await server.post('/sdapi/v1/unload-checkpoint', {});
  t.match(await reloading, { status: 503, body: { detail: /unloaded while they were opened/ } });
  t.equal((await server.post('/sdapi/v1/reload-checkpoint', {})).status, 200);
  t.equal(drawers().length, 1, 'the model is open again');
  t.notSame(drawers(), before);
  t.equal(await server.end(), 143);
});

test('a model of EDM takes the samplers that there are for it by the names of others', async (t) => {
  const server = await serve(...small, '--model', writeEDM(join(folder, 'playground'), 'playground'));
  const samplers = (await server.get('/sdapi/v1/samplers')).body.map((each: { name: string }) => each.name);
  t.same(samplers, ['Euler', 'DPM++ 2M']);
  for (const [sampler_name, scheduler] of [
    ['Euler', 'edm_euler'],
    ['DPM++ 2M', 'edm_dpm++2m_karras'],
    ['DPM++ 2M SDE', 'edm_dpm++2m_sde_exponential'],
  ]) {
    const { status, body } = await server.post('/sdapi/v1/txt2img', { ...fox, sampler_name });
    t.equal(status, 200, body.detail);
    const typed = await sampledTo(
      join(folder, 'sampled.png'),
      ...[...small, '--model', join(folder, 'playground'), '--prompt', fox.prompt, '--seed', '5'],
      ...['--scheduler', scheduler, '--emphasis', 'original', '--max-token-length', '225'],
    );
    t.equal(maxDifference((await pixels(body.images[0])).data, typed.picture.data), 0, sampler_name);
  }
  const other = await server.post('/sdapi/v1/txt2img', { ...fox, sampler_name: 'DDIM' });
  t.equal(other.status, 400);
  t.match(other.body.detail, /DDIMScheduler draws nothing but noise/);
  t.equal(await server.end(), 143);
});

test('an InstructPix2Pix model edits, and no strength is put on it that was not sent', async (t) => {
  const server = await serve(...small, '--model', instructed);
  const image = inBase64(encodePng(picture(4, 64, 64)));
  const over = await server.post('/sdapi/v1/img2img', { ...fox, init_images: [image] });
  t.equal(over.status, 200, over.body.detail);
  const strong = await server.post('/sdapi/v1/img2img', {
    ...{ ...fox, init_images: [image], denoising_strength: 0.5 },
  });
  t.match(
    strong.body.detail,
    /InstructPix2Pix model, .* takes no strength \(denoising_strength\): leave it out/,
  );
  t.equal(await server.end(), 143);
});

test('what runs have made is called as the runs', (t) => {
  const flags = { model: 'runs/castle/final', controlnet: ['runs/edges/final:0.5', 'runs/depth/final'] };
  const served = servedOf(flags as Standing, {}, () => {});
  t.equal(served.name, 'castle');
  t.same([...served.followed.keys()], ['edges', 'depth']);
  t.end();
});

test('a page tells of every route', async (t) => {
  const text = readFileSync(join(packageRoot, 'docs', 'serve.md'), 'utf8');
  const served = {
    ...{
      name: 'ID',
      loras: () => [],
      embeddings: new Map([['toy', 3]]),
      followed: new Map(),
      networks: new Map(),
    },
    ...{ texts: {}, tellIgnored() {} },
  };
  const routes = Object.keys({ ...openaiApi(served, {} as Queue), ...a1111Api(served, {} as Queue) });
  for (const route of routes) t.ok(text.includes(`\`${route}\``), route);

  const asked = { url: new URL('http://localhost/?skip_current_image=true') } as HttpRequest;
  const told = async (path: string, queue: Partial<Queue> = {}) =>
    ((await a1111Api(served, queue as Queue)[`GET /sdapi/v1/${path}`](asked)) as { json: unknown }).json;
  t.match(await told('embeddings'), { loaded: { toy: { vectors: 3 } }, skipped: {} });
  for (const [settings, job] of [
    [{}, 'txt2img'],
    [{ image: 'init_images' }, 'img2img'],
  ] as const) {
    const working = { order: { settings, pictures: {} }, share: 0.5, step: 2, steps: 4, began: 0 };
    const state = await told('progress', { working: () => working, waiting: () => 0 });
    t.match(state, {
      progress: 0.5,
      state: { job, job_count: 1, sampling_step: 2, job_timestamp: /^20\d{12}$/ },
    });
  }
});
