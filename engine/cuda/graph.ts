// Launches recorded as a CUDA graph, to be queued again by one call.
import type { Replay } from '../driver.ts';
import { MemoryError } from '../memory.ts';
import type { GpuApi, Graph, Stream } from './api.ts';
import { isOutOfMemory } from './errors.ts';

/** Records launches on a stream, and refuses what cannot be recorded. */
export class Recorder {
  readonly #api: GpuApi;
  readonly #stream: Stream;
  #recording = false;

  constructor(api: GpuApi, stream: Stream) {
    this.#api = api;
    this.#stream = stream;
  }

  /** Throws while launches are recorded. */
  refuse(what: string): void {
    if (this.#recording) throw new Error(`${what} in a step that is being captured`);
  }

  /** Records what `queue` launches. @throws MemoryError where the graph does not fit, at a launch of it too */
  record(queue: () => void): Replay {
    this.refuse('another capture was begun');
    const [api, stream] = [this.#api, this.#stream];
    return fitting(() => {
      const graph = capture(api, stream, () => this.#during(queue));
      try {
        const exec = api.cuGraphInstantiate(graph);
        return {
          launch: () => {
            this.refuse('a step was replayed');
            fitting(() => api.cuGraphLaunch(exec, stream));
          },
          release: () => api.cuGraphExecDestroy(exec),
        };
      } finally {
        api.cuGraphDestroy(graph);
      }
    });
  }

  #during(queue: () => void): void {
    this.#recording = true;
    try {
      queue();
    } finally {
      this.#recording = false;
    }
  }
}

function fitting<R>(fn: () => R): R {
  try {
    return fn();
  } catch (error) {
    throw isOutOfMemory(error) ? new MemoryError(error.problem) : error;
  }
}

/** A stream must leave capture however `queue` or ending it fails, and that error comes before what ending then says. */
function capture(api: GpuApi, stream: Stream, queue: () => void): Graph {
  api.cuStreamBeginCapture(stream);
  try {
    queue();
    return api.cuStreamEndCapture(stream);
  } catch (error) {
    try {
      api.cuGraphDestroy(api.cuStreamEndCapture(stream));
    } catch {
      // The capture was invalid already, or has ended, or the context is lost.
    }
    throw error;
  }
}
