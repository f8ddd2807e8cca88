// A module is a callable that owns named children. Child names are the checkpoint's own (snake_case), so the tree spells
// every key (`down_blocks.1.resnets.0.time_emb_proj.weight`) and no mapping table exists. Each call opens a scope, so a
// block's temporaries are freed when it returns, and an error on the way out learns the path it came from.
import type { FloatDType } from '../io/dtype.ts';
import { clearGrad, noGrad } from './grad.ts';
import type { Fp8Weight } from './ops/fp8.ts';
import { fromQ8, type Q8Weight, toQ8 } from './ops/q8.ts';
import { keep, scope, tensorsIn } from './scope.ts';
import { LocatedError, ShapeError, sizeOf, type Tensor } from './tensor.ts';

/** A weight: its shape as the checkpoint spells it, and its tensor once loaded. */
export class Parameter {
  /** The checkpoint's shape. Layout `conv` is stored [o, i, kh, kw] there and [o, kh, kw, i] in memory. */
  readonly shape: readonly number[];
  readonly layout: 'plain' | 'conv';
  path = '';
  /** What a tensor that is set becomes before it is kept: adapters merged while a model is loaded. */
  incoming: ((given: Tensor) => Tensor) | undefined;
  /** Keeps what is set in 8-bit integers (ops/q8.ts), where it is not to be trained. Said before it is loaded. */
  inQ8 = false;
  #tensor: Tensor | undefined;
  #fp8: Fp8Weight | undefined;
  #q8: Q8Weight | undefined;

  constructor(shape: readonly number[], layout: 'plain' | 'conv' = 'plain') {
    this.shape = shape;
    this.layout = layout;
  }

  /** The shape in memory. */
  get memoryShape(): readonly number[] {
    const [o, i, kh, kw] = this.shape;
    return this.layout === 'conv' ? [o, kh, kw, i] : this.shape;
  }

  get size(): number {
    return sizeOf(this.shape);
  }

