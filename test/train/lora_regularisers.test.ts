// What keeps a LoRA from learning too much, against kohya's trainer (golden/lycoris.py): dropout behind A, with its draws replaced by a
// formula, and the bound on a layer's norm. Then that a run's draws are the pictures' own: the same however they are dealt out, in a
// recomputation, and after a resume; and that what is only measured drops nothing.
import { createHash } from 'node:crypto';
import { test } from 'tap';
import { currentDrop, dropped, withDrop } from '../../engine/dropout.ts';
import { backward, clearGrad, gradOf } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import type { TensorInfo } from '../../io/tensor_file.ts';
import { openMaterials } from '../../train/materials.ts';
import type { PassInputs } from '../../train/objective/pass_inputs.ts';
import { dropoutOf, undropped } from '../../train/parts/dropout.ts';
import { boundNorms } from '../../train/parts/max_norm.ts';
import { place } from '../../train/passes/pass.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { validationLoss } from '../../train/validation.ts';
import {
  adaptedLayer,
  checkLayer,
  fill,
  fromMemory,
  type LayerCase,
  numbers,
  release,
  toMemory,
  unpacked,
} from '../support/adapter_golden.ts';
import { goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { basic, device, locate, resumes, run, sessionOf, silent } from '../support/small_runs.ts';

interface Bounded {
  by: 'max norm';
  weight: number[];
  rank: number;
  alpha: number;
  bound: number;
  after: string[];
}

const lines = goldenLines<LayerCase | Bounded>('lycoris');

/** What kohya's LoRAModule keeps, of its `call`-th draw: number i of it is ((7 i + 3 k) mod 16) / 16. */
const kept = (count: number, call: number, p: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => (((7 * i + 3 * call) % 16) / 16 > p ? 1 : 0));

test("what is dropped and what is made larger is kohya's", (t) => {
  const cases = lines.filter((line): line is LayerCase => line.by === 'kohya');
  t.equal(cases.length, 3);
  for (const on of devices)
    for (const golden of cases) {
      const { network_dropout = 0, rank_dropout = 0, rank, x: shape } = golden;
      const settings = resolveRun(
        { lora: { network_dropout, rank_dropout }, train: { target: 'lora' } },
        't',
        't',
      );
      checkLayer(t, golden, on, (_, root, x) => {
        let inner: readonly number[] = [];
        const rehearse = () =>
          scope(() => {
            root(x);
          });
        withDrop(
          (_name, y) => {
            inner = y.shape;
            return y;
          },
          () => rehearse(),
        );
        const dropout = dropoutOf(settings, rehearse);
        const given: PassInputs = {
          x: { shape: x.shape, values: new Float32Array(x.size), dtype: 'float32' },
        };
        const { dropout: mask } = dropout.inputs(given, Array<number>(shape[0]).fill(0), 0);
        const [n, ...rest] = inner;
        const torch = rest.length === 3 ? [n, rank, rest[0], rest[1]] : inner;
        const neurons = network_dropout
          ? kept(sizeOf(inner), 0, network_dropout)
          : new Float32Array(sizeOf(inner)).fill(1);
        const ranks = rank_dropout ? kept(n * rank, network_dropout ? 1 : 0, rank_dropout) : undefined;
        const per = sizeOf(inner) / n / rank;
        const values = network_dropout ? toMemory(neurons, torch) : (ranks as Float32Array);
        const both = values.map((value, i) =>
          network_dropout && ranks ? value * ranks[Math.floor(i / per / rank) * rank + (i % rank)] : value,
        );
        t.equal(both.length, sizeOf(mask.shape), 'a number for each');
        return dropout.during({ x, dropout: tensor(both, mask.shape, { device: on }) }, () => root(x));
      });
    }
  t.end();
});

/** What a layer makes of x without its adapter, in float64, in torch's order. */
function baseOf({
  weight,
  x: shape,
  stride = 1,
  padding = 0,
}: LayerCase): (channel: number, at: number) => number {
  const [, i, kernel = 1] = weight;
  const [w, bias, x] = [numbers(weight, 0), numbers(weight.slice(0, 1), 1), numbers(shape, 2)];
  if (shape.length !== 4) return (o, row) => bias[o] + sum(i, (k) => w[o * i + k] * x[row * i + k]);
  const [, , high, wide] = shape;
  const columns = Math.floor((wide + 2 * padding - kernel) / stride) + 1;
  return (o, at) => {
    const [top, left] = [Math.floor(at / columns), at % columns].map((p) => p * stride - padding);
    return (
      bias[o] +
      sum(i * kernel * kernel, (tap) => {
        const [row, column] = [top + (Math.floor(tap / kernel) % kernel), left + (tap % kernel)];
        if (row < 0 || row >= high || column < 0 || column >= wide) return 0;
        const channel = Math.floor(tap / kernel / kernel);
        return w[o * i * kernel * kernel + tap] * x[(channel * high + row) * wide + column];
      })
    );
  };
}

const sum = (count: number, term: (k: number) => number): number => {
  let total = 0;
  for (let k = 0; k < count; k++) total += term(k);
  return total;
};

test("of LyCORIS's adapters outputs are dropped, and nothing is made larger", (t) => {
  const cases = lines.filter((line): line is LayerCase => line.by === 'lycoris');
  t.equal(cases.length, 13);
  for (const on of devices)
    for (const golden of cases) {
      const [{ root, adapter }, whole] = [adaptedLayer(golden, on), unpacked(golden.y)];
      const [n, ...rest] = golden.x;
      const [o] = golden.weight;
      const conv = rest.length === 3;
      // An OFT has no ranks, but what it adds to a layer can be dropped, too.
      const rate = golden.algo === 'oft' ? 'module_dropout' : 'rank_dropout';
      const lora = { algo: golden.algo, [rate]: 0.4 };
      const settings = resolveRun({ lora, train: { target: 'lora' } }, 't', 't');
      scope(() => {
        const shape = conv ? [n, rest[1], rest[2], rest[0]] : golden.x;
        const x = tensor(toMemory(numbers(golden.x, 2), golden.x), shape, { device: on });
        const given: PassInputs = { x: { shape, values: new Float32Array(x.size), dtype: 'float32' } };
        const dropout = dropoutOf(settings, () => scope(() => void root(x)));
        const { dropout: mask } = dropout.inputs(given, Array<number>(n).fill(0), 0);
        t.same(mask.shape, [n, o], 'a number for each output');
        const kept = Float32Array.from({ length: n * o }, (_, i) => Number((7 * i + 3) % 16 > 6));
        const y = dropout.during({ x, dropout: tensor(kept, [n, o], { device: on }) }, () => root(x));
        const [, h, w] = y.shape;
        const got = conv ? fromMemory(y.floats(), [n, o, h, w]) : y.floats();
        const base = baseOf(golden);
        const pixels = conv ? h * w : 0;
        const want = whole.map((value, i) => {
          const [picture, channel, at] = conv
            ? [Math.floor(i / pixels / o), Math.floor(i / pixels) % o, i % pixels]
            : [Math.floor(i / (whole.length / n)), i % o, Math.floor(i / o)];
          const own = base(channel, at);
          return own + kept[picture * o + channel] * (value - own);
        });
        const most = Math.max(...whole.map(Math.abs));
        t.ok(maxDifference(got, want) < 4e-6 * most, `${golden.algo} [${golden.weight}] on ${on.name}`);
      });
      release(root, adapter);
    }
  t.end();
});

test("a layer's norm is bounded as kohya's trainer does", (t) => {
  const cases = lines.filter((line): line is Bounded => line.by === 'max norm');
  t.equal(cases.length, 4);
  for (const on of devices)
    for (const { weight, rank, alpha, bound, after } of cases) {
      const golden = { weight, rank, alpha, x: [] } as unknown as LayerCase;
      const { root, adapter } = adaptedLayer(golden, on);
      const parameters = new Map(adapter.matrices.map(({ key, parameter }) => [key, parameter]));
      const settings = resolveRun(
        { lora: { scale_weight_norms: bound }, train: { target: 'lora' } },
        't',
        't',
      );
      boundNorms({
        run: settings,
        task: { adapters: [{ names: [...parameters.keys()], bounded: adapter.bounded }] },
        parameters,
        optimizer: { weightOf: (name) => (parameters.get(name) as { tensor: Tensor }).tensor },
      });
      for (const [k, { part, parameter }] of adapter.matrices.entries()) {
        const own = parameter.tensor.floats();
        const got = parameter.layout === 'conv' ? fromMemory(own, parameter.shape) : own;
        t.ok(
          maxDifference(got, unpacked(after[k])) < 1e-7,
          `[${weight}] within ${bound} on ${on.name}: ${part}`,
        );
      }
      release(root, adapter);
    }
  t.end();
});

test('masks: rates, keys, and a place for every layer', (t) => {
  const shapes = { one: [2, 50, 40, 8], two: [2, 3000, 8], three: [2, 8], four: [6, 77, 8] };
  const rehearse = () =>
    scope(() => {
      for (const [name, shape] of Object.entries(shapes))
        dropped(name, tensor(new Float32Array(sizeOf(shape)), shape, { device }));
    });
  const masksOf = (lora: RunInput['lora'], keys: number[] = [11, 12], epoch = 3, seed = 1) => {
    const settings = resolveRun({ lora, train: { target: 'lora' }, seed }, 't', 't');
    return dropoutOf(settings, rehearse).inputs({}, keys, epoch).dropout;
  };
  const zeros = (values: ArrayLike<number>) =>
    Array.from(values).filter((x) => x === 0).length / values.length;
  const all = 50 * 40 * 8 + 3000 * 8 + 8 + 3 * 77 * 8;
  for (const p of [0.01, 0.1, 0.5, 0.9]) {
    const mask = masksOf({ network_dropout: p });
    t.same(mask.shape, [2, all]);
    const deviation = Math.sqrt((p * (1 - p)) / (2 * all));
    t.ok(Math.abs(zeros(mask.values) - p) < 4 * deviation, `${p}: ${zeros(mask.values)}`);
  }
  const ranks = masksOf(
    { rank_dropout: 0.5 },
    Array.from({ length: 2 }, (_, i) => i),
  );
  t.same(ranks.shape, [2, 8 + 8 + 8 + 3 * 8], 'a number for each rank of each row');
  const both = masksOf({ rank_dropout: 0.5, network_dropout: 1e-9 }).values;
  const column = (k: number) => both.filter((_, i) => i < 50 * 40 * 8 && i % 8 === k);
  for (let k = 0; k < 8; k++) t.ok([0, 1].includes(zeros(column(k))), `rank ${k} is there or not`);
  t.equal(new Set(Array.from({ length: 8 }, (_, k) => zeros(column(k)))).size, 2);
  const modules = masksOf({ module_dropout: 0.5 }, [5, 6]).values;
  const whole = [0, 8, 16].map((at) => zeros(modules.slice(at, at + 8)));
  t.ok(
    whole.every((share) => share === 0 || share === 1),
    `${whole}`,
  );
  const lora = { network_dropout: 0.2, rank_dropout: 0.1, module_dropout: 0.1 };
  const text = (values: Float32Array | Int32Array) => createHash('sha256').update(values).digest('hex');
  const [ab, ba] = [masksOf(lora, [11, 12]), masksOf(lora, [12, 11])].map(({ values }) =>
    [values.slice(0, all), values.slice(all)].map(text),
  );
  t.same(ab, ba.reverse(), 'a mask is its picture’s own');
  t.not(ab[0], ab[1]);
  const others = [masksOf(lora, [11, 12], 4), masksOf(lora, [11, 12], 3, 2)].map(({ values }) =>
    text(values.slice(0, all)),
  );
  t.equal(new Set([ab[0], ...others]).size, 3, 'epoch and seed count');
  t.equal(currentDrop(), undefined);
  t.end();
});

const regular: RunInput['lora'] = {
  ...{ rank: 4, alpha: 4, targets: ['to_q', 'to_out.0', 'ff.net.2', 'conv1', 'time_emb_proj'] },
  ...{ network_dropout: 0.3, rank_dropout: 0.2, module_dropout: 0.1, scale_weight_norms: 0.02 },
};

test('a run resumes bit for bit, in each way to train', async (t) => {
  const before = device.memory.storages;
  const lora = { target: 'lora' } as const;
  await resumes(t, 'dropout', { train: lora, lora: regular });
  await resumes(t, 'dropout-texts', {
    train: { ...lora, text_encoders: true, gradient_checkpointing: true },
    lora: { ...regular, text_encoder_targets: ['q_proj', 'fc1'] },
    dataset: { ...basic('x').dataset, max_token_length: 150 },
    validation: { samples: 2 },
  });
  await resumes(t, 'dropout-bfloat16', {
    ...{ train: { ...lora, fused_backward_pass: true }, lora: regular, dtype: 'bfloat16' },
    ...{ gradient_accumulation_steps: 1, dataset: { ...basic('x').dataset, shuffle_caption: true } },
  });
  t.equal(device.memory.storages, before, 'live tensors');
});

/** The session of a run, its prepared inputs of two pictures, and gradients of passes. */
async function passes(lora: RunInput['lora'], train: RunInput['train'] = {}) {
  const input = { ...basic('passes'), ema: { decay: 0 }, train: { target: 'lora' as const, ...train }, lora };
  const materials = await openMaterials(resolveRun(input, 'test', 'test'), locate, silent);
  const session = await sessionOf(materials);
  // B is zero at first, so that A learns nothing.
  for (const [k, p] of [...session.parameters.values()].entries())
    fill(
      p,
      numbers(p.shape, k).map((x) => x / 8),
    );
  const gradients = async (...batches: number[][]) => {
    for (const samples of batches) {
      const inputs = await session.task.prepare({ bucket: 0, samples }, 2);
      scope(() => {
        const share = tensor([samples.length / batches.flat().length], [1], { device });
        backward(session.task.loss(place(inputs, device)), share);
      });
    }
    const found = [...session.parameters.values()].map(({ tensor }) =>
      scope(() => (gradOf(tensor) as Tensor).floats()),
    );
    for (const { tensor } of session.parameters.values()) clearGrad(tensor);
    return found;
  };
  return { session, gradients };
}

test('the same numbers are dropped when a block is computed again, and however pictures are dealt out', async (t) => {
  const plain = await passes({ ...regular });
  const again = await passes({ ...regular }, { gradient_checkpointing: true });
  const [kept, recomputed, split] = [
    await plain.gradients([0, 1]),
    await again.gradients([0, 1]),
    await plain.gradients([1], [0]),
  ];
  t.equal(Math.max(...kept.map((each, i) => maxDifference(each, recomputed[i]))), 0, 'to the bit');
  const most = Math.max(...kept.flatMap((each) => each.reduce((a, x) => Math.max(a, Math.abs(x)), 0)));
  t.ok(
    most > 0 && kept.every((each, i) => maxDifference(each, split[i]) < 1e-5 * most),
    'split, but for the order of sums',
  );
  const none = await passes({ ...regular, network_dropout: 0, rank_dropout: 0, module_dropout: 0 });
  const whole = await none.gradients([0, 1]);
  t.ok(
    whole.some((each, i) => maxDifference(each, kept[i]) > 1e-2 * most),
    'something is dropped',
  );
  const measured = [await validationLossOf(plain.session), await validationLossOf(none.session)];
  t.equal(measured[0], measured[1], 'validation drops nothing');
  const inputs = await plain.session.task.prepare({ bucket: 0, samples: [0] }, 2);
  const others = await none.session.task.prepare({ bucket: 0, samples: [0] }, 2);
  const digestOf = (given: PassInputs) => createHash('sha256').update(JSON.stringify(given)).digest('hex');
  t.equal(digestOf(undropped(inputs)), digestOf(others), 'no other draw is another');
  for (const { session } of [plain, again, none]) session.release();
});

const validationLossOf = (session: Awaited<ReturnType<typeof passes>>['session']) =>
  validationLoss({ ...session, run: { ...session.run, validation: { samples: 2, every_steps: 0 } } });

test('norms stay within the bound, masters too', async (t) => {
  for (const dtype of ['float32', 'bfloat16'] as const) {
    const input: RunInput = {
      ...basic(`bounded-${dtype}`),
      ...{ dtype, steps: 4, train: { target: 'lora' }, ema: { decay: 0 }, optimizer: { lr: 1e-2 } },
      lora: { rank: 2, alpha: 2, targets: ['to_q', 'conv2'], scale_weight_norms: 0.05 },
    };
    const { folder } = await run(input);
    const norms = normsIn(`${folder}/pytorch_lora_weights.safetensors`);
    t.ok(
      Math.max(...norms) < 0.05 * (dtype === 'float32' ? 1.0001 : 1.01),
      `${dtype}: at most ${Math.max(...norms)}`,
    );
    t.ok(norms.filter((norm) => norm > 0.0495).length > 5, 'which some have met');
  }
});

/** Of B A, by layer, in loops. */
function normsIn(path: string): number[] {
  const file = openSafetensors(path);
  const read = (name: string) => {
    const { dtype, shape } = file.tensors.get(name) as TensorInfo;
    return { shape, values: decodeFloats(file.read(name), dtype) };
  };
  const norms = [...file.tensors.keys()].flatMap((name) => {
    if (!name.includes('lora_A')) return [];
    const [a, b] = [read(name), read(name.replace('lora_A', 'lora_B'))];
    const [rank, inner] = [a.shape[0], a.values.length / a.shape[0]];
    let sum = 0;
    for (let o = 0; o < b.shape[0]; o++)
      for (let i = 0; i < inner; i++) {
        let x = 0;
        for (let r = 0; r < rank; r++) x += b.values[o * rank + r] * a.values[r * inner + i];
        sum += x * x;
      }
    return Math.sqrt(sum);
  });
  file.close();
  return norms;
}
