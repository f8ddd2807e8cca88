// A UNet or ControlNet whose matrices are kept in 8-bit integers (engine/ops/q8.ts), half of what bfloat16 takes: each is decoded when
// a layer needs it and freed after. Attention, norms and sums are what they were. Text encoders and the VAE stay as they are.
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { Q8_BLOCK } from '../../engine/ops/q8.ts';

/** Has a network that is not loaded yet keep its matrices so; rows that are no whole blocks (of four latent channels) stay. */
export function keepInQ8(network: AnyModule): void {
  for (const parameter of namedParameters(network).values()) {
    const shape = parameter.memoryShape;
    parameter.inQ8 = shape.length > 1 && shape[shape.length - 1] % Q8_BLOCK === 0;
  }
}
