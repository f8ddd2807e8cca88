// Knowledge distillation of a UNet into a smaller one, as SSD-1B and Segmind-Vega were made of SDXL's (Gupta et al. 2024, after BK-SDM, Kim
// et al. 2023): task + output_weight * output + feature_weight * features. Task is the diffusion loss, output the distance of what both
// UNets say, features the sum of the distances of what both make on the way: at level `sub_block` resnets and transformers (diffengine's
// SSD1B), at `block` whole levels (its DistillSDXL). As there, all are by the run's loss, with its weights of images. Its SSD1B adds the
// sum to itself at each resnet on the way up, so that what is deeper counts up to 512 times; the paper and Segmind's script do not.
import { watchCalls } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import { cast, scale } from '../../engine/ops/unary.ts';
import { keep, onFailure } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { distance } from '../objective/objective.ts';
import type { Run } from '../run/run.ts';
import { type MakeMethod, plainDiffusion } from './method.ts';

type Level = Run['distillation']['distill_level'];

/** The paths of what is compared on the way. */
const compared: Record<Level, RegExp> = {
  block: /^((down|up)_blocks\.\d+|mid_block)$/,
  sub_block: /^((down|up)_blocks\.\d+\.(resnets|attentions)\.\d+|mid_block)$/,
};

export const distillation: MakeMethod = (run, objective) => ({
  ...plainDiffusion(run, objective),
  asks: { teacher: true },
  loss({ student, teacher, conditioning }, { sample, timesteps, target, weights, huber_c }) {
    const { distill_level: level, output_weight, feature_weight } = run.distillation;
    const paths = feature_weight > 0 ? compared[level] : undefined;
    // The teacher first, so that nothing of the student's pass has to be kept meanwhile.
    const [taught, said] = [teacher, student].map((network) =>
      withFeatures(paths, () => cast(network(sample, timesteps, conditioning), 'float32')),
    );
    const far = (given: Tensor, wanted: Tensor) =>
      distance(objective.settings, given, wanted, { weights, huber_c });
    const terms = [far(said.output, target), scale(far(said.output, taught.output), output_weight)];
    for (const [given, wanted] of pairsOf(level, said.features, taught.features))
      terms.push(scale(far(given, wanted), feature_weight));
    for (const each of [said, taught].flatMap(({ features }) => [...features.values()])) each.release();
    return terms.reduce((sum, term) => add(sum, term));
  },
});

type Features = ReadonlyMap<string, Tensor>;

/** What a network gives, and handles on what modules of such paths do, which are to be released. */
function withFeatures(paths: RegExp | undefined, ask: () => Tensor): { output: Tensor; features: Features } {
  const features = new Map<string, Tensor>();
  if (!paths) return { output: ask(), features };
  const output = watchCalls((path, given) => {
    if (!paths.test(path)) return;
    // A level on the way down gives all its features, its output last.
    const h = (Array.isArray(given) ? given.at(-1) : given) as Tensor;
    const kept = keep(h.handle(h.shape, h.node));
    onFailure(() => kept.release());
    features.set(path, kept);
  }, ask);
  return { output, features };
}

/** What both have. Where the student has no middle block, its last level stands against the teacher's, as in BK-SDM's tiny one. */
function pairsOf(level: Level, own: Features, theirs: Features): [Tensor, Tensor][] {
  const middle = own.has('mid_block') ? undefined : theirs.get('mid_block');
  const last = [...own.keys()].filter((path) => path.startsWith('down_blocks.')).at(-1);
  return [...own].flatMap(([path, given]): [Tensor, Tensor][] => {
    const wanted = (level === 'block' && path === last && middle) || theirs.get(path);
    return wanted ? [[given, wanted]] : [];
  });
}
