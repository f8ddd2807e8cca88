// LoRAs from a small hub of our own: which file of a repository is taken, and what cannot be had.
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'tap';
import { readPicture } from '../io/image.ts';
import { locateLora } from '../models/locate_lora.ts';
import { sdxl } from './command_line.ts';
import { goldenFolder, goldenLora } from './golden.ts';
import { hubOf } from './small_hub.ts';

const golden = goldenLora('lora/scaled_kohya.safetensors');

test('an adapter of the hub', async (t) => {
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
