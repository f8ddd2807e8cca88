// T2I-Adapters against diffusers (golden/t2i_adapter.jsonl): whole calls.
import { test } from 'tap';
import { namedParameters } from '../engine/module.ts';
import { parseT2IAdapterConfig, t2iAdapter } from '../models/t2i_adapter.ts';
import { goldenLines } from './golden.ts';
import { type Call, t2iAdapters, testCalls } from './golden_calls.ts';

testCalls(
  goldenLines<Call>('t2i_adapter').filter(({ kind }) => kind !== undefined),
  15,
  3,
);

test("diffusers' keys", (t) => {
  for (const { name, config, keys } of t2iAdapters) {
    const own = namedParameters(t2iAdapter(parseT2IAdapterConfig(config, name)));
    t.same(Object.fromEntries([...own].map(([key, { shape }]) => [key, shape])), keys);
  }
  t.end();
});
