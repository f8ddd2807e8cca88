// Twins of a model, with the averages for its weights: whatever fails while one is made or used, nothing of it is left.
import { test } from 'tap';
import type { Driver } from '../../engine/driver.ts';
import { openMaterials } from '../../train/materials.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { validationLoss } from '../../train/validation.ts';
import { basic, control, device, locate, sessionOf, silent } from '../support/small_runs.ts';

const { driver, memory } = device;

/** Runs `fn` with the `at`-th call of the driver refused; tells whether there was one. */
async function refusing(
  call: 'allocate' | 'launch',
  at: number,
  fn: () => Promise<unknown>,
): Promise<boolean> {
  const whole = driver[call] as (...args: unknown[]) => unknown;
  let calls = 0;
  const refused = (...args: unknown[]) => {
    if (++calls < at) return whole(...args);
    if (call === 'allocate') return undefined;
    throw new Error('no launch');
  };
  memory.trim();
  Object.assign(driver, { [call]: refused } satisfies Partial<Record<keyof Driver, unknown>>);
  try {
    await fn();
    return calls >= at;
  } catch (error) {
    if (!/no launch|out of memory/.test(String(error))) throw error;
    return true;
  } finally {
    Object.assign(driver, { [call]: whole });
  }
}

const targets: Record<string, RunInput> = {
  lora: { train: { target: 'lora', text_encoders: true } },
  controlnet: control,
  vae: { train: { target: 'vae' } },
};

for (const [name, more] of Object.entries(targets))
  test(`a validation of ${name} that fails leaves nothing`, async (t) => {
    // Averages are float32, and have to be rounded for this.
    const input: RunInput = { ...basic(`twin-${name}`), dtype: 'bfloat16', ...more };
    const run = resolveRun({ ...input, validation: { samples: 1 } }, 'test', 'test');
    const materials = await openMaterials(run, locate, silent);
    const session = await sessionOf(materials);
    const measure = () => validationLoss(session);
    const loss = await measure();
    const { live, storages } = memory;
    for (const call of ['allocate', 'launch'] as const) {
      let count = 0;
      for (let at = 1; await refusing(call, at, measure); at = Math.ceil(at * 1.5)) {
        count++;
        t.same([memory.live, memory.storages], [live, storages], `${call} ${at}`);
      }
      t.ok(count > 5, `${count} calls of ${call} were refused in turn`);
    }
    t.equal(await measure(), loss, 'and the next is as if none had failed');
    session.release();
    t.equal(memory.storages, 0);
  });
