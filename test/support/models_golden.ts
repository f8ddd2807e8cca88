// What the tests of the models share: golden NCHW tensors as ours and back, scaled parameters, every submodule's output by
// its path, and gradients by parameter name.
import { join } from 'node:path';
import { type Device, openDevice } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, noGrad, requireGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, type Parameter, unload, watchCalls } from '../../engine/module.ts';
import { cast } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import { toDevice, toHost } from '../../models/vae/latents.ts';
import { openGpu } from '../gpu/device.ts';
import { type Assert, allClose, type GoldenArea, type GoldenCase, goldenFolder, permuted } from './golden.ts';
import { relativeError } from './op_cases.ts';

/** After the test file's name `--device=cuda:0` runs it on that GPU alone; gpu/run.ts does so. */
const named = process.argv.find((arg) => arg.startsWith('--device='))?.slice('--device='.length);

/** The best device of this machine, and the loops that define the ops; or the one that the command line names. */
export const devices: readonly Device[] = named
  ? [openGpu(named).device]
  : [...new Set([openDevice('auto'), openDevice('reference')])];

/** A golden picture or latent [n, c, h, w] as our [n, h, w, c]. */
export const image = (area: GoldenArea, name: string, device: Device): Tensor =>
  toDevice({ shape: area.shape(name), data: area.floats(name) }, device, 'float32');

export const plain = (area: GoldenArea, name: string, device: Device): Tensor =>
  tensor(area.floats(name), area.shape(name), { device, dtype: area.dtype(name) });

/** What a case of the UNet is called with: `sample`, `timesteps` (stored for each row, or one for all) and `conditioning`. */
export function unetInputs(area: GoldenArea, c: GoldenCase, device: Device) {
  const names = c.inputs as Record<string, string>;
  const n = area.shape(names.sample)[0];
  const times = area.floats(names.timestep);
  return {
    sample: image(area, names.sample, device),
    timesteps: tensor(
      Float32Array.from({ length: n }, (_, i) => times[times.length === 1 ? 0 : i]),
      [n],
      { device },
    ),
    conditioning: {
      context: plain(area, names.encoder_hidden_states, device),
      textEmbeds: plain(area, names.text_embeds, device),
      timeIds: plain(area, names.time_ids, device),
    },
  };
}

/** What may become of a golden UNet before and after its weights are loaded. */
interface Made {
  made?(model: UNet): void;
  loaded?(model: UNet): void;
}

/** The error of a golden UNet's output in `dtype`, of diffusers' in float32, as a relative root mean square. */
export function unetError(area: GoldenArea, c: GoldenCase, dtype: FloatDType, { made, loaded }: Made = {}) {
  const [device] = devices;
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const model = unet(parseUNetConfig(source.config('unet')));
  made?.(model);
  source.load('unet', model, device, dtype);
  loaded?.(model);
  const error = noGrad(() =>
    scope(() => {
      const { sample, timesteps, conditioning } = unetInputs(area, c, device);
      const { context, textEmbeds, timeIds } = conditioning;
      const inType = { context: cast(context, dtype), textEmbeds: cast(textEmbeds, dtype), timeIds };
      const y = toHost(model(cast(sample, dtype), timesteps, inType));
      return relativeError(y.data, area.floats(c.expect.sample.tensor));
    }),
  );
  unload(model);
  return error;
}

/** Numbers in the golden order: [n, h, w, c] becomes [n, c, h, w], other ranks are as they are. */
const goldenOrder = (t: Tensor): Float32Array => (t.shape.length === 4 ? toHost(t).data : t.floats());

/** Compares a tensor of ours with what a case expects under `label`. */
export function compare(
  t: Assert,
  area: GoldenArea,
  c: GoldenCase,
  label: string,
  got: Tensor | Float32Array,
): void {
  const want = c.expect[label];
  const values = got instanceof Tensor ? goldenOrder(got) : got;
  allClose(t, `${c.id} ${label}`, values, area.floats(want.tensor), want);
}

/** Compares what a UNet makes of a case's inputs with the `sample` that it expects. */
export function compareSample(t: Assert, area: GoldenArea, c: GoldenCase, model: UNet, device: Device): void {
  scope(() => {
    const { sample, timesteps, conditioning } = unetInputs(area, c, device);
    compare(
      t,
      area,
      c,
      'sample',
      noGrad(() => model(sample, timesteps, conditioning)),
    );
  });
}

