// A device's memory that is watched, and that has less from some time on: whether large tensors fit is known to nobody but a driver.
import type { Device } from '../../engine/device.ts';
import { MemoryError } from '../../engine/memory.ts';

const LARGE = 2 ** 20;

/** What is alive whenever something large is wanted; with `room` set, nothing large is given while more than that is. */
export function watchMemory({ memory }: Device): { alive: number[]; room: number } {
  const watched = { alive: [] as number[], room: Number.POSITIVE_INFINITY };
  const take = memory.take.bind(memory);
  memory.take = (bytes) => {
    if (bytes >= LARGE) watched.alive.push(memory.live);
    if (bytes >= LARGE && memory.live > watched.room) throw new MemoryError('out of memory');
    return take(bytes);
  };
  return watched;
}
