// Mutants that no test can kill, because the kernel does the same without that synchronisation; each with its reason, from
// reading the PTX.
export interface Equivalent {
  readonly kernel: RegExp;
  readonly mutant: RegExp;
  readonly reason: string;
}

export const equivalents: readonly Equivalent[] = [];
