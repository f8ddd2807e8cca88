// A UNet whose feed-forward layers are in 8-bit floats: they hold 42 % of a step's operations, and their weights are read
// once each. Attention's projections stay as they are: three of them share an input, and rounding it would cost what the
// smaller product saves. For sampling; adapters are merged before.
import { noGrad } from '../../engine/grad.ts';
import { namedParameters } from '../../engine/module.ts';
import { fp8Weight } from '../../engine/ops/fp8.ts';
import { keep, scope } from '../../engine/scope.ts';
import type { UNet } from './unet.ts';

/** Rounds the feed-forward weights of a loaded UNet, in place, to 8-bit floats (e4m3), one scale a tensor. */
export function feedForwardToFp8(denoiser: UNet): void {
  for (const [name, parameter] of namedParameters(denoiser)) {
    if (!/\.ff\.net\.(0\.proj|2)\.weight$/.test(name) || parameter.fp8) continue;
    noGrad(() =>
      scope(() => {
        const { bytes, scale } = fp8Weight(parameter.tensor);
        parameter.fp8 = { bytes: keep(bytes.handle()), scale: keep(scale.handle()) };
      }),
    );
  }
}
