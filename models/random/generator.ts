// What a request draws its noise from, whoever's numbers these are.

/** Where noise comes from: TorchGenerator's CPU stream, or CudaGenerator's. */
export interface NoiseGenerator {
  /** `n` standard normals. Calls advance one stream. */
  randn(n: number): Float32Array;
  /** What the device makes the same numbers of (torchNormal); undefined where it cannot, and then nothing is drawn. */
  words?(n: number): Int32Array | undefined;
  /** The noise [n, c, h, w] that pictures begin with, where that is not the stream's next. */
  first?(shape: readonly number[]): Float32Array;
}
