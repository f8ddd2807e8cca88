// Mutants that no test can kill, because the kernel does the same without that synchronisation; each with its reason, from
// reading the source and the PTX. They are named by instruction and not by line, so `most` bounds how many of a kernel's
// mutants an entry excuses: one more that lives is a finding.
export interface Equivalent {
  readonly kernel: RegExp;
  readonly mutant: RegExp;
  readonly most: number;
  readonly reason: string;
}

export const equivalents: readonly Equivalent[] = [
  {
    kernel: /^(gemm|conv2d|conv2d_backward|fp8)_sm90_/,
    mutant: /"bar\.warp\.sync -1".* (product|epilogue)_sm90\.cuh/,
    most: 3,
    reason:
      'Lanes meet again after one of them waited, stored or arrived. What it did is ordered for the others by the named barrier ' +
      "or the mbarrier before they touch y's place, and the next instructions of the whole warp are .sync: they wait for its lanes.",
  },
  {
    kernel: /^attention_hopper_backward_/,
    mutant: /"cp\.async\.bulk\.commit_group"/,
    most: 1,
    reason: 'A block of keys stores dk and then dv: the commit after dv takes both into its group.',
  },
  {
    kernel: /^attention_hopper_forward_/,
    mutant: /"wgmma\.fence\.sync\.aligned"/,
    most: 1,
    reason:
      "In the loop a fence stands before the scores' products and one before the sums'. Nothing writes the sums or the weights " +
      'in between, so the first fence has both.',
  },
];
