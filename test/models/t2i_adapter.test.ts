// T2I-Adapters against diffusers (golden/t2i_adapter.jsonl): whole calls, alone and with all else that draws; what has a part in a picture;
// and what is refused.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { namedParameters, parameterCount } from '../../engine/module.ts';
import { openComponent } from '../../models/checkpoint/checkpoint.ts';
import { parseT2IAdapterConfig, t2iAdapter } from '../../models/control/t2i_adapter.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenLines, maxDifference } from '../support/golden.ts';
import { at, type Call, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';
import { t2iAdapters, writeT2IAdapter } from '../support/t2i_adapter_golden.ts';

testCalls(
  goldenLines<Call>('t2i_adapter').filter(({ kind }) => kind !== undefined),
  15,
  3,
);

test("diffusers' keys, and the published adapters' size", (t) => {
  for (const { name, config, keys } of t2iAdapters) {
    const own = namedParameters(t2iAdapter(parseT2IAdapterConfig(config, name)));
    t.same(Object.fromEntries([...own].map(([key, { shape }]) => [key, shape])), keys);
  }
  const published = { adapter_type: 'full_adapter_xl', downscale_factor: 16 };
  const count = parameterCount(t2iAdapter(parseT2IAdapterConfig(published, 'x')));
  t.equal(Math.round(count / 1e6), 79, 'million parameters');
  t.end();
});

test('what has a part in a picture, and what is refused', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  const adapter = openComponent(writeT2IAdapter(at('edges'), 'edges'));
  const pipeline = pipelineOf('text2img', device, [adapter]);
  const asked = { prompt: 'a fox', width: 64, height: 64, num_inference_steps: 3 };
  const drawn = (more: object, parts: Partial<typeof pipeline> = {}) =>
    latentsOf(
      { ...pipeline, ...parts },
      {
        ...{ ...asked, adapter_image: [picture(1, 64, 64)], generators: [new TorchGenerator(1)] },
        ...more,
      },
    );
  const without = await drawn({ adapter_image: undefined }, { adapter: [] });
  t.equal(
    maxDifference(await drawn({ adapter_conditioning_factor: 0 }), without),
    0,
    'a factor of 0 is none',
  );
  t.equal(
    maxDifference(await drawn({ adapter_conditioning_factor: 0.3 }), without),
    0,
    'and one below a step',
  );
  t.equal(maxDifference(await drawn({ adapter_conditioning_scale: 0 }), without), 0);
  const [first, all] = [await drawn({ adapter_conditioning_factor: 0.4 }), await drawn({})];
  t.ok(maxDifference(first, without) > 0.1 && maxDifference(first, all) > 0.1, 'the first step of three');
  t.equal(maxDifference(await drawn({ adapter_conditioning_scale: [undefined] }), all), 0, 'a scale of 1');
  const heun = { scheduler: { name: 'HeunDiscreteScheduler' } };
  const [part, whole] = [await drawn({ ...heun, adapter_conditioning_factor: 0.7 }), await drawn(heun)];
  t.ok(maxDifference(part, whole) > 1e-3, 'a factor of 1 is of all calls, of which Heun makes five');

  for (const [more, message] of [
    [{ adapter_image: undefined }, /adapter_image has 0 pictures for 1 T2I-Adapters: give one to each/],
    [{ adapter_image: ['x.png'] }, /adapter_image is .*: give a list of pictures as readPicture gives them/],
    [{ adapter_conditioning_scale: [1, 2] }, /has 2 numbers for 1 T2I-Adapters: give one, or one to each/],
    [{ adapter_conditioning_factor: 1.5 }, /adapter_conditioning_factor is 1\.5: give a number from 0 to 1/],
    [{ width: 72 }, /sees squares of 16x16 pixels, into which 72x64 does not divide/],
  ] as const)
    await t.rejects(drawn(more), { name: 'UserError', message });
  await t.rejects(drawn({}, { adapter: [] }), { message: /1 pictures for 0 T2I-Adapters/ });
  await drawn({ last: true });
  const [{ module }] = pipeline.adapter;
  t.ok(
    [...namedParameters(module).values()].every(({ loaded }) => !loaded),
    'freed before the first step',
  );
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});
