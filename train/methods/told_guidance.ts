// A model whose UNet is told the guidance it is to stand for, made of one that is not, as diffusers' script for whole UNets makes it: the
// time's embedding gets a layer (cond_proj) that begins as PyTorch's do, uniform within 1 / sqrt(dim). A teacher is never told w, so for it
// the layer is not there.
import { type AnyModule, module } from '../../engine/module.ts';
import { unscoped } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import type { UNet } from '../../models/unet/unet.ts';
import { numbersOf } from '../data/draws.ts';
import type { Run } from '../run/run.ts';

/** `model`, with such a layer where the run distils a whole UNet into one and the model has none. */
export function toldGuidance({ train, lcm, seed }: Run, model: ModelSource): ModelSource {
  const dim = lcm.unet_time_cond_proj_dim;
  if (train.method !== 'lcm' || train.target !== 'unet' || dim === 0) return model;
  if (model.config('unet').time_cond_proj_dim) return model;
  return {
    ...model,
    config(component) {
      const own = model.config(component);
      return component === 'unet' ? { ...own, time_cond_proj_dim: dim } : own;
    },
    load(component, into, device, dtype) {
      if (component !== 'unet') return model.load(component, into, device, dtype);
      const { cond_proj, others } = parted(into as UNet);
      model.load(component, others, device, dtype);
      const { weight } = cond_proj.children;
      const drawn = numbersOf(seed)('time_embedding.cond_proj.weight', weight.size, 'uniform');
      const values = drawn.map((u) => (2 * u - 1) / Math.sqrt(dim));
      weight.tensor = unscoped(() => tensor(values, weight.shape, { device, dtype }));
    },
  };
}

/** The layer, and a tree of all other parameters under their own names. */
function parted({ children }: UNet) {
  const { cond_proj, ...others } = children.time_embedding.children;
  if (!cond_proj) throw new Error('the UNet was made for another config');
  const tree = (of: AnyModule['children']): AnyModule => module(of, () => undefined);
  return { cond_proj, others: tree({ ...children, time_embedding: tree(others) }) };
}
