// What a request asks of each ControlNet: a picture, a scale, a part of the steps, and of a union one what its picture is
// (controlnet_union.ts). Of these there is one for all, or one to each.
import { UserError } from '../../io/errors.ts';
import type { ModelSource } from '../checkpoint/checkpoint.ts';
import type { Size } from '../text/conditioning.ts';
import type { Latents } from '../vae/latents.ts';
import { balancesOf, type ControlBalance, type Weights } from './control_balance.ts';
import { type AnyControlNet, isLLLite, isUnion } from './controlnet_kinds.ts';
import { controlModes, unionConfigOf } from './controlnet_union.ts';
import { checkLLLiteSize, type LLLite } from './lllite.ts';

/** One number for all ControlNets, or a list with one, or nothing, for each. */
type Each = number | readonly (number | undefined)[];

/** The part of a request that ControlNets heed. */
export interface ControlRequest {
  /** A picture for each ControlNet, [1, 3, height, width] in [0, 1], of the size that is drawn. */
  control_image?: readonly Latents[];
  /**
   * What a union ControlNet's picture is, by its number: 0 openpose, 1 depth, 2 scribble, 3 canny, 4 normal, 5 segment, 6 tile, 7 repaint.
   * One for all unions, or a list for them alone, or one with nothing for each ControlNet of one kind.
   */
  control_mode?: Each;
  /** How strongly each is followed: 1 where absent, but 0.8 over a picture without a mask. */
  controlnet_conditioning_scale?: Each;
  /** The part of the steps, 0 to 1, from which on each is on; 0 where absent. */
  control_guidance_start?: Each;
  /** The part of the steps after which each is off; 1 where absent. */
  control_guidance_end?: Each;
  /** Controls the prompt's prediction alone, not the negative one's, and early features less than late ones. */
  guess_mode?: boolean;
  /** Whether each gives way to the prompt, or the prompt to it, as sd-webui-controlnet's control modes; balanced where absent. */
  control_balance?: ControlBalance | readonly (ControlBalance | undefined)[];
}

/** A ControlNet and what it is asked to do. */
export interface Control<N extends AnyControlNet = AnyControlNet> {
  net: N;
  /** Of a union one. */
  mode?: number;
  image: Latents;
  scale: number;
  start: number;
  end: number;
  weights: Weights;
  /** Whether the prompt's prediction alone is controlled, and the negative one's is not. */
  promptAlone: boolean;
}

type NumbersOf = 'controlnet_conditioning_scale' | 'control_guidance_start' | 'control_guidance_end';

/** What a request asks of each ControlNet. @throws UserError where it has not one of each thing for each, or is out of bounds */
export function controlsOf(
  nets: readonly AnyControlNet[],
  request: ControlRequest & { image?: Latents; mask?: Latents },
  size: Size,
): Control[] {
  const { control_image: images = [], guess_mode: guess = false, image, mask } = request;
  if (nets.length === 0 && images.length === 0) return [];
  checkImages(images, nets.length, size);
  const each = (key: NumbersOf, otherwise: number) => numbersOf(key, request[key], nets.length, otherwise);
  const scales = each('controlnet_conditioning_scale', image && !mask ? 0.8 : 1);
  const modes = modesOf(nets.map(isUnion), request.control_mode);
  const starts = each('control_guidance_start', 0);
  const ends = each('control_guidance_end', 1);
  starts.forEach((start, i) => {
    if (!(start >= 0 && start < ends[i] && ends[i] <= 1))
      throw new UserError(
        `control_guidance_start is ${start} and control_guidance_end ${ends[i]}: give parts of the way, the end after the start`,
      );
  });
  const balances = balancesOf(nets.length, request);
  const controls = nets.map(
    (net, i): Control => ({
      ...{ net, mode: modes[i], image: images[i], scale: scales[i], start: starts[i], end: ends[i] },
      weights: guess ? 'guessed' : balances[i] === 'balanced' ? 'alike' : 'soft',
      promptAlone: guess || balances[i] === 'more_control',
    }),
  );
  const groups = [...byNet(controls).values()];
  for (const group of groups) checkGroup(group, groups.length === 1, size);
  return controls;
}

