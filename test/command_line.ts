// Running the program in a test's own process, and what it said.
import { main } from '../cli/main.ts';

export interface Said {
  status: number;
  out: string;
  err: string;
}

export async function sdxl(...argv: string[]): Promise<Said> {
  let [out, err] = ['', ''];
  const terminal = {
    out: (text: string) => void (out += text),
    err: (text: string) => void (err += text),
    live: false,
  };
  return { status: await main(argv, terminal), out, err };
}
