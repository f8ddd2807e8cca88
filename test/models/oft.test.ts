// Rotations out of skew matrices against elimination in float64.
import { type Test, test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { cayley } from '../../models/adapters/cayley.ts';
import { devices } from '../support/models_golden.ts';

/** 2 Q (I - Q)^-1 by elimination with pivots: X (I - Q) = 2 Q, transposed (I + Q) X^T = -2 Q. */
function eliminated(q: Float64Array, b: number): Float64Array {
  const rows = Array.from({ length: b }, (_, i) =>
    Float64Array.from({ length: 2 * b }, (_, k) =>
      k < b ? Number(i === k) + q[i * b + k] : -2 * q[i * b + k - b],
    ),
  );
  for (let i = 0; i < b; i++) {
    let pivot = i;
    for (let k = i; k < b; k++) if (Math.abs(rows[k][i]) > Math.abs(rows[pivot][i])) pivot = k;
    [rows[i], rows[pivot]] = [rows[pivot], rows[i]];
    const own = rows[i].map((x) => x / rows[i][i]);
    rows[i] = own;
    for (let k = 0; k < b; k++)
      if (k !== i) {
        const factor = rows[k][i];
        rows[k] = rows[k].map((x, at) => x - factor * own[at]);
      }
  }
  return Float64Array.from({ length: b * b }, (_, at) => rows[at % b][b + Math.floor(at / b)]);
}

/** A skew matrix of that Frobenius norm; some of its planes hardly turn. */
function skew(b: number, norm: number): Float64Array {
  const q = Float64Array.from({ length: b * b }, (_, at) => {
    const [i, k] = [Math.floor(at / b), at % b];
    return Math.sin(7 * i + 3 * k) - Math.sin(7 * k + 3 * i);
  });
  const length = Math.hypot(...q) || 1;
  return Float64Array.from(new Float32Array(q.map((x) => (x * norm) / length)));
}

function rotations(t: Test, device: Device): void {
  const before = device.memory.storages;
  for (const [b, norm] of [
    [1, 0],
    [4, 1e-5],
    [5, 0.3],
    [8, 2],
    [24, 20],
    [9, 90],
  ]) {
    const q = skew(b, norm);
    const want = eliminated(q, b);
    const most = Math.max(...want.map(Math.abs));
    for (const longest of [undefined, norm / Math.SQRT2]) {
      const two = new Float32Array([...q, ...q.map((x) => -x)]);
      const got = noGrad(() => scope(() => cayley(tensor(two, [2, b, b], { device }), longest).floats()));
      // (I + Q)^-1 (I - Q) is R's transpose.
      const off = [...want.keys()].map((at) => {
        const turned = b * b + (at % b) * b + Math.floor(at / b);
        return Math.max(Math.abs(got[at] - want[at]), Math.abs(got[turned] - want[at]));
      });
      t.ok(
        Math.max(...off) <= (2e-6 + 1.5e-7 * norm) * most,
        `${device.name}: [${b}, ${b}] of norm ${norm}: ${Math.max(...off)} of ${most}`,
      );
    }
  }
  const far = noGrad(() => scope(() => cayley(tensor(skew(8, 400), [1, 8, 8], { device })).floats()));
  t.ok(far.every(Number.isNaN), 'what turns too far is no number, and not a wrong one');
  t.equal(device.memory.storages, before, 'live tensors');
}

test('rotations are those of elimination', (t) => {
  for (const device of devices) rotations(t, device);
  t.end();
});
