// Every sampler against diffusers: training tables, timesteps, sigmas and whole trajectories with the stored draws.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openSafetensors } from '../io/safetensors.ts';
import { parseSchedulerConfig } from '../models/samplers/config.ts';
import { createSampler } from '../models/samplers/registry.ts';
import type { PlanOptions } from '../models/samplers/sampler.ts';
import { allClose, type GoldenCase, goldenArea, goldenFolder } from './golden.ts';

const area = goldenArea('schedulers');
const sdxl = parseSchedulerConfig(
  JSON.parse(readFileSync(join(goldenFolder, 'tiny-sdxl', 'scheduler', 'scheduler_config.json'), 'utf8')),
);

const tensorFile = join(goldenFolder, 'cases', 'schedulers.safetensors');
const { tensors } = openSafetensors(tensorFile);

/** A stored tensor, also of float64, a type checkpoints do not use and the reader therefore refuses. */
function numbers(name: string): ArrayLike<number> {
  const info = tensors.get(name)!;
  if (info.storedAs !== 'F64') return area.floats(name);
  return new Float64Array(readFileSync(tensorFile).buffer.slice(info.offset, info.offset + info.bytes));
}

/** The network every trajectory was made with. */
function model(noise: Float32Array) {
  return (x: Float32Array, timestep: number) =>
    x.map((value, i) => 0.1 * value + (0.01 * timestep) / 1000 + 0.5 * noise[i]);
}

/** A draw that hands out the stored draws one after the other. */
function storedDraws(golden: GoldenCase, size: number) {
  const stored = golden.draws ? area.floats(golden.draws as string) : new Float32Array(0);
  let at = 0;
  return { draw: () => stored.subarray(at, (at += size)), left: () => stored.length - at };
}

function runGolden(golden: GoldenCase) {
  const sampler = createSampler(golden.scheduler as string, { ...sdxl, ...golden.config });
  const custom = golden.set_timesteps as PlanOptions | undefined;
  const steps =
    (golden.num_inference_steps as number | null) ?? custom?.timesteps?.length ?? custom!.sigmas!.length - 1;
  const begin = ((golden.t_start as number | undefined) ?? 0) * sampler.order;
  const plan = sampler.plan(steps, { ...(golden.step_settings as PlanOptions), ...custom, begin });
  const [noise, modelNoise] = [area.floats(golden.inputs!.noise), area.floats(golden.inputs!.model_noise)];
  const start =
    begin > 0 ? sampler.addNoise(plan, modelNoise, noise) : noise.map((v) => v * plan.initNoiseSigma);
  const draws = storedDraws(golden, noise.length);
  const trajectory = [start];
  for (const { x } of sampler.run(plan, start, model(modelNoise), draws.draw)) trajectory.push(x);
  return { sampler, plan, trajectory, drawsLeft: draws.left() };
}

test('trajectories', (t) => {
  for (const golden of area.cases.filter((each) => each.expect.trajectory)) {
    const want = golden.expect;
    const { sampler, plan, trajectory, drawsLeft } = runGolden(golden);
    const got: Record<string, Float32Array> = {
      timesteps: plan.timesteps.subarray(plan.begin),
      sigmas: plan.sigmas,
      trajectory: Float32Array.from(trajectory.flatMap((x) => [...x])),
    };
    for (const [label, expected] of Object.entries(want))
      allClose(t, `${golden.id} ${label}`, got[label], numbers(expected.tensor), expected);
    t.equal(sampler.order, golden.order, `${golden.id} order`);
    t.equal(drawsLeft, 0, `${golden.id} uses every draw`);
    const relative = plan.initNoiseSigma / (golden.init_noise_sigma as number) - 1;
    t.ok(Math.abs(relative) < 1e-4, `${golden.id} initNoiseSigma`);
  }
  t.end();
});