/** Some cases scale the weights whose names match, so that an epsilon in a norm shows. */
export function scaleParameters(module: AnyModule, c: GoldenCase): void {
  const scaling = c.scale_parameters as { matching: string; count: number; by: number } | undefined;
  if (!scaling) return;
  const named = [...namedParameters(module)].filter(([name]) => new RegExp(scaling.matching).test(name));
  if (named.length !== scaling.count)
    throw new Error(`${c.id}: ${named.length} parameters match, ${scaling.count} should`);
  for (const [, p] of named) {
    const scaled = p.tensor.floats().map((x) => x * scaling.by);
    p.tensor.upload(new Uint8Array(scaled.buffer));
  }
}

/**
 * A call's output without what we fold into it and diffusers adds outside: the residual (by this name, or a further argument
 * of the output's shape) and the time embedding's shift of each channel.
 */
function alone(output: Tensor, args: readonly unknown[]): Float32Array {
  const [, ...more] = args.flatMap((arg) =>
    arg && Object.getPrototypeOf(arg) === Object.prototype ? Object.entries(arg) : [['', arg]],
  );
  const values = output.floats();
  const channels = output.shape.at(-1) as number;
  for (const [name, extra] of more) {
    if (!(extra instanceof Tensor)) continue;
    const outside = extra.floats();
    if ((name === '' || name === 'residual') && extra.shape.join() === output.shape.join())
      for (let i = 0; i < values.length; i++) values[i] -= outside[i];
    else if (name === 'shift') {
      const each = output.size / output.shape[0];
      for (let i = 0; i < values.length; i++)
        values[i] -= outside[Math.floor(i / each) * channels + (i % channels)];
    }
  }
  const [n, h, w, c] = output.shape;
  return output.shape.length === 4 ? permuted(values, [n, h, w, c], [0, 3, 1, 2]) : values;
}

/** Norms into which we fold the SiLU that follows; its slope is at most 1.1, and so is what an error grows by. */
const withSilu = /(resnets\.\d+\.norm[12]|conv_norm_out)$/;

/** Runs `forward` and compares every submodule's output that the case expects, in order of execution. Returns their paths. */
export function checkActivations(
  t: Assert,
  area: GoldenArea,
  c: GoldenCase,
  forward: () => unknown,
): Set<string> {
  const seen = new Set<string>();
  watchCalls((path, output, args) => {
    const want = c.expect[path];
    if (!want || !(output instanceof Tensor)) return;
    seen.add(path);
    const silu = withSilu.test(path);
    const values = area.floats(want.tensor);
    const expected = silu ? values.map((x) => x / (1 + Math.exp(-x))) : values;
    allClose(t, `${c.id} ${path}`, alone(output, args), expected, {
      ...want,
      atol: want.atol * (silu ? 1.1 : 1),
    });
  }, forward);
  return seen;
}

const checkpointLayout = (p: Parameter, values: Float32Array): Float32Array =>
  p.layout === 'conv' ? permuted(values, p.memoryShape, [0, 3, 1, 2]) : values;

/**
 * Walks back from loss() and compares what the case expects: the loss, `d_<input>` of each leaf, the norms of all
 * parameters' gradients, and those that it holds in full.
 */
export function checkGradients(
  t: Assert,
  area: GoldenArea,
  c: GoldenCase,
  module: AnyModule,
  leaves: Record<string, Tensor>,
  loss: () => Tensor,
): void {
  const parameters = namedParameters(module);
  const all = [...[...parameters.values()].map((p) => p.tensor), ...Object.values(leaves)];
  for (const leaf of all) requireGrad(leaf);
  scope(() => {
    const value = loss();
    if (c.expect.loss) compare(t, area, c, 'loss', value);
    backward(value);
  });
  for (const [name, leaf] of Object.entries(leaves))
    scope(() => compare(t, area, c, `d_${name}`, gradOf(leaf) as Tensor));
  const named = new Map(
    [...parameters].map(([name, p]) => {
      const values = scope(() => gradOf(p.tensor)?.floats());
      return [name, values && checkpointLayout(p, values)];
    }),
  );
  const names = c.parameter_names as string[];
  const norms = Float32Array.from(names, (name) => norm(named.get(name) ?? new Float32Array([Number.NaN])));
  compare(t, area, c, 'grad_norms', norms);
  const reached = [...named].filter(([, values]) => values && norm(values) > 0).map(([name]) => name);
  const unlisted = reached.filter((name) => !names.includes(name));
  t.ok(unlisted.length === 0, `${c.id}: no other parameter has a gradient (${unlisted})`);
  for (const label of Object.keys(c.expect).filter((each) => each.startsWith('grad.')))
    compare(t, area, c, label, named.get(label.slice('grad.'.length)) ?? new Float32Array(0));
  for (const leaf of all) clearGrad(leaf);
}

const norm = (values: Float32Array): number => Math.sqrt(values.reduce((total, x) => total + x * x, 0));