/** @throws UserError where there is not one of the size to each ControlNet */
function checkImages(images: readonly Latents[], nets: number, [height, width]: Size): void {
  if (images.length !== nets)
    throw new UserError(
      `control_image has ${images.length} pictures for ${nets} ControlNets: give one to each`,
    );
  for (const { shape } of images)
    if (shape.join() !== [1, 3, height, width].join())
      throw new UserError(
        `a picture in control_image is [${shape}], not [1,3,${height},${width}]: resize it`,
      );
}

/** A number for each ControlNet. @throws UserError where there are others than one, or one to each */
function numbersOf(
  key: NumbersOf,
  given: Each | undefined,
  nets: number,
  otherwise: number,
): readonly number[] {
  const said = given ?? otherwise;
  const list = typeof said === 'number' ? Array<number>(nets).fill(said) : said;
  if (list.length === nets) return list.map((each) => each ?? otherwise);
  throw new UserError(`${key} has ${list.length} numbers for ${nets} ControlNets: give one, or one to each`);
}

/** @throws UserError for what one ControlNet cannot be asked of its pictures */
function checkGroup(group: readonly Control[], isAlone: boolean, size: Size): void {
  const [{ net, scale, weights, promptAlone }] = group;
  for (const { mode } of group)
    checkMode(isUnion(net) ? net.children.task_embedding.shape[0] : undefined, mode);
  if (isLLLite(net)) checkLLLiteGroup(net, group, size);
  if (!isUnion(net)) return;
  if (group.some((each) => each.weights !== weights || each.promptAlone !== promptAlone))
    throw new UserError(
      'a ControlNet union sees all of its pictures at once: give each the same control_balance (--control-balance)',
    );
  if (!isAlone && group.some((each) => each.scale !== scale))
    throw new UserError(
      'beside other ControlNets a ControlNet union has one scale for all of its pictures: give each the same controlnet_conditioning_scale',
    );
}

/** @throws UserError for what an LLLite cannot be asked, or a size that it does not see in whole squares */
function checkLLLiteGroup(net: LLLite, [{ weights, promptAlone }]: readonly Control[], size: Size): void {
  if (weights !== 'alike' || promptAlone)
    throw new UserError(
      'a ControlNet-LLLite adds nothing to the features that guess_mode (--guess-mode) and control_balance (--control-balance) weigh: leave them out',
    );
  checkLLLiteSize(net.config, size);
}

/** What can be told of modes before weights are read. @throws UserError where a union's picture has none, or another's has one */
export function checkControlModes(sources: readonly ModelSource[], given: Each | undefined): void {
  const unions = sources.map(unionConfigOf);
  const modes = modesOf(
    unions.map((union) => union !== undefined),
    given,
  );
  unions.forEach((union, i) => {
    checkMode(union?.num_control_type as number | undefined, modes[i]);
  });
}

/** `kinds` is how many a union knows. */
function checkMode(kinds: number | undefined, mode: number | undefined): void {
  if (kinds === undefined) {
    if (mode === undefined) return;
    throw new UserError(
      `control_mode is ${mode} for a ControlNet of one kind: it is for a ControlNet union alone`,
    );
  }
  if (mode !== undefined && Number.isInteger(mode) && mode >= 0 && mode < kinds) return;
  const known = controlModes.slice(0, kinds).map(([name], i) => `${i} ${name}`);
  throw new UserError(
    `${mode === undefined ? 'no control_mode (--control-mode)' : `control_mode ${mode}`} for a ControlNet union: say what its picture is, ${known.join(', ')}`,
  );
}

/** Controls by their ControlNet, in their order. */
export function byNet<C extends Control>(controls: readonly C[]): Map<C['net'], C[]> {
  const groups = new Map<C['net'], C[]>();
  for (const control of controls) groups.set(control.net, [...(groups.get(control.net) ?? []), control]);
  return groups;
}

/** A mode for each, or none. `unions` says of each whether it is one. */
function modesOf(unions: readonly boolean[], given: Each | undefined): readonly (number | undefined)[] {
  const places = unions.flatMap((union, i) => (union ? [i] : []));
  // Where there is no union, what is given is refused of each.
  const alone = places.length > 0 ? places : unions.map((_, i) => i);
  const list = typeof given === 'number' ? alone.map(() => given) : (given ?? []);
  if (list.length === unions.length || list.length === 0) return list;
  if (list.length === alone.length) return unions.map((_, i) => list[alone.indexOf(i)]);
  throw new UserError(
    `control_mode has ${list.length} numbers for ${unions.length} ControlNets, of which ${places.length} are unions: give one, or one to each union`,
  );
}
