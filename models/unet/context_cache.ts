// What the steps of an image share, or the tiles of its decoding, computed at the first and used by the later ones: keys and
// values of the prompt, the embedded sizes, what each resnet makes of every time of the schedule, and the upsamplers' weights
// for doubled images. Training shares nothing.
import { keep } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';

/** Tensors by what made them (a module), until release(). */
export class ContextCache {
  #made = new Map<object, readonly Tensor[]>();
  #part?: ContextCache;

  /** Another one, for what is asked of some of the rows alone, by the same modules; it is released with this one. */
  get part(): ContextCache {
    this.#part ??= new ContextCache();
    return this.#part;
  }

  once(key: object, make: () => readonly Tensor[]): readonly Tensor[] {
    const made = this.#made.get(key) ?? make().map(keep);
    this.#made.set(key, made);
    return made;
  }

  release(): void {
    for (const tensors of this.#made.values()) for (const t of tensors) t.release();
    this.#made.clear();
    this.#part?.release();
  }
}

/** What `make` makes: the first time of an image, or where there is no cache each time. */
export const once = (
  cache: ContextCache | undefined,
  key: object,
  make: () => readonly Tensor[],
): readonly Tensor[] => (cache ? cache.once(key, make) : make());
