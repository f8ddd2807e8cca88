// Erased Stable Diffusion (ESD, Gandikota et al. 2023): under captions that name a concept the network is to say what the model, as it was
// loaded, says without one, and to keep away from the concept as guidance would go to it: e(x) - eta (e(x, c) - e(x)), eta being
// `esd.negative_guidance`. Theirs, and diffengine's, has the network draw x halfway for each pass. Here x is a picture of the dataset under
// noise, which is the same where the model has drawn these pictures of the concept before: so passes are like all others.
import { sub } from '../../engine/ops/binary.ts';
import { cast, scale } from '../../engine/ops/unary.ts';
import { diffusionLoss } from '../objective/objective.ts';
import { type MakeMethod, plainDiffusion } from './method.ts';

export const esd: MakeMethod = (run, objective) => ({
  ...plainDiffusion(run, objective),
  asks: { teacher: true, unconditional: true },
  loss({ student, teacher, conditioning, unconditional }, inputs) {
    const eta = run.esd.negative_guidance;
    const [free, named] = [unconditional, conditioning].map((told) =>
      cast(teacher(inputs.sample, inputs.timesteps, told), 'float32'),
    );
    const target = sub(scale(free, 1 + eta), scale(named, eta));
    return diffusionLoss(student, objective, { ...inputs, target }, conditioning);
  },
});
