// Lifetimes: a scope frees every tensor made inside it except those its function returns. module() and backward() open
// scopes, so model code never does. JavaScript's collector cannot see device memory, which rules out finalizers.
import type { Tensor } from './tensor.ts';

interface Scope {
  readonly tensors: Set<Tensor>;
  /** What else to free if the scope ends in an error: what the tape saved. */
  readonly undo: (() => void)[];
}

let current: Scope | undefined;
/** What built() would free. */
let lasting: Set<Tensor> | undefined;

/** Called by every new tensor: it belongs to the innermost open scope. */
export function track(tensor: Tensor): void {
  if (current) current.tensors.add(tensor);
  else lasting?.add(tensor);
}

/** Has `undo` called if the scope that is open now, or one around it, ends in an error. */
export function onFailure(undo: () => void): void {
  current?.undo.push(undo);
}

/** Takes a tensor out of its scope: it lives until release() (parameters, optimizer state, caches). */
export function keep<T extends Tensor>(tensor: T): T {
  current?.tensors.delete(tensor);
  lasting?.add(tensor);
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

/** Runs `fn`, which makes tensors that outlive it (a model, an optimizer), and frees them if it ends in an error. */
export function built<R>(fn: () => R): R {
  const outer = lasting;
  const mine = new Set<Tensor>();
  lasting = mine;
  try {
    const result = fn();
    for (const tensor of mine) outer?.add(tensor);
    return result;
  } catch (error) {
    for (const tensor of mine) tensor.release();
    throw error;
  } finally {
    lasting = outer;
  }
}

/** Runs `fn` and frees the tensors it made but does not return (found in arrays and plain objects too). */
export function scope<R>(fn: () => R): R {
  const outer = current;
  const mine: Scope = { tensors: new Set(), undo: [] };
  current = mine;
  try {
    const result = fn();
    for (const tensor of tensorsIn(result)) {
      if (mine.tensors.delete(tensor)) (outer?.tensors ?? lasting)?.add(tensor);
    }
    for (const undo of mine.undo) outer?.undo.push(undo);
    return result;
  } catch (error) {
    for (const undo of mine.undo) undo();
    throw error;
  } finally {
    current = outer;
    for (const tensor of mine.tensors) tensor.release();
  }
}

/** What layers make of x, one after the other. What lies between two of them is freed when the second has run. */
export function through(x: Tensor, layers: Iterable<(x: Tensor) => Tensor>): Tensor {
  let y = x;
  for (const layer of layers) {
    const before = y;
    y = layer(before);
    if (before !== x && before !== y) before.release();
  }
  return y;
}

/** The tensors in a value, its arrays, the values of its maps, and its plain objects. */
export function* tensorsIn(value: unknown): Generator<Tensor> {
  if (typeof value !== 'object' || value === null) return;
  if (isTensor(value)) yield value;
  else if (Array.isArray(value)) for (const item of value) yield* tensorsIn(item);
  else if (value instanceof Map || isPlain(value)) {
    for (const item of value instanceof Map ? value.values() : Object.values(value)) yield* tensorsIn(item);
  }
}

/** A copy of a value in which `replace` has had each tensor that tensorsIn finds. */
export function mapTensors(value: unknown, replace: (tensor: Tensor) => Tensor): unknown {
  if (typeof value !== 'object' || value === null) return value;
  if (isTensor(value)) return replace(value);
  if (Array.isArray(value)) return value.map((item) => mapTensors(item, replace));
  if (value instanceof Map) return new Map([...value].map(([key, item]) => [key, mapTensors(item, replace)]));
  if (!isPlain(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, mapTensors(item, replace)]));
}

const isPlain = (value: object): boolean => Object.getPrototypeOf(value) === Object.prototype;

// By shape rather than by class: importing the class would make scope and tensor import each other at run time.
const isTensor = (value: object): value is Tensor => 'dtype' in value && 'release' in value;
