// Normals as PyTorch's CUDA generator draws them (curand's Philox4x32-10 and Box-Muller), which A1111 and stable-diffusion.cpp start
// from unless told otherwise. On a GPU each thread takes the first of its four normals: so it is for tensors of no more
// elements than the GPU has threads at once, as the latents of a picture, and up to the last bits, as a GPU's sine is its own.
import { philox } from '../../engine/philox.ts';
import { wholeSeed } from './torch_random.ts';

const INVERSE = Math.fround(2 ** -32);
const ANGLE = Math.fround(2 ** -32 * 2 * Math.PI);

/** torch.Generator('cuda'): calls advance one stream. */
export class CudaGenerator {
  readonly #key: readonly [low: number, high: number];
  /** Calls so far. */
  #offset = 0;

  /** @param seed a whole number of up to 64 bits */
  constructor(seed: number | bigint) {
    const bits = BigInt.asUintN(64, wholeSeed(seed));
    this.#key = [Number(bits & 0xffffffffn), Number(bits >> 32n)];
  }

  /** torch.randn of a contiguous float32 tensor with `n` elements. */
  randn(n: number): Float32Array {
    const words = new Uint32Array(4);
    const offset = this.#offset++;
    return Float32Array.from({ length: n }, (_, i) => {
      philox(words, offset, 0, i, 0, ...this.#key);
      const u = Math.fround(Math.fround(words[0] * INVERSE) + INVERSE / 2);
      const v = Math.fround(Math.fround(words[1] * ANGLE) + ANGLE / 2);
      return Math.sqrt(-2 * Math.log(u)) * Math.sin(v);
    });
  }
}
