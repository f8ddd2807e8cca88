// What of a model is on the device while `sdxl sample` draws, and that pictures come where there is no memory to decode beside the UNet.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openFor } from '../../cli/sample/models.ts';
import type { SampleOptions } from '../../cli/sample/options.ts';
import { adopt, openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { complete, type Request } from '../../models/request.ts';
import { textKey } from '../../models/text/conditioning.ts';
import { sdxl } from '../support/command_line.ts';
import { watchMemory } from '../support/crowded_memory.ts';
import { goldenFolder } from '../support/golden.ts';
import { noLibrary, ownDevice } from '../support/native_library.ts';

const model = join(goldenFolder, 'tiny-sdxl');

test('the text encoders are gone before the UNet comes, unless there are too many prompts to keep', async (t) => {
  const device = openDevice('auto');
  const before = device.memory.storages;
  const parts: string[] = [];
  const timed = async <R>(part: string, fn: () => R) => {
    parts.push(part);
    return fn();
  };
  const options = { vaeDtype: 'auto', q8: false } as unknown as SampleOptions;
  const place = { options, device, dtype: 'float32' as const, tell() {}, timed };
  const request = (prompt: string): Request => complete({ ratio: 8, sampleSize: 64 }, { prompt });
  const asked = ['a fox', 'a hare', 'a fox'].map(request);
  const few = await openFor(openModel(model), [{ options, requests: asked }], place);
  const loaded = ({ text, unet, vae }: typeof few) => {
    return [...text.encoders.map(({ encoder }) => encoder), unet, vae.module].map(
      (module) => [...namedParameters(module).values()][0].loaded,
    );
  };
  t.same(loaded(few), [false, false, true, true]);
  t.same(parts, ['load', 'sample', 'load']);
  const [a, b, again] = asked.map((each) => few.text.encoded?.get(textKey(each, true)));
  t.ok(a && a === again && b && a !== b, 'each prompt is encoded');
  t.equal(few.text.encoded?.size, 2, 'the same one once');
  few.release();
  const many = Array.from({ length: 1001 }, (_, i) => request(`fox ${i}`));
  const all = await openFor(openModel(model), [{ options, requests: many }], place);
  t.same(loaded(all), [true, true, true, true]);
  t.equal(all.text.encoded, undefined);
  all.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('where there is no memory to decode beside the UNet, pictures come when all are sampled', {
  skip: noLibrary,
}, async (t) => {
  const device = adopt(ownDevice());
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-waiting-'));
  const draw = async (name: string, ...more: string[]) => {
    const { status, err } = await sdxl(
      ...[
        'sample',
        '--model',
        model,
        '--prompt',
        'a fox',
        '--width',
        '128',
        '--height',
        '128',
        '--steps',
        '2',
      ],
      ...[
        '--seed',
        '4',
        '--batch-count',
        '3',
        '--device',
        'cpu',
        '--output',
        join(folder, `${name}.png`),
        ...more,
      ],
    );
    return { status, err, pictures: [0, 1, 2].map((i) => readFileSync(join(folder, `${name}-${i}.png`))) };
  };
  const watched = watchMemory(device);
  const whole = await draw('whole');
  t.notMatch(whole.err, /no memory/);
  // What is alive when the VAE's largest tensors are wanted: for the last of three pictures without the UNet.
  const { alive } = watched;
  watched.room = Math.max(...alive.slice((-1 / 3) * alive.length));
  t.ok(watched.room < Math.max(...alive) - 1e6, 'by then the UNet has gone');
  const waiting = await draw('waiting');
  t.equal(waiting.status, 0, waiting.err);
  t.equal(
    waiting.err.match(/warning: there is no memory to decode beside the UNet/g)?.length,
    1,
    'told once',
  );
  t.same(waiting.pictures, whole.pictures);
  adopt(ownDevice());
  rmSync(folder, { recursive: true });
});
