// A run file's value as the run that will be trained: defaults filled in, `--set` applied, and what it may say key by key but not
// together refused in a sentence before any work is begun.
import { UserError } from '../../io/errors.ts';
import { mostChunks } from '../../models/text/conditioning.ts';
import { fill, override } from './fields.ts';
import { refuseLines } from './preview_prompts.ts';
import { refuseAdapters } from './rules/adapters.ts';
import { conditioned, refuseImages } from './rules/images.ts';
import { refuseOfMethods } from './rules/methods.ts';
import { refuseOptimizer } from './rules/optimizer.ts';
import { refuseForeign } from './rules/owners.ts';
import { refuseSeeing } from './rules/seeing.ts';
import { refuseTargets } from './rules/targets.ts';
import type { Run } from './run.ts';
import { fields } from './run_fields.ts';

/** Fills in the defaults, then applies `--set` assignments. @throws UserError for an unknown key or an unfit value */
export function resolveRun(
  given: unknown,
  where: string,
  name: string,
  assignments: readonly string[] = [],
): Run {
  const run = fill(fields, given, where);
  for (const assignment of assignments) override(fields, run, assignment);
  run.name ||= name;
  if (!run.output && !/^[^/\\]+$/.test(run.name.replace(/^\.+$/, '')))
    throw new UserError(
      `${where}: "name" is "${run.name}", which names no folder in runs/; give a plain name, or say with "output" where the run goes`,
    );
  run.output ||= `runs/${run.name}`;
  refuseUnfit(run, where);
  const { dataset } = run;
  if (conditioned(run))
    dataset.conditioning_image_column ||= dataset.original_image_column || 'conditioning_image';
  if (run.train.method === 'dpo') dataset.rejected_image_column ||= 'rejected';
  mostChunks(run.dataset.max_token_length, `${where}: "dataset.max_token_length"`); // refuses what is no multiple of a chunk
  return run;
}

/** @throws UserError for what does not go together; `where` names the file */
function refuseUnfit(run: Run, where: string): void {
  refuseForeign(run, where);
  refuseTargets(run, where);
  refuseOfMethods(run, where);
  refuseAdapters(run, where);
  refuseSeeing(run, where);
  refuseImages(run, where);
  refuseLines(run.previews, where);
  refuseOptimizer(run, where);
}