  get loaded(): boolean {
    return (this.#tensor ?? this.#fp8 ?? this.#q8) !== undefined;
  }

  get trained(): boolean {
    return this.#tensor?.requiresGrad ?? false;
  }

  /** Where the weight is, and its type as a product takes it. */
  get place(): { device: Tensor['device']; dtype: FloatDType } {
    const { device, dtype } = this.#q8?.scale ?? this.tensor;
    return { device, dtype: dtype as FloatDType };
  }

  /** The weight; decoded anew each time, for the scope that is open, where it is kept in 8-bit integers. */
  get tensor(): Tensor {
    if (this.#q8) return fromQ8(this.#q8);
    if (!this.#tensor)
      throw new Error(`parameter ${this.path || `[${this.shape}]`} was used before it was loaded`);
    return this.#tensor;
  }

  set tensor(value: Tensor) {
    if (value.shape.join() !== this.memoryShape.join()) {
      throw new ShapeError(
        `parameter ${this.path} is [${this.memoryShape}] in memory, given [${value.shape}]`,
      );
    }
    const { incoming } = this;
    const kept = incoming ? replaced(value, () => incoming(value)) : value;
    if (kept !== this.#tensor) this.#release();
    if (this.inQ8) this.#q8 = replaced(kept, () => toQ8(kept));
    else this.#tensor = kept;
  }

  /** The weight in 8-bit floats, where it has taken the tensor's place: for linear layers, and for sampling alone. */
  get fp8(): Fp8Weight | undefined {
    return this.#fp8;
  }

  set fp8(value: Fp8Weight) {
    this.unload();
    this.#fp8 = value;
  }

  /** The weight in 8-bit integers, where it is kept so. */
  get q8(): Q8Weight | undefined {
    return this.#q8;
  }

  set q8(value: Q8Weight) {
    this.unload();
    this.#q8 = value;
  }

  #release(): void {
    for (const t of [this.#tensor, this.#fp8?.bytes, this.#fp8?.scale, this.#q8?.bytes, this.#q8?.scale])
      t?.release();
    this.#tensor = undefined;
    this.#fp8 = undefined;
    this.#q8 = undefined;
  }

  /** Frees what is loaded and what gradient it has; the parameter can be loaded again. */
  unload(): void {
    if (this.#tensor) clearGrad(this.#tensor);
    this.#release();
  }
}

/** What `made` makes of a tensor, which is released. */
function replaced<R extends Tensor | Q8Weight>(given: Tensor, made: () => R): R {
  const result = noGrad(() => scope(made));
  for (const each of tensorsIn(result)) keep(each);
  if (result !== given) given.release();
  return result;
}

export const parameter = (shape: readonly number[], layout: 'plain' | 'conv' = 'plain'): Parameter =>
  new Parameter(shape, layout);

// biome-ignore lint/suspicious/noExplicitAny: a module's own argument types are kept by Module<…>; the tree walk needs none.
export type AnyModule = { (...args: any[]): unknown; readonly children: Children };
export type Child = AnyModule | Parameter | readonly (AnyModule | undefined)[] | undefined;
export type Children = { readonly [name: string]: Child };

export interface Module<A extends readonly unknown[], R, C extends Children = Children> {
  (...args: A): R;
  readonly children: C;
}

const paths = new WeakMap<object, string>();

type Watcher = (path: string, output: unknown, args: readonly unknown[]) => void;
let watcher: Watcher | undefined;

/** Runs `fn` and shows `see` every module call in it as it returns. namedParameters() must have given the paths before. */
export function watchCalls<R>(see: Watcher, fn: () => R): R {
  const before = watcher;
  watcher = see;
  try {
    return fn();
  } finally {
    watcher = before;
  }
}

/** Joins children and a forward function into a callable; forward receives the children first. */
export function module<C extends Children, A extends readonly unknown[], R>(
  children: C,
  forward: (children: C, ...args: A) => R,
): Module<A, R, C> {
  const call = (...args: A): R => {
    try {
      const output = scope(() => forward(children, ...args));
      watcher?.(paths.get(call) ?? '', output, args);
      return output;
    } catch (error) {
      throw located(error, paths.get(call));
    }
  };
  return Object.assign(call, { children });
}

/** Adds `in <path>` to an error that wants it, once, at the innermost module that has a path. */
function located(error: unknown, path: string | undefined): unknown {
  if (error instanceof LocatedError && path && !error.message.includes('\n    in '))
    error.message += `\n    in ${path}`;
  return error;
}

/** Every parameter by its checkpoint key, in tree order. Gives each module and parameter its path on the way. */
export function namedParameters(root: AnyModule): Map<string, Parameter> {
  const found = new Map<string, Parameter>();
  visit(root, '', found);
  return found;
}

function visit(child: Child, path: string, found: Map<string, Parameter>): void {
  if (child === undefined) return;
  if (child instanceof Parameter) {
    child.path = path;
    found.set(path, child);
  } else if (typeof child === 'function') {
    paths.set(child, path);
    for (const [name, grandchild] of Object.entries(child.children))
      visit(grandchild, path ? `${path}.${name}` : name, found);
  } else child.forEach((item, i) => void visit(item, `${path}.${i}`, found));
}

/** Where a loaded module's weights are, and their type: its first one's. */
export function placeOf(root: AnyModule): { device: Tensor['device']; dtype: FloatDType } {
  const [{ place }] = namedParameters(root).values();
  return place;
}

/** Whether any loaded parameter below `child` collects a gradient. */
export function isTrained(child: Child): boolean {
  if (child === undefined) return false;
  if (child instanceof Parameter) return child.trained;
  return (typeof child === 'function' ? Object.values(child.children) : child).some(isTrained);
}

/** Number of weights, counted on shapes alone. */
export const parameterCount = (root: AnyModule): number =>
  [...namedParameters(root).values()].reduce((total, p) => total + p.size, 0);

/** Frees every loaded parameter of the tree. */
export function unload(root: AnyModule): void {
  for (const p of namedParameters(root).values()) p.unload();
}
