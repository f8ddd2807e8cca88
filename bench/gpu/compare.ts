// Our measurements beside a peer's of the same run: the JSON that a benchmark of PyTorch wrote at the same shapes, as
// { results: [{ section, name, us, graph_us, ... shape fields }], meta }. A call is found by its shape; of several ways the peer
// has (backends, eager and compiled, launched and replayed) the fastest counts.
import type { Key, Measure } from './gpu.ts';

export interface PeerRow {
  section: string;
  name: string;
  us?: number;
  graph_us?: number;
  error?: string;
  [field: string]: unknown;
}

export interface Peer {
  meta: Record<string, unknown>;
  results: PeerRow[];
}

export interface Compared {
  section: string;
  name: string;
  count?: number;
  ours_us: number;
  theirs_us?: number;
  /** What the peer's time is of. */
  theirs?: string;
  /** Ours over theirs: below 1 we are faster. */
  ratio?: number;
  tflops?: number;
  gbps?: number;
  eager_us?: number;
  launch_us?: number;
  drift_pct: number;
  rel_err?: number;
  problem?: string;
  more?: Readonly<Record<string, number>>;
}

const fastest = ({ us, graph_us }: PeerRow): number =>
  Math.min(us ?? Number.POSITIVE_INFINITY, graph_us ?? Number.POSITIVE_INFINITY);

const agrees = (row: PeerRow, fields: Key): boolean =>
  Object.entries(fields).every(([name, value]) => row[name] === value);

const fastestOf = (rows: readonly PeerRow[]): PeerRow | undefined =>
  rows.filter((row) => Number.isFinite(fastest(row))).sort((a, b) => fastest(a) - fastest(b))[0];

/** The rows of a peer's section with these fields. */
const rowsOf = (peer: Peer, section: string, fields: Key): PeerRow[] =>
  peer.results.filter((row) => row.section === section && agrees(row, fields));

/** The fastest of them with this in its name. */
const find = (peer: Peer, section: string, fields: Key, pattern = /./): PeerRow | undefined =>
  fastestOf(rowsOf(peer, section, fields).filter(({ name }) => pattern.test(name)));

type Finder = (peer: Peer, key: Key) => readonly (PeerRow | undefined)[];

/** Which of the peer's rows make up one of ours; their times are added. */
const finders: Record<string, Finder> = {
  copy: (peer, { mib }) => [find(peer, 'copy', {}, new RegExp(`^copy ${mib} MiB$`))],
  gemm: (peer, { m, n, k, bias, variant }) => [
    find(peer, 'gemm', { m, n, k, bias, variant }) ?? find(peer, 'gemm', { m, n, k, variant }),
  ],
  // Ours has the gate in the product's epilogue; a peer runs two kernels.
  geglu: (peer, { m, n, k, variant }) =>
    variant === 'fwd'
      ? [find(peer, 'gemm', { m, n, k, variant }), find(peer, 'geglu', { m, c: Number(n) / 2 })]
      : [undefined],
  conv: (peer, key) => [find(peer, 'conv', key)],
  attention: (peer, { variant, ...shape }) => [find(peer, 'sdpa', shape, new RegExp(` ${variant} `))],
  norm: (peer, { b, c, tokens, silu, variant }) =>
    variant === 'fwd'
      ? [
          fastestOf(
            rowsOf(peer, 'norm', { b, c, silu }).filter(({ h, w }) => Number(h) * Number(w) === tokens),
          ),
        ]
      : [undefined],
  ln: (peer, { m, c, variant }) => [
    variant === 'fwd' ? find(peer, 'ln', { m, c }, /^layer_norm/) : undefined,
  ],
  // PyTorch's moments are of the weights' type. Beside ours of another type a step moves other bytes, so the type is told.
  adamw(peer, { params, dtype }) {
    const row = find(peer, 'adamw', { params, dtype });
    return [row && { ...row, name: `${row.name}, moments in ${dtype}` }];
  },
  unet: (peer, { how, batch }) => [
    how === 'graph'
      ? fastestOf(
          [find(peer, 'compile', {}), find(peer, 'unet', {}, new RegExp(`^CUDA graph b${batch} `))].filter(
            (row) => row !== undefined,
          ),
        )
      : find(peer, 'unet', {}, new RegExp(`^eager b${batch} `)),
  ],
  train: (peer, { batch, ckpt, lora }) => (lora ? [] : [find(peer, 'train', { batch, ckpt, amp: false })]),
};

/** One of our measurements, with the peer's where it has one. */
export function compared(section: string, m: Measure, peer: Peer | undefined): Compared {
  const { us, eager_us, launch_us, drift_pct } = m.timing;
  const rows = (peer && finders[section.replace(/ backward$/, '')]?.(peer, m.key)) ?? [];
  const found = rows.filter((row) => row !== undefined);
  const whole = found.length > 0 && found.length === rows.length;
  const theirs_us = whole ? found.reduce((sum, row) => sum + fastest(row), 0) : undefined;
  return {
    section,
    name: m.name,
    count: m.count,
    ours_us: us,
    theirs_us,
    theirs: whole ? found.map(({ name }) => name).join(' and ') : undefined,
    ratio: theirs_us && us / theirs_us,
    tflops: m.flops ? m.flops / us / 1e6 : undefined,
    gbps: m.bytes ? m.bytes / us / 1e3 : undefined,
    ...{ eager_us, launch_us, drift_pct, rel_err: m.rel_err, problem: m.problem, more: m.more },
  };
}
