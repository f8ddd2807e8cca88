// Scalar functions and their derivatives, in float64: the definitions that the reference loops of several ops share.

/** Error function (Abramowitz & Stegun 7.1.26 is too coarse): series below 2.5, continued fraction above; ~1e-15. */
function erf(x: number): number {
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  if (a < 2.5) {
    let term = a;
    let sum = a;
    for (let n = 1; n < 60; n++) {
      term *= (-a * a) / n;
      sum += term / (2 * n + 1);
    }
    return Math.sign(x) * sum * (2 / Math.sqrt(Math.PI));
  }
  let fraction = 0;
  for (let k = 60; k > 0; k--) fraction = k / 2 / (a + fraction);
  return Math.sign(x) * (1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + fraction));
}

/** The nearest whole number, ties to even. */
export function rint(x: number): number {
  const floor = Math.floor(x);
  const half = x - floor;
  return floor + (half > 0.5 || (half === 0.5 && floor % 2 !== 0) ? 1 : 0);
}

export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

export interface Scalar {
  f(x: number): number;
  /** Its derivative. */
  df(x: number): number;
}

export const silu: Scalar = {
  f: (x) => x * sigmoid(x),
  df: (x) => sigmoid(x) * (1 + x * (1 - sigmoid(x))),
};

/** x Φ(x), exact (not the tanh form). */
export const gelu: Scalar = {
  f: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  df: (x) => 0.5 * (1 + erf(x / Math.SQRT2)) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI),
};

/** x σ(1.702 x), as CLIP ViT-L was trained with. */
export const quickGelu: Scalar = {
  f: (x) => x * sigmoid(1.702 * x),
  df: (x) => sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - sigmoid(1.702 * x))),
};

export const identity: Scalar = { f: (x) => x, df: () => 1 };
