// A run that begins with what an earlier run of its file has yet to make, as far as it can be planned before that.
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import type { Run } from './run/run.ts';

interface Foreseen {
  run: Run;
  /** The earlier run that will make its model, of whose UNet that one may change the shape. */
  maker?: Run;
}

/**
 * A run with what an earlier one of its file has yet to make replaced by what that one begins with, which but for a UNet has the same
 * shapes. They are in order, and the earlier ones such runs themselves.
 */
export function foreseen(run: Run, earlier: readonly Run[]): Foreseen {
  /** The run that is to make what a path names. */
  const maker = (path: unknown): Run | undefined =>
    typeof path === 'string' && path !== '' && !existsSync(path)
      ? earlier.find(({ output }) => resolve(path).startsWith(`${resolve(output)}/`))
      : undefined;
  const { model, unet, vae, lora, distillation, controlnet, t2i_adapter, ip_adapter, textual_inversion } =
    run;
  /** Where a run begins that is to make a UNet; a preset is nowhere. */
  const begin = ({ unet, model }: Run): string => unet || (typeof model === 'string' ? model : '');
  const net = maker(controlnet.controlnet_model_name_or_path);
  const lender = maker(unet);
  const teacher = maker(distillation.pretrained_teacher_model);
  const made: Run = {
    ...run,
    model: maker(model)?.model ?? model,
    unet: lender ? begin(lender) : unet,
    // One that is trained has the model's own shape.
    vae: maker(vae) ? '' : vae,
    lora: maker(lora.network_weights) ? { ...lora, network_weights: '' } : lora,
    distillation: teacher ? { ...distillation, pretrained_teacher_model: begin(teacher) } : distillation,
    controlnet: net ? net.controlnet : controlnet,
    t2i_adapter: maker(t2i_adapter.adapter_model_name_or_path)?.t2i_adapter ?? t2i_adapter,
    ip_adapter: maker(ip_adapter.pretrained_ip_adapter_path)?.ip_adapter ?? ip_adapter,
    // A letter is one token.
    textual_inversion: maker(textual_inversion.weights)
      ? { ...textual_inversion, weights: '', initializer_token: 'a' }
      : textual_inversion,
  };
  return { run: made, maker: unet ? lender : maker(model) };
}
