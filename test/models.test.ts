// The models against diffusers' numbers (golden areas unet, unet_refiner, vae, text): outputs, single activations through
// the output, gradients of every parameter. Golden tensors are NCHW; ours are channels last.
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../engine/device.ts';
import { backward, clearGrad, gradOf, noGrad, requireGrad } from '../engine/grad.ts';
import { type AnyModule, namedParameters, type Parameter, unload } from '../engine/module.ts';
import { mse } from '../engine/ops/loss.ts';
import { scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import { openModel } from '../models/checkpoint.ts';
import { parseTextConfig, textEncoder } from '../models/clip.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { parseVaeConfig, vae } from '../models/vae.ts';
import { allClose, type GoldenArea, type GoldenCase, goldenArea, goldenFolder } from './golden.ts';

const device = openDevice('auto');

const permuted = (
  values: ArrayLike<number>,
  [n, c, h, w]: readonly number[],
  toChannelsLast: boolean,
): Float32Array => {
  const out = new Float32Array(values.length);
  for (let i = 0; i < n; i++)
    for (let k = 0; k < c; k++)
      for (let p = 0; p < h * w; p++) {
        const [first, last] = [(i * c + k) * h * w + p, (i * h * w + p) * c + k];
        if (toChannelsLast) out[last] = values[first];
        else out[first] = values[last];
      }
  return out;
};

/** A golden picture or latent [n, c, h, w] as our [n, h, w, c] tensor. */
function image(area: GoldenArea, name: string): Tensor {
  const [n, c, h, w] = area.shape(name);
  return tensor(permuted(area.floats(name), [n, c, h, w], true), [n, h, w, c], { device });
}

const plain = (area: GoldenArea, name: string): Tensor =>
  tensor(area.floats(name), area.shape(name), { device });

/** Our [n, h, w, c] as golden's NCHW numbers. */
const nchw = (t: Tensor): Float32Array =>
  permuted(t.floats(), [t.shape[0], t.shape[3], t.shape[1], t.shape[2]], false);

const checkpointLayout = (p: Parameter, values: Float32Array): Float32Array => {
  const [o, i, kh, kw] = p.shape;
  return p.layout === 'conv' ? permuted(values, [o, i, kh, kw], false) : values;
};

/** Some cases scale the weights whose names match, so that an epsilon in a norm shows. */
function scaleParameters(module: AnyModule, c: GoldenCase): void {
  const scaling = c.scale_parameters as { matching: string; count: number; by: number } | undefined;
  if (!scaling) return;
  const named = [...namedParameters(module)].filter(([name]) => new RegExp(scaling.matching).test(name));
  if (named.length !== scaling.count)
    throw new Error(`${c.id}: ${named.length} parameters match, ${scaling.count} should`);
  for (const [, p] of named) {
    const bytes = p.tensor.floats().map((x) => x * scaling.by);
    p.tensor.upload(new Uint8Array(bytes.buffer));
  }
}

for (const [areaName, folder] of [
  ['unet', 'tiny-sdxl'],
  ['unet_refiner', 'tiny-sdxl-refiner'],
] as const) {
  test(areaName, (t) => {
    const area = goldenArea(areaName);
    const source = openModel(join(goldenFolder, folder));
    const before = device.memory.storages;
    for (const c of area.cases) {
      const model = unet(parseUNetConfig(source.config('unet')));
      source.load('unet', model, device, 'float32');
      scaleParameters(model, c);
      const inputs = c.inputs as Record<string, string>;
      const run = () => {
        const n = area.shape(inputs.sample)[0];
        const times = area.floats(inputs.timestep);
        const timesteps = Float32Array.from({ length: n }, (_, i) => times[times.length === 1 ? 0 : i]);
        return model(image(area, inputs.sample), tensor(timesteps, [n], { device }), {
          context: plain(area, inputs.encoder_hidden_states),
          textEmbeds: plain(area, inputs.text_embeds),
          timeIds: plain(area, inputs.time_ids),
        });
      };
      if (c.id === 'gradients')
        checkGradients(t, area, c, model, () => mse(run(), image(area, inputs.target)));
      else {
        const [label, expected] =
          Object.entries(c.expect).find(([name]) => name === 'sample' || name === 'conv_out') ?? [];
        const got = noGrad(() => scope(() => nchw(run())));
        t.ok(expected, `${areaName} ${c.id} has an expected output`);
        if (expected)
          allClose(t, `${areaName} ${c.id} ${label}`, got, area.floats(expected.tensor), expected);
      }
      unload(model);
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

function checkGradients(
  t: { ok(value: unknown, message: string): unknown },
  area: GoldenArea,
  c: GoldenCase,
  model: AnyModule,
  loss: () => Tensor,
): void {
  const parameters = namedParameters(model);
  for (const p of parameters.values()) requireGrad(p.tensor);
  const value = scope(() => {
    const l = loss();
    backward(l);
    return l.floats();
  });
  allClose(t, `${c.id} loss`, value, area.floats(c.expect.loss.tensor), c.expect.loss);
  const gradients = new Map(
    [...parameters].map(([name, p]) => {
      const gradient = scope(() => gradOf(p.tensor)?.floats()) ?? new Float32Array(p.size);
      return [name, checkpointLayout(p, gradient)];
    }),
  );
  const names = (c.parameter_names ?? [...parameters.keys()].sort()) as string[];
  const norms = Float64Array.from(names, (name) =>
    Math.hypot(...chunked(gradients.get(name) as Float32Array)),
  );
  if (c.expect.grad_norms)
    allClose(
      t,
      `${c.id} gradient norms`,
      norms,
      area.floats(c.expect.grad_norms.tensor),
      c.expect.grad_norms,
    );
  for (const [label, expected] of Object.entries(c.expect)) {
    const name = label.replace(/^grad\./, '');
    const got = gradients.get(name);
    if (label.startsWith('grad.') && got)
      allClose(t, `${c.id} ${label}`, got, area.floats(expected.tensor), expected);
  }
  for (const p of parameters.values()) clearGrad(p.tensor);
}

/** Math.hypot takes few arguments: partial norms of slices first. */
function chunked(values: Float32Array): number[] {
  const out: number[] = [];
  for (let i = 0; i < values.length; i += 4096)
    out.push(Math.sqrt(values.subarray(i, i + 4096).reduce((s, x) => s + x * x, 0)));
  return out;
}

test('vae', (t) => {
  const area = goldenArea('vae');
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const before = device.memory.storages;
  for (const c of area.cases) {
    const inputs = c.inputs ?? {};
    const model = vae(parseVaeConfig(source.config('vae')));
    if (!inputs.image && !inputs.z) continue;
    if (c.id === 'gradients') continue;
    source.load('vae', model.module, device, 'float32');
    scaleParameters(model.module, c);
    const tiling = c.id.startsWith('tiled');
    noGrad(() =>
      scope(() => {
        const { moments, image: decoded } = c.expect;
        if (inputs.image && moments) {
          const { mean, logvar } = model.encode(image(area, inputs.image), { tiling });
          const [n, h, w, k] = mean.shape;
          const both = new Float32Array(2 * mean.size);
          const [m, v] = [nchw(mean), nchw(logvar)];
          for (let i = 0; i < n; i++) {
            both.set(m.subarray(i * k * h * w, (i + 1) * k * h * w), 2 * i * k * h * w);
            both.set(v.subarray(i * k * h * w, (i + 1) * k * h * w), (2 * i + 1) * k * h * w);
          }
          allClose(t, `vae ${c.id} moments`, both, area.floats(moments.tensor), moments);
        }
        if (inputs.z && decoded) {
          allClose(
            t,
            `vae ${c.id} image`,
            nchw(model.decode(image(area, inputs.z), { tiling })),
            area.floats(decoded.tensor),
            decoded,
          );
        }
      }),
    );
    unload(model.module);
  }
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('text encoders', (t) => {
  const area = goldenArea('text');
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const before = device.memory.storages;
  for (const component of ['text_encoder', 'text_encoder_2']) {
    const config = parseTextConfig(source.config(component));
    const encoder = textEncoder(config);
    source.load(component, encoder, device, 'float32');
    const c = area.cases.find(({ id }) => id === `${component}_forward`) as GoldenCase;
    noGrad(() =>
      scope(() => {
        const name = (c.inputs as Record<string, string>).ids;
        const ids = tensor(area.floats(name), area.shape(name), { device, dtype: 'int32' });
        for (const [label, expected] of Object.entries(c.expect)) {
          const layer = /^hidden_states\.(\d+)$/.exec(label)?.[1];
          if (layer !== undefined) {
            const { hidden } = encoder(ids, { layer: Number(layer), pooled: false });
            allClose(t, `${component} ${label}`, hidden.floats(), area.floats(expected.tensor), expected);
          } else if (label === 'text_embeds') {
            const { pooled } = encoder(ids, { layer: -2, pooled: true });
            allClose(
              t,
              `${component} ${label}`,
              (pooled as Tensor).floats(),
              area.floats(expected.tensor),
              expected,
            );
          }
        }
      }),
    );
    unload(encoder);
  }
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});
