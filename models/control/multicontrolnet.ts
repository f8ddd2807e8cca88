// Several ControlNets at work on one image, as diffusers' MultiControlNetModel: each has a picture, a scale and a part of the
// steps, and what they give is summed. Outside its part a ControlNet is not run, where diffusers runs it and takes it times 0. A union
// (controlnet_union.ts) that is given more than once sees its pictures together, and alone among ControlNets takes the scales for them and
// not for what it gives: as diffusers has it.
import { add } from '../../engine/ops/binary.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { scale, scaled } from '../../engine/ops/unary.ts';
import { Tensor } from '../../engine/tensor.ts';
import type { Steering } from '../unet/transformer.ts';
import type { AdditionalResiduals } from '../unet/unet.ts';
import type { Question } from '../unet/unet_encoder.ts';
import { weights } from './control_balance.ts';
import { byNet, type Control } from './control_request.ts';
import { additionalResiduals } from './controlnet.ts';
import { type AnyControlNet, type FeatureControlNet, isLLLite, isUnion } from './controlnet_kinds.ts';
import { joined } from './lllite.ts';

/** Whether it has a part in a call of the network, the `i`-th of `calls`. */
const isOn = ({ start, end }: Control, i: number, calls: number): boolean =>
  i / calls >= start && (i + 1) / calls <= end;

/**
 * Those that have a part in the `i`-th of `calls`. A union sees all of its pictures while one of them has a part, and those without one
 * count nothing.
 */
export function partsOf(
  controls: readonly PlacedControl[],
  i: number,
  calls: number,
): readonly PlacedControl[] {
  const isRunning = (each: Control) =>
    isOn(each, i, calls) ||
    (isUnion(each.net) && controls.some((other) => other.net === each.net && isOn(other, i, calls)));
  return controls
    .filter(isRunning)
    .map((control) => (isOn(control, i, calls) ? control : { ...control, scale: 0 }));
}

/** A Control whose picture is on the device, [1, height, width, 3]. */
export interface PlacedControl<N extends AnyControlNet = AnyControlNet> extends Control<N> {
  picture: Tensor;
  /** What an LLLite does. */
  steering?: Steering;
}

/** What those that are on add to what the UNet's attentions read. */
export const steeringOf = (on: readonly PlacedControl[]): Steering | undefined =>
  joined(on.flatMap(({ steering }) => (steering ? [steering] : [])));

type Following = PlacedControl<FeatureControlNet>;

const addsToFeatures = (control: PlacedControl): control is Following => !isLLLite(control.net);

/** What those that are on add to the features of the UNet that is asked the same. Guided, the negative prompts' rows come first. */
export function residualsOf(
  running: readonly PlacedControl[],
  question: Question,
  guided: boolean,
): AdditionalResiduals | undefined {
  const on = running.filter(addsToFeatures);
  if (on.length === 0) return undefined;
  const ofPrompt = (each: Following) => guided && each.promptAlone;
  const [alone, others] = [on.filter(ofPrompt), on.filter((each) => !ofPrompt(each))];
  const doubled = (x: Tensor): Tensor => concat([scale(x, 0), x], 0);
  const isBeside = byNet(on).size > 1;
  const sums = [
    ...(alone.length > 0 ? [sumOf(alone, ofPrompts(question), isBeside).map(doubled)] : []),
    ...(others.length > 0 ? [sumOf(others, question, isBeside)] : []),
  ];
  return additionalResiduals(added(sums), featuresOf(on[0].net));
}

const added = (given: readonly (readonly Tensor[])[]): readonly Tensor[] =>
  given.reduce((sum, more) => sum.map((x, i) => add(x, more[i])));

/** What some of them give together; `beside` tells that there are other nets than one. */
const sumOf = (controls: readonly Following[], question: Question, beside: boolean): readonly Tensor[] =>
  added([...byNet(controls)].flatMap(([net, group]) => givenBy(net, group, question, beside)));

/** How many features it adds to, beside the middle block's output. */
const featuresOf = (net: FeatureControlNet): number => net.children.controlnet_down_blocks.length;

/** What a ControlNet makes of its pictures, one after the other, or a union of all of them together. */
function givenBy(
  net: FeatureControlNet,
  controls: readonly Following[],
  question: Question,
  beside: boolean,
): Tensor[][] {
  const weighed = (residuals: readonly Tensor[], control: Control, factor: number) =>
    residuals.map((x, i) => scaled(x, factor * weights[control.weights](i, featuresOf(net))));
  if (!isUnion(net))
    return controls.map((control) => weighed(net(question, control.picture), control, control.scale));
  // Of several pictures in a union alone the scales are theirs.
  const own = controls.length > 1 && !beside;
  const seen = controls.map(({ picture, mode = 0, scale }) => ({ picture, mode, weight: own ? scale : 1 }));
  const first = controls.find(({ scale }) => scale !== 0) ?? controls[0];
  return [weighed(net(question, seen), first, own ? 1 : first.scale)];
}

/** The half of the rows that follows the negative prompts'. */
function ofPrompts({ sample, times, conditioning, count }: Question): Question {
  const later = (t: Tensor, axis = 0): Tensor => slice(t, axis, t.shape[axis] / 2, t.shape[axis] / 2);
  const { context, textEmbeds, timeIds, cache } = conditioning;
  return {
    ...{ sample: later(sample), count },
    times: times instanceof Tensor ? later(times) : { ...times, times: later(times.times, 1) },
    conditioning: {
      ...{ context: later(context), textEmbeds: later(textEmbeds), timeIds: later(timeIds) },
      cache: cache?.part,
    },
  };
}
