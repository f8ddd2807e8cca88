// Training losses over [n, ...]: the mean over images of weight_i times the mean over elements, so that per-image
// weights such as min-SNR multiply what an unweighted mean would give. The result has shape [1], float32.
import { type Argument, apply, defineOp, type RefTensors, sameFloat, type Tensors } from '../op.ts';
import { ShapeError, sizeOf, type Tensor } from '../tensor.ts';
import { awkwardSizes } from './samples.ts';

interface LossAttrs {
  delta: number;
}

interface Loss {
  f(difference: number, delta: number): number;
  df(difference: number, delta: number): number;
}

const huberFormula: Loss = {
  f: (r, delta) => (Math.abs(r) <= delta ? 0.5 * r * r : delta * (Math.abs(r) - 0.5 * delta)),
  df: (r, delta) => Math.max(-delta, Math.min(delta, r)),
};

const dims = (shape: readonly number[]): [number, number] => [shape[0], sizeOf(shape.slice(1))];

function checkInputs(name: string, t: Tensors): void {
  const { prediction, target, weights } = t;
  if (prediction.shape.join() !== target.shape.join())
    throw new ShapeError(`${name}: prediction [${prediction.shape}] and target [${target.shape}] differ`);
  if (weights && (weights.size !== prediction.shape[0] || weights.dtype !== 'float32'))
    throw new ShapeError(
      `${name}: weights are ${weights.dtype} [${weights.shape}], not a float32 for each of ${prediction.shape[0]} images`,
    );
  sameFloat(name, t, 'prediction', 'target');
}

function eachDifference(t: RefTensors, visit: (i: number, share: number, difference: number) => void): void {
  const [n, inner] = dims(t.prediction.shape);
  for (let i = 0; i < n * inner; i++) {
    const weight = t.weights ? t.weights.data[Math.floor(i / inner)] : 1;
    visit(i, weight / (n * inner), t.prediction.data[i] - t.target.data[i]);
  }
}

function defineLoss(name: 'mse' | 'huber', { f, df }: Loss) {
  const inputs = ({ prediction, target, weights }: Tensors, { delta }: LossAttrs): Argument[] => {
    const sizes = [...dims(prediction.shape), ...(name === 'huber' ? [delta] : [])];
    return [prediction, target, weights, ...sizes];
  };
  return defineOp<LossAttrs>({
    name,
    outputs(t) {
      checkInputs(name, t);
      return { y: { shape: [1], dtype: 'float32' } };
    },
    saves: ['prediction', 'target', 'weights'],
    forward: (t, a, launch) => launch(`${name}_forward`, [t.y, ...inputs(t, a)]),
    backward(t, a, launch) {
      if (t.dtarget || t.dweights) throw new Error(`${name}: only the prediction has a gradient`);
      launch(`${name}_backward`, [t.dprediction, t.dy, ...inputs(t, a)]);
    },
    reference: {
      forward(t, { delta }) {
        let total = 0;
        eachDifference(t, (_, share, r) => {
          total += share * f(r, delta);
        });
        t.y.data[0] = total;
      },
      backward(t, { delta }) {
        eachDifference(t, (i, share, r) => {
          t.dprediction.data[i] = t.dy.data[0] * share * df(r, delta);
        });
      },
    },
    samples: [
      { inputs: { prediction: [1, 1], target: [1, 1] }, attrs: { delta: 0.5 } },
      { inputs: { prediction: [3, 17], target: [3, 17], weights: [3] }, attrs: { delta: 0.5 } },
      { inputs: { prediction: [2, 4, 4, 4], target: [2, 4, 4, 4] }, attrs: { delta: 0.5 } },
      ...awkwardSizes.map(([a, b], i) => {
        const x = [1 + (i % 4), a, b];
        const inputs = { prediction: x, target: x };
        return { inputs: i % 2 ? { ...inputs, weights: [x[0]] } : inputs, attrs: { delta: 0.5 } };
      }),
    ],
  });
}

const mseOp = defineLoss('mse', { f: (r) => r * r, df: (r) => 2 * r });
const huberOp = defineLoss('huber', huberFormula);

/** Mean squared error; weights [n] float32 multiply each image's mean. */
export const mse = (prediction: Tensor, target: Tensor, weights?: Tensor): Tensor =>
  apply(mseOp, { prediction, target, weights }, { delta: 0 });

/** Huber loss as torch's huber_loss: quadratic within delta, linear beyond. */
export const huber = (prediction: Tensor, target: Tensor, weights?: Tensor, delta = 1): Tensor =>
  apply(huberOp, { prediction, target, weights }, { delta });
