// Launches recorded as a CUDA graph, to be queued again by one call.
import type { Replay } from '../driver.ts';
import { MemoryError } from '../memory.ts';
import type { GpuApi, Graph, Stream } from './api.ts';
import { isOutOfMemory } from './errors.ts';

/** Records what `queue` launches on the stream. @throws MemoryError where the graph does not fit, at a launch of it too */
export function recordGraph(api: GpuApi, stream: Stream, queue: () => void): Replay {
  return fitting(() => {
    const graph = capture(api, stream, queue);
    try {
      const exec = api.cuGraphInstantiate(graph);
      return {
        launch: () => fitting(() => api.cuGraphLaunch(exec, stream)),
        release: () => api.cuGraphExecDestroy(exec),
      };
    } finally {
      api.cuGraphDestroy(graph);
    }
  });
}

function fitting<R>(fn: () => R): R {
  try {
    return fn();
  } catch (error) {
    throw isOutOfMemory(error) ? new MemoryError((error as Error).message) : error;
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
