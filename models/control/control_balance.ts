// Whether a ControlNet counts more or less than the prompt, as sd-webui-controlnet's control modes have it: with soft weights it gives way,
// and it outweighs the prompt where the negative prompt's prediction is left without it, so that guidance enlarges what it does.
import { UserError } from '../../io/errors.ts';

/** sd-webui-controlnet's control modes, in InvokeAI's words. */
export const controlBalances = ['balanced', 'more_prompt', 'more_control'] as const;
export type ControlBalance = (typeof controlBalances)[number];

/** The part of a request that says so. */
interface BalanceRequest {
  control_balance?: ControlBalance | readonly (ControlBalance | undefined)[];
  guess_mode?: boolean;
}

/**
 * How much the i-th feature counts, the middle block's being behind `count` others, of which DeepCache may have asked a few: all alike, early
 * ones less by guess_mode of diffusers (from a tenth on), or by sd-webui-controlnet's soft weights, which count thirteen features, those of the models before SDXL.
 */
export const weights = {
  alike: () => 1,
  guessed: (i: number, count: number) => 10 ** (i / count - 1),
  soft: (i: number) => 0.825 ** (12 - i),
};
export type Weights = keyof typeof weights;

/** One for each. @throws UserError */
export function balancesOf(
  count: number,
  { control_balance: given, guess_mode: guess }: BalanceRequest,
): readonly ControlBalance[] {
  if (given === undefined) return Array<ControlBalance>(count).fill('balanced');
  if (guess)
    throw new UserError(
      'guess_mode (--guess-mode) and control_balance (--control-balance) both weigh what a ControlNet gives: leave one of them out',
    );
  const list = typeof given === 'string' ? Array<ControlBalance>(count).fill(given) : given;
  if (list.length !== count)
    throw new UserError(
      `control_balance has ${list.length} words for ${count} ControlNets: give one, or one to each`,
    );
  return list.map((each) => each ?? 'balanced');
}
