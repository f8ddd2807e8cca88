// Lifetimes: a scope frees every tensor made inside it except those its function returns. module() and backward() open
// scopes, so model code never does. JavaScript's collector cannot see device memory, which rules out finalizers.
import type { Tensor } from './tensor.ts';

let current: Set<Tensor> | undefined;

/** Called by every new tensor: it belongs to the innermost open scope. */
export function track(tensor: Tensor): void {
  current?.add(tensor);
}

/** Takes a tensor out of its scope: it lives until release() (parameters, optimizer state, caches). */
export function keep<T extends Tensor>(tensor: T): T {
  current?.delete(tensor);
  return tensor;
}

/** Runs `fn` with no scope open: what it makes lives until someone releases it. */
export function unscoped<R>(fn: () => R): R {
  const outer = current;
  current = undefined;
  try {
    return fn();
  } finally {
    current = outer;
  }
}

/** Runs `fn` and frees the tensors it made but does not return (found in arrays and plain objects too). */
export function scope<R>(fn: () => R): R {
  const outer = current;
  const mine = new Set<Tensor>();
  current = mine;
  try {
    const result = fn();
    for (const tensor of tensorsIn(result)) {
      if (mine.delete(tensor)) outer?.add(tensor);
    }
    return result;
  } finally {
    current = outer;
    for (const tensor of mine) tensor.release();
  }
}

/** The tensors in a value, its arrays and its plain objects. */
export function* tensorsIn(value: unknown): Generator<Tensor> {
  if (typeof value !== 'object' || value === null) return;
  if (isTensor(value)) yield value;
  else if (Array.isArray(value)) for (const item of value) yield* tensorsIn(item);
  else if (isPlain(value)) {
    for (const item of Object.values(value)) yield* tensorsIn(item);
  }
}

/** A copy of a value in which `replace` has had each tensor that tensorsIn finds. */
export function mapTensors(value: unknown, replace: (tensor: Tensor) => Tensor): unknown {
  if (typeof value !== 'object' || value === null) return value;
  if (isTensor(value)) return replace(value);
  if (Array.isArray(value)) return value.map((item) => mapTensors(item, replace));
  if (!isPlain(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, mapTensors(item, replace)]));
}

const isPlain = (value: object): boolean => Object.getPrototypeOf(value) === Object.prototype;

// By shape rather than by class: importing the class would make scope and tensor import each other at run time.
const isTensor = (value: object): value is Tensor => 'dtype' in value && 'release' in value;
