// Flags of `sdxl sample` that were typed and would do nothing, or half of what is wanted: refused, where a picture's own settings
// (--from) and what clients send to `sdxl serve` are passed over, as these say all that they have.
import { UserError } from '../../io/errors.ts';
import { takesEta, takesEtaAncestral } from '../../models/samplers/config.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';
import { isFolderOrId } from '../model.ts';
import type { SampleOptions } from './options.ts';

/** Whether an option was typed. */
export type IsTyped = (name: keyof SampleOptions) => boolean;

/** What can be told before anything is read; gives warnings of what may be meant so. @throws UserError */
export function checkIdle(options: SampleOptions, isTyped: IsTyped): string[] {
  const { refiner, subseedStrength, timesteps, sigmas, scheduler } = options;
  if (isTyped('denoisingEnd') && options.saveLatents === undefined) refuseHalfDone(options);
  if (isTyped('steps') && (timesteps ?? sigmas))
    throw new UserError(
      `--steps and ${timesteps ? '--timesteps' : '--sigmas'} both lay out the steps; give one of them`,
    );
  const { model, vae, configs } = options;
  if (isTyped('stylesFile') && !options.style)
    throw new UserError(
      '--styles-file has styles, and none is asked for; give --style NAME, or leave it out',
    );
  const lendsNothing = [model, refiner, vae].every((path) => path === undefined || isFolderOrId(path));
  if (isTyped('configs') && lendsNothing)
    throw new UserError(
      `--configs ${configs} is for a model that is a single file, and a folder has its own; leave it out`,
    );
  if (scheduler) refuseEta(createSampler(scheduler), isTyped);
  return isTyped('subseed') && subseedStrength === 0
    ? ['--subseed does nothing at --subseed-strength 0; give more, up to 1, such as 0.2']
    : [];
}

/** Pictures that nobody finishes. @throws UserError */
export function refuseHalfDone({ denoisingEnd = 1, refiner }: SampleOptions): void {
  if (denoisingEnd < 1 && !refiner)
    throw new UserError(
      '--denoising-end leaves the picture half denoised, for a refiner to finish; give --refiner, or --save-latents to sdxl sample',
    );
}

/** The same of the scheduler that runs, which may be the model's. @throws UserError */
export function refuseEta({ name, config }: Pick<Sampler, 'name' | 'config'>, isTyped: IsTyped): void {
  if (isTyped('eta') && !takesEta(name))
    throw new UserError(`--eta: ${name} takes none; leave it out, or use --scheduler ddim or tcd`);
  if (isTyped('etaAncestral') && !takesEtaAncestral(name, config))
    throw new UserError(
      `--eta-ancestral: ${name} puts no noise into its steps; leave it out, or use --scheduler euler_a or another of those that do`,
    );
}

const weight = /\([^()[\]]*:\s*[+-]?[.\d]+\s*\)/;
const change = /\[[^[\]]*:\s*[.\d]+\s*\]/;

/** A warning of weights or changes in texts that are read as words, which A1111 and others do not. */
export function unreadWeights(texts: readonly string[]): string[] {
  const [first] = texts.flatMap((text) => (weight.exec(text) ?? change.exec(text) ?? []).slice(0, 1));
  if (first === undefined) return [];
  return [
    `"${first}" is drawn as words; give --emphasis original to have weights and changes in prompts read as in A1111, or --emphasis none to mean the words`,
  ];
}
