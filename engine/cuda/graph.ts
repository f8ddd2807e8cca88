// Launches recorded as a CUDA graph, to be queued again by one call.
import type { Replay } from '../driver.ts';
import { MemoryError } from '../memory.ts';
import type { GpuApi, Graph, Stream } from './api.ts';
import { isOutOfMemory } from './errors.ts';

/** Records what `queue` launches on the stream. @throws MemoryError where the graph itself does not fit */
export function recordGraph(api: GpuApi, stream: Stream, queue: () => void): Replay {
  const graph = capture(api, stream, queue);
  try {
    const exec = api.cuGraphInstantiate(graph);
    return {
      launch: () => api.cuGraphLaunch(exec, stream),
      release: () => api.cuGraphExecDestroy(exec),
    };
  } catch (error) {
    if (isOutOfMemory(error)) throw new MemoryError((error as Error).message);
    throw error;
  } finally {
    api.cuGraphDestroy(graph);
  }
}

/** A stream must leave capture however `queue` ends, and its error comes before what ending says. */
function capture(api: GpuApi, stream: Stream, queue: () => void): Graph {
  api.cuStreamBeginCapture(stream);
  try {
    queue();
  } catch (error) {
    try {
      api.cuGraphDestroy(api.cuStreamEndCapture(stream));
    } catch {
      // The capture was invalid already, or the context is lost.
    }
    throw error;
  }
  return api.cuStreamEndCapture(stream);
}
