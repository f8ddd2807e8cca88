// Shapes beyond the records' own, each with a number of multiprocessors: plans cut their work by it, so that small shapes
// reach the kernels that real ones do. On Ampere's path large tiles need operands in whole chunks and tiles enough for the
// device; k is split where it is long and tiles are few. On Hopper's a tile is forced, as the model of the time would choose
// the same one for all small shapes; one multiprocessor makes a block take all items in turn, so that its ring goes round.
import { adafactorSample } from '../../engine/ops/adafactor.ts';
import { momentsSample } from '../../engine/ops/prodigy.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { type AnyRecord, type AnySample, type Planted, withDtype } from '../support/op_cases.ts';
import { type FurtherSample, large, one, productSamples } from './product_samples.ts';

function attention([n, heads, lq, lk, d]: readonly number[], causal: boolean): AnySample {
  const c = heads * d;
  return {
    inputs: { q: [n, lq, c], k: [n, lk, c], v: [n, lk, c] },
    attrs: { heads, causal, scale: d ** -0.5 },
  };
}

const layerNorm = (x: readonly [rows: number, c: number]): AnySample => ({
  inputs: { x: [...x], weight: [x[1]], bias: [x[1]] },
  attrs: { eps: 1e-5 },
});

/** Without the gradients of weight and bias, and without that of x. */
const frozen = (sample: AnySample): FurtherSample[] =>
  [['weight', 'bias'], ['x']].map((names) => one({ ...sample, frozen: names }));

function groupNorm(x: readonly number[], groups: number, silu: boolean, skip = 0): AnySample {
  const c = [(x.at(-1) as number) + skip];
  const beside: Record<string, number[]> = skip ? { skip: [...x.slice(0, -1), skip] } : {};
  return { inputs: { x, ...beside, weight: c, bias: c }, attrs: { groups, eps: 1e-5, silu } };
}

/** d stays what it is where nothing has come. */
const noGradients: Planted = {
  inputs: { sums: [2, 40], d: [4] },
  attrs: { beta3: 0.9, rate: 0.7, d_coef: 1, growth_rate: 2, fresh: true },
  dtypes: { sums: 'float32', d: 'float32' },
  plant: (name, data) => void (name === 'sums' && data.fill(0)),
};

