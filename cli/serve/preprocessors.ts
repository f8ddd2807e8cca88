// sd-webui-controlnet's preprocessors that there are: those of pixels alone, under its names, with its sliders and their defaults. All work
// in the picture's own size, whatever `processor_res` says.
import { shrinkByArea } from '../../io/area.ts';
import { canny } from '../../io/canny.ts';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import { numberOf } from './fields.ts';
import type { Made } from './messages.ts';

/** As its lists tell of one. */
interface Slider {
  name: string;
  value: number;
  min: number;
  max: number;
  step: number;
}

interface Preprocessor {
  /** What its page calls it, where that is another name. */
  label?: string;
  sliders: readonly Slider[];
  made(a: number, b: number): Made;
}

const levels = (name: string, value: number, min: number): Slider => ({
  ...{ name, value, min, max: 255, step: 1 },
});

const preprocessors: Readonly<Record<string, Preprocessor>> = {
  none: { sliders: [], made: () => ({ by: 'white' }) },
  canny: {
    sliders: [levels('Low Threshold', 100, 1), levels('High Threshold', 200, 1)],
    made: (low, high) => ({ by: 'canny', thresholds: [Math.trunc(low), Math.trunc(high)] }),
  },
  invert: {
    label: 'invert (from white bg & black line)',
    sliders: [],
    made: () => ({ by: 'invert' }),
  },
  threshold: {
    sliders: [levels('Binarization Threshold', 127, 0)],
    made: (above) => ({ by: 'threshold', above }),
  },
  tile_resample: {
    sliders: [{ name: 'Down Sampling Rate', value: 1, min: 1, max: 8, step: 0.01 }],
    made: (rate) => (rate < 1.1 ? { by: 'white' } : { by: 'shrink', rate }),
  },
};

export const modules = Object.keys(preprocessors);

/** As its list of modules has them. */
export const moduleDetail = Object.fromEntries(
  Object.entries(preprocessors).map(([name, { sliders }]) => [name, { model_free: false, sliders }]),
);

/**
 * What the preprocessor `module` makes of the picture of `whose`, by what its two sliders were set to: what is outside of one's range, such
 * as -1, is its default. @throws UserError for one that is not there
 */
export function madeBy(
  module: string,
  sliders: Readonly<Record<'threshold_a' | 'threshold_b', unknown>>,
  whose: string,
): Made {
  const wanted = module.toLowerCase();
  const [, found] = Object.entries(preprocessors).find(
    ([name, { label }]) => wanted === name || wanted === label,
  ) ?? [undefined, undefined];
  if (!found)
    throw new UserError(
      `${whose} has the module "${module}", and there are ${modules.slice(1).join(', ')} alone; send what it would make, with the module "none"`,
    );
  const set = (key: 'threshold_a' | 'threshold_b', slider: Slider | undefined): number => {
    if (!slider) return 0;
    const value = numberOf(sliders[key] ?? -1, `${whose}'s ${key}`);
    return value < slider.min || value > slider.max ? slider.value : value;
  };
  const [a, b] = found.sliders;
  return found.made(set('threshold_a', a), set('threshold_b', b));
}

/** A picture, opaque, as it was to be made. */
export function preprocessed(picture: Picture, made: Made): Picture {
  if (made.by === 'canny') return canny(picture, made.thresholds);
  if (made.by === 'invert') return { ...picture, data: picture.data.map((level) => 255 - level) };
  if (made.by === 'threshold') return binarized(picture, made.above);
  if (made.by !== 'shrink') return picture;
  const [width, height] = [picture.width, picture.height].map((side) =>
    Math.max(1, Math.trunc(side / made.rate)),
  );
  return shrinkByArea(picture, width, height);
}

/** White where all channels lie above, and else black. */
function binarized({ data: levels, ...size }: Picture, above: number): Picture {
  const data = new Uint8Array(levels.length);
  for (let i = 0; i < data.length; i += 3)
    if (Math.min(levels[i], levels[i + 1], levels[i + 2]) > above) data.fill(255, i, i + 3);
  return { ...size, data };
}
