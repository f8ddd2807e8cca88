// Weights for benchmarks, where only their size and spread matter: torch's default uniform +-1/sqrt(fan in), read again and
// again from a short seeded pool per spread, because drawing 2.6 billion numbers would take longer than using them.
import type { Device } from '../engine/device.ts';
import { type AnyModule, namedParameters, type Parameter } from '../engine/module.ts';
import { unscoped } from '../engine/scope.ts';
import { empty, sizeOf } from '../engine/tensor.ts';
import { bytesPerElement, encodeNumbers, type FloatDType } from '../io/dtype.ts';

const POOL = 1 << 20;

/** Uniform numbers in [-1, 1), the same for a seed everywhere (mulberry32). */
export function uniforms(count: number, seed: number): Float32Array {
  let state = seed >>> 0;
  return Float32Array.from({ length: count }, () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 31 - 1;
  });
}

/** The bound of a parameter's uniform weights; undefined for a norm's, which are 1. */
function bound(name: string, { shape }: Parameter): number | undefined {
  if (shape.length === 1) return name.endsWith('bias') ? 0 : undefined;
  return /embedding\.weight$/.test(name) ? 0.02 : 1 / Math.sqrt(sizeOf(shape.slice(1)));
}

/** Raw bytes of a random parameter by its checkpoint key, `size` elements long: what the pool holds, over and over. */
export function randomBytes(seed: number, dtype: FloatDType): (name: string, p: Parameter) => Uint8Array {
  const pools = new Map<number | undefined, Uint8Array>();
  const base = uniforms(POOL, seed);
  const poolOf = (scale: number | undefined): Uint8Array => {
    const known = pools.get(scale);
    if (known) return known;
    const values = scale === undefined ? new Float32Array(POOL).fill(1) : base.map((x) => x * scale);
    const made = encodeNumbers(values, dtype);
    pools.set(scale, made);
    return made;
  };
  return (name, p) => {
    const pool = poolOf(bound(name, p));
    const out = new Uint8Array(p.size * bytesPerElement[dtype]);
    for (let at = 0; at < out.length; at += pool.length) out.set(pool.subarray(0, out.length - at), at);
    return out;
  };
}

/** Fills every parameter of `module` on `device`. */
export function fillRandom(module: AnyModule, device: Device, dtype: FloatDType, seed = 0): void {
  const bytes = randomBytes(seed, dtype);
  for (const [name, p] of namedParameters(module)) {
    const tensor = unscoped(() => empty(p.memoryShape, { device, dtype }));
    if (device.name !== 'stand-in') tensor.upload(bytes(name, p));
    p.tensor = tensor;
  }
}

/** As fillRandom, but a transformer's blocks all hold its first one's weights: a big model in little memory. */
export function fillSharingBlocks(module: AnyModule, device: Device, dtype: FloatDType): void {
  const bytes = randomBytes(0, dtype);
  const parameters = namedParameters(module);
  for (const [name, p] of parameters) {
    const first = parameters.get(
      name.replace(/transformer_blocks\.\d+/, 'transformer_blocks.0'),
    ) as Parameter;
    p.tensor = unscoped(() =>
      first === p ? empty(p.memoryShape, { device, dtype }).upload(bytes(name, p)) : first.tensor.handle(),
    );
  }
}
