// A sample of the synchronisation mutants of our kernels: none survives that is not listed as equivalent. All of them are run by
// `npm run test:mutants`, those of Hopper's main loop by cuda_hopper_mutants.test.ts.
import { test } from 'tap';
import { judge, unexplained } from './mutant_judge.ts';

for (const family of ['reduce', 'move', 'optimizer', 'norm', 'group_norm', 'adamw_8bit']) {
  test(`synchronisation mutants of ${family} die`, (t) => {
    const verdicts = judge({ family, dtype: 'bfloat16' });
    t.ok(verdicts.length > 0, `${verdicts.length} mutants`);
    t.same(
      unexplained(verdicts).map(({ kernel, mutant }) => `${kernel} ${mutant}`),
      [],
    );
    t.end();
  });
}
