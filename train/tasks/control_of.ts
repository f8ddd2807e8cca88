// Which of these records (control.ts) a run's passes have. A mask of the loss goes beside what an inpainting or InstructPix2Pix UNet sees.
import type { Pipeline } from '../../models/pipeline.ts';
import { type Control, uncontrolled } from '../controls/control.ts';
import { controlled } from '../controls/controlnet.ts';
import { paintingIn } from '../controls/inpainting.ts';
import { editing } from '../controls/instruct_pix2pix.ts';
import { prompted } from '../controls/ip_adapter.ts';
import { masked } from '../controls/mask.ts';
import { adapted } from '../controls/t2i_adapter.ts';
import { type Run, trainsEdits } from '../run/run.ts';
import type { Prepared } from './preparation.ts';

export function controlOf(run: Run, pipeline: Pipeline, { beside, images }: Prepared): Control {
  if (run.train.target === 'controlnet') return controlled(run);
  if (run.train.target === 't2i_adapter') return adapted(run, pipeline);
  if (images) return prompted(run, pipeline, images);
  const weighed = run.objective.masked_loss ? masked(run, pipeline.ratio) : uncontrolled;
  const edits = trainsEdits(run);
  if (!edits && !run.inpainting.mask_mode) return weighed;
  const seeing = (edits ? editing : paintingIn)(run, pipeline, beside);
  return {
    ...seeing,
    inputs: async (...asked) => ({ ...(await weighed.inputs(...asked)), ...(await seeing.inputs(...asked)) }),
    blank: (...asked) => ({ ...weighed.blank(...asked), ...seeing.blank(...asked) }),
  };
}
