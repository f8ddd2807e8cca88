// Versions: a driver is of a CUDA release, and reads PTX up to the version that came with it (PTX ISA, release notes).

/** The oldest driver that is supported: r535, for CUDA 12.2. */
export const OLDEST_DRIVER = 12020;

/**
 * The first release whose stream capture takes programmatic dependent launches: they become edges with data, which graphs have
 * since CUDA 12.3 (CUDA Programming Guide, CUDA Graphs).
 */
export const PROGRAMMATIC_LAUNCH = 12030;

/** PTX by CUDA release, where the numbers do not go along: 12.0 and PTX 8.0 do. */
const ceilings: Readonly<Record<string, number>> = { '12.6': 8.5, '12.7': 8.6, '12.8': 8.7, '12.9': 8.8 };

/** 12020, as cuDriverGetVersion tells it, as 12.2. */
export const versionName = (version: number): string =>
  `${Math.floor(version / 1000)}.${Math.floor((version % 1000) / 10)}`;

/** The newest PTX that a driver reads; releases newer than this table read at least what is derived here. */
export function ptxCeiling(version: number): number {
  const name = versionName(version);
  const [major, minor] = name.split('.').map(Number);
  return ceilings[name] ?? major - 4 + minor / 10;
}

/** What a PTX file says that it is. */
export const ptxVersion = (ptx: string): number => Number(/^\.version\s+([\d.]+)/m.exec(ptx)?.[1]);
