// A server of the tiny model in a test's own process, which draws in another, asked as programs ask.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { t as file } from 'tap';
import { main } from '../../cli/main.ts';
import { decodePicture } from '../../io/image.ts';
import { sdxl } from './command_line.ts';
import { goldenFolder } from './golden.ts';

export const model = join(goldenFolder, 'tiny-sdxl');
export const small = ['--width', '64', '--height', '64', '--steps', '2'];
export const fox = { prompt: 'a red fox', seed: 5 };

export interface Answer {
  status: number;
  // biome-ignore lint/suspicious/noExplicitAny: what a route answers is read key by key
  body: any;
}

export interface Running {
  url: string;
  post(path: string, body: unknown, signal?: AbortSignal): Promise<Answer>;
  get(path: string): Promise<Answer>;
  /** What it has said on its error stream. */
  said(): string;
  /** Ends it as a service manager does. */
  end(): Promise<number>;
}

/** Starts one, which ends with the file's tests at the latest, also where one of them has failed and did not end it. */
export async function serve(...flags: string[]): Promise<Running> {
  let [err, out] = ['', ''];
  let ready = () => {};
  const isReady = new Promise<void>((resolve) => {
    ready = resolve;
  });
  const terminal = {
    out: (text: string) => {
      out += text;
      ready();
    },
    err: (text: string) => void (err += text),
    live: false,
  };
  const done = main(['serve', '--model', model, '--listen-port', '0', '--json', ...flags], terminal);
  const end = () => {
    process.emit('SIGTERM', 'SIGTERM');
    return done;
  };
  let ended = false;
  void done.then(() => {
    ended = true;
  });
  file.teardown(() => {
    if (ended) return;
    for (const pid of drawers()) process.kill(pid, 'SIGKILL'); // a picture at work would be finished
    return end();
  });
  await Promise.race([isReady, done]);
  if (out === '') throw new Error(`no server: ${err}`);
  const { url } = JSON.parse(out);
  const ask = async (path: string, init: RequestInit): Promise<Answer> => {
    const response = await fetch(url + path, init);
    return { status: response.status, body: await response.json() };
  };
  return {
    url,
    post: (path, body, signal) =>
      ask(path, {
        ...{ method: 'POST', body: JSON.stringify(body), signal },
        headers: { 'Content-Type': 'application/json' },
      }),
    get: (path) => ask(path, {}),
    said: () => err,
    end,
  };
}

/** What `sdxl sample` draws. */
export async function sampledTo(output: string, ...flags: string[]) {
  const { status, err } = await sdxl('sample', '--model', model, '--quiet', '--output', output, ...flags);
  if (status !== 0) throw new Error(err);
  return { output, picture: await decodePicture(readFileSync(output), output) };
}

export const pixels = (base64: string) => decodePicture(Buffer.from(base64, 'base64'), 'answer');

/** The processes that draw for this one. */
export const drawers = (): number[] =>
  readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const [parent] = /(?<=\) \w )\d+/.exec(readFileSync(`/proc/${pid}/stat`, 'utf8')) ?? [];
        const program = readFileSync(`/proc/${pid}/cmdline`, 'utf8');
        return Number(parent) === process.pid && program.includes('serve/drawer.js');
      } catch {
        return false; // it has ended since
      }
    });

/** Waits for what comes in a minute, or never. */
export async function eventually(holds: () => Promise<boolean>): Promise<void> {
  for (const deadline = Date.now() + 60_000; !(await holds()); ) {
    if (Date.now() > deadline) throw new Error('it has not come');
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** What is told of the progress, once it `holds`. */
export async function seen(
  server: Running,
  holds: (progress: Answer['body']) => boolean,
): Promise<Answer['body']> {
  let body: Answer['body'];
  await eventually(async () => {
    ({ body } = await server.get('/sdapi/v1/progress'));
    return holds(body);
  });
  return body;
}