const furtherSamples: Record<string, readonly FurtherSample[]> = {
  ...productSamples,
  attention: [
    large(attention([1, 1, 130, 68, 512], false)),
    { ...one(attention([1, 1, 130, 136, 512], false)), hopper: {}, float32: true },
    { ...one(attention([1, 2, 72, 80, 80], false)), hopper: {} },
    one(attention([1, 2, 70, 72, 80], true)),
    one(attention([1, 1, 200, 210, 40], false)),
    one(attention([1, 1, 210, 200, 64], true)),
    one(attention([1, 1, 40, 130, 64], true)), // tiles of keys that no query sees
    ...[
      [1, 2, 330, 77, false], // pieces enough of one head for each warpgroup's ring to go round
      [1, 1, 388, 390, true],
      [1, 1, 63, 128, false],
      [2, 3, 9, 33, false], // warpgroups that pass over heads
      // Two pieces to a head: the third warpgroup passes by more keys, and queries, than rings hold.
      [1, 4, 100, 300, false],
      // Three pieces and one, so that rings are full when the one begins.
      [1, 1, 200, 600, false],
      // One piece, whose keys two warpgroups share, and more of them than the ring holds; then little ones.
      [1, 1, 60, 1030, false],
      [1, 4, 60, 200, false],
    ].map(([n, heads, lq, lk, causal]) => ({
      sample: attention([n, heads, lq, lk, 64].map(Number), causal === true),
      multiprocessors: 1,
      hopper: {},
    })),
    ...[
      [1, 1, 1, 1, false],
      [2, 1, 128, 129, false],
      [1, 2, 77, 80, true],
      [1, 1, 200, 270, false],
    ].map(([n, heads, lq, lk, causal]) => ({
      sample: attention([n, heads, lq, lk, 64].map(Number), causal === true),
      multiprocessors: 4,
      hopper: {},
    })),
  ],
  sum: [
    one({ inputs: { x: [2, 2100, 7] }, attrs: { axis: 1 } }),
    one({ inputs: { x: [700, 8] }, attrs: { axis: 0 } }),
    // Rows enough for chunks: rows of whole 16 bytes and others, lanes few and many, more chunks than lanes that join them.
    one({ inputs: { x: [1100, 64] }, attrs: { axis: 0 } }),
    one({ inputs: { x: [1, 2900, 20] }, attrs: { axis: 1 } }),
    one({ inputs: { x: [2, 1050, 264] }, attrs: { axis: 1 } }),
    one({ inputs: { x: [3, 900] }, attrs: { axis: 1 } }),
    one({ inputs: { x: [5, 700] }, attrs: { axis: 1 } }),
    one({ inputs: { x: [1100] }, attrs: { axis: 0 } }),
  ],
  // More channels than a block holds, rows for every unrolled copy of a loop, and more chunks than a warp has lanes.
  group_norm: [
    one(groupNorm([1, 300, 10], 2, true)),
    one(groupNorm([1, 300, 11], 1, false)),
    one(groupNorm([2, 301, 12], 3, true)),
    one(groupNorm([1, 5, 1030], 2, true)),
    one(groupNorm([1, 4500, 3], 1, false)),
    // A group in both tensors, and packs that are.
    one(groupNorm([1, 40, 8], 2, true, 12)),
    one(groupNorm([2, 10, 6], 2, false, 10)),
    // Clusters of one to eight blocks, some with rows for every unrolled copy, fewer rows than others, or none.
    ...(
      [
        [[1, 35, 1024], 2, true, 1],
        [[2, 9, 24], 6, false, 4],
        [[1, 75, 40], 4, true, 4],
        [[1, 37, 1000], 2, false, 4],
        [[1, 35, 8], 2, true, 8],
        // A slab in both tensors, and slabs in one of them each.
        [[1, 35, 24], 4, true, 4, 16],
        [[2, 9, 8], 2, false, 4, 8],
      ] as const
    ).map(([x, groups, silu, multiprocessors, skip]) => ({
      sample: groupNorm(x, groups, silu, skip),
      multiprocessors,
      hopper: {},
    })),
    one(groupNorm([2, 9, 120], 40, true)),
    // Gradients of x alone, as adapters want them, or of the weight alone.
    ...frozen(groupNorm([2, 40, 12], 3, true)),
    ...frozen(groupNorm([2, 40, 16], 2, true)).map((further) => ({ ...further, hopper: {} })),
    // Rows that find no room in shared memory; in the second, too many for one block.
    { ...one(groupNorm([1, 95, 512], 1, true)), sharedBytes: 70000, hopper: {} },
    { ...one(groupNorm([2, 60, 40], 4, false)), sharedBytes: 17400, hopper: {} },
  ],
  // Blocks of several steps of eight rows, and more blocks than their sums' joining reads at once.
  layer_norm: [
    one(layerNorm([5, 1030])),
    one(layerNorm([70, 40])),
    one(layerNorm([70, 33])),
    { sample: layerNorm([2100, 8]), multiprocessors: 132 },
    ...frozen(layerNorm([9, 40])),
    ...frozen(layerNorm([9, 33])),
    // Rows that lie in registers, and rows that do not.
    ...(
      [
        [9, 320],
        [3, 640],
        [3, 1280],
        [2, 1284],
        [5, 1030],
        [70, 33],
      ] as const
    ).map((x) => ({ ...one(layerNorm(x)), hopper: {} })),
  ],
  // Rows enough for several chunks, and more of them than an unrolled turn joins.
  weight_norm: (
    [
      [700, 8],
      [2100, 68],
      [1300, 33],
    ] as const
  ).map(([rows, c]) =>
    one({
      inputs: { x: [rows, c], magnitude: [c], norms: [c] },
      attrs: {},
      dtypes: { magnitude: 'float32', norms: 'float32' },
      nonnegative: ['norms'],
      frozen: ['norms'],
    }),
  ),
  // More jobs than the grid has blocks: what a block leaves in shared memory has to be read before its next job writes there.
  permute: [one({ inputs: { x: [40, 2, 3, 2] }, attrs: { order: [0, 2, 3, 1] } })],
  mse: [one({ inputs: { prediction: [40, 50], target: [40, 50], weights: [40] }, attrs: { delta: 0.5 } })],
  huber: [one({ inputs: { prediction: [40, 50], target: [40, 50], weights: [40] }, attrs: { delta: 0.5 } })],
  adafactor: [
    one(adafactorSample([600, 500], 0)),
    one(adafactorSample([290_001], 1)),
    one(adafactorSample([7], 0)),
    // Tiles in numbers for every unrolled copy of a loop over them, and more parameters than the grid has blocks.
    one(adafactorSample([1290, 3], 1)),
    one(adafactorSample([1030, 24], 0)),
    one(adafactorSample([20, 1304], 0)),
    one(adafactorSample([9, 1032], 1)),
    ...[[9, 16], [2, 3, 3, 8], [5]].map((shape) => ({ ...one(adafactorSample(shape, 0)), together: 40 })),
  ],
  prodigy_moments: [
    one(momentsSample([300_000], 0)),
    { ...one(momentsSample([10], 1)), together: 40 },
    { ...one(momentsSample([8200], 0)), together: 3 },
  ],
  prodigy_d: [one(noGradients)],
  // More chunks than blocks, which write their shared memory again.
  fp8_scale: [one({ inputs: { x: [270_000] }, attrs: {} })],
  sum_squares: [
    one({ inputs: { sums: [3], x: [300_000] }, attrs: { index: 1 }, dtypes: { sums: 'float32' } }),
    {
      ...one({ inputs: { sums: [3], x: [10] }, attrs: { index: 1 }, dtypes: { sums: 'float32' } }),
      together: 40,
    },
  ],
};

/** All that an op is run on in a storage type: its record's samples, and these. */
export function samplesOf(record: AnyRecord, dtype: FloatDType): FurtherSample[] {
  const own = record.samples.map((sample): FurtherSample => ({ sample, multiprocessors: 4 }));
  const several = record.updates ? own.slice(-2).map((further) => ({ ...further, together: 3 })) : [];
  return [...own, ...several, ...(furtherSamples[record.name] ?? [])]
    .filter(({ hopper, large, float32 }) =>
      dtype === 'float32' ? float32 || !(hopper || large) : float32 !== true,
    )
    .map((further, i) => {
      const { sample } = further;
      return { ...further, sample: { ...sample, attrs: withDtype(sample.attrs, dtype, i) } };
    });
}
