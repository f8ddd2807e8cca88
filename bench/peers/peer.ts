// The other process of a comparison: python3 running torch_peer.py, spoken to in JSON lines.
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { packageRoot } from '../../io/package_root.ts';

export interface Peer {
  torch: string;
  /** Sets up what `run` will time. */
  prepare(what: unknown): Promise<void>;
  /** Seconds of each of `runs` calls. */
  run(runs: number): Promise<number[]>;
  drop(): Promise<void>;
  close(): void;
}

/** Starts PyTorch with `threads` threads, or says why it cannot. */
export async function openPeer(python: string, threads: number): Promise<Peer | { reason: string }> {
  const script = join(packageRoot, 'bench', 'peers', 'torch_peer.py');
  const child = spawn(python, [script, String(threads)], { stdio: ['pipe', 'pipe', 'pipe'] });
  let complaint = '';
  child.stderr.on('data', (chunk: Buffer) => {
    complaint = (complaint + chunk.toString()).slice(-4000);
  });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const ended = new Promise<undefined>((resolve) => {
    child.on('error', (error) => {
      complaint = error.message;
      resolve(undefined);
    });
    child.on('close', () => resolve(undefined));
  });
  const answer = async (): Promise<Record<string, unknown>> => {
    const line = await Promise.race([lines.next(), ended]);
    if (!line || line.done) throw new Error(complaint.trim().split('\n').at(-1) || `${python} ended`);
    return JSON.parse(line.value) as Record<string, unknown>;
  };
  const ask = (request: unknown) => {
    child.stdin.write(`${JSON.stringify(request)}\n`);
    return answer();
  };
  try {
    const { torch } = await answer();
    return {
      torch: String(torch),
      prepare: async (what) => void (await ask({ prepare: what })),
      run: async (runs) => (await ask({ run: runs })).seconds as number[],
      drop: async () => void (await ask({ drop: true })),
      close: () => void child.kill(),
    };
  } catch (error) {
    return { reason: (error as Error).message };
  }
}
