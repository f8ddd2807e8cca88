// Who acts in the happens-before order: the warps that run together, then asynchronous operations. What one of them did is known
// by a key: clock << 14 | strong << 13 | agent << 5 | lane.

/** Warps that run together: a cluster of eight blocks of 512 threads. */
export const mostWarps = 128;
export const agents = mostWarps + 32;
/** The agent under which cp.async writes. */
export const copyAgent = agents - 2;

export const strongBit = 1 << 13;
/** Of a key: the agent and the lane, and that it is not strong. */
export const identity = strongBit - 1;
export const agentOf = (key: number): number => (key >>> 5) & 255;
export const clockOf = (key: number): number => key >>> 14;
export const makeKey = (clock: number, agent: number, lane: number): number =>
  (clock << 14) | (agent << 5) | lane;
/** A clock that nobody has seen: an asynchronous copy that is not waited for. */
export const never = 0x3ffff;
