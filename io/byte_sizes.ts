// Counts of bytes as texts tell them: in powers of two, as drivers and systems count memory.
const GIB = 2 ** 30;

export const gib = (bytes: number, digits = 2): string => `${(bytes / GIB).toFixed(digits)} GiB`;

/** The same; in MiB what is less than `leastGib`. */
export const gibOrMib = (bytes: number, leastGib = 1): string =>
  bytes >= leastGib * GIB ? gib(bytes) : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
