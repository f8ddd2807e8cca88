// The process that draws (drawer.ts), as the server holds it: started when it is first needed and again when it has ended, and let go
// when nobody has asked it for a while, which frees all of the device's memory.
import { type ChildProcess, fork } from 'node:child_process';
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { packageRoot } from '../../io/package_root.ts';
import { inOneLine } from '../terminal.ts';
import { Refusal } from './http.ts';
import type { Drawn, FromDrawer, ModelTold, Order, Standing, ToDrawer } from './messages.ts';

/** Whoever has asked for an order hears of it. */
export interface Hearing {
  step?(share: number, step: number, steps: number): void;
  preview?(png: Uint8Array): void;
  picture(drawn: Drawn): void;
}

export interface Drawer {
  /** Opens the models, where they are not open. @throws UserError for models that cannot be opened */
  open(): Promise<ModelTold>;
  /** Draws one order; there is one at a time. What is aborted ends after its step, with what is finished. */
  draw(order: Order, hearing: Hearing, signal: AbortSignal): Promise<void>;
  /** Asks for a preview of the order at work after its next step. */
  look(): void;
  /** What it was when it was last opened. */
  told(): ModelTold | undefined;
  /** `idle`: let go, and opened again by the next order. `lost`: not to be opened at the last try. */
  state(): 'opening' | 'open' | 'idle' | 'lost';
  close(): void;
}

type OfOrder = Exclude<FromDrawer, { kind: 'opened' | 'warning' }>;

interface Work {
  id: number;
  hearing: Hearing;
  resolve(): void;
  reject(error: Error): void;
}

/** Nothing that the order could have said otherwise. */
const lostWith = (message: string) => new Refusal(500, message);
const letGo = new Refusal(503, 'the models were unloaded while they were opened; ask again');

export interface DrawerOptions {
  /** How long it is kept without work; for good where absent. */
  idleMs?: number;
  /** Gets what it says on its error stream, and its warnings. */
  tell(text: string): void;
  /** Hears that it has ended by itself. */
  onLost(): void;
}

/** Who hears of a process that draws. */
interface Ears {
  tell(text: string): void;
  hear(message: OfOrder): void;
  opened(model: ModelTold): void;
  ended(lost: Error): void;
}

/** Starts a process, which opens the models. */
function startProcess(options: Standing, { tell, hear, opened, ended }: Ears): ChildProcess {
  const started = fork(join(packageRoot, 'dist', 'cli', 'serve', 'drawer.js'), {
    serialization: 'advanced',
    stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
  });
  started.stderr?.setEncoding('utf8').on('data', tell);
  let lost: Error | undefined;
  started.on('message', (message: FromDrawer) => {
    if (message.kind === 'opened') opened(message.told);
    else if (message.kind === 'warning') tell(`warning: ${inOneLine(message.line)}\n`);
    else if (message.kind === 'failed' && message.id === undefined) lost = errorOf(message);
    else hear(message);
  });
  const gone = (how: string): void => ended(lost ?? lostWith(`the process that draws has ended (${how})`));
  started.on('exit', (status, signal) => gone(signal ?? `status ${status}`));
  started.on('error', (error) => {
    // One that could not be started has no exit; of the others this is a message that came too late.
    if (started.pid === undefined) gone(error.message);
  });
  const first: ToDrawer = { kind: 'open', options };
  if (started.connected) started.send(first);
  return started;
}

const errorOf = ({ mistake, message }: { mistake: boolean; message: string }): Error =>
  mistake ? new UserError(message) : lostWith(message);

/** Hands on what is said of an order. */
function heed(message: OfOrder, { hearing, resolve, reject }: Work): void {
  if (message.kind === 'step') hearing.step?.(message.share, message.step, message.steps);
  if (message.kind === 'preview') hearing.preview?.(message.png);
  if (message.kind === 'picture') hearing.picture(message.drawn);
  if (message.kind === 'done') resolve();
  if (message.kind === 'failed') reject(errorOf(message));
}

export function openDrawer(options: Standing, { idleMs, tell, onLost }: DrawerOptions): Drawer {
  let child: ChildProcess | undefined;
  let opening: Promise<ModelTold> | undefined;
  let work: Work | undefined;
  let drawing = false;
  let idle: NodeJS.Timeout | undefined;
  let ids = 0;
  let state: ReturnType<Drawer['state']> = 'idle';
  let told: ModelTold | undefined;
  const send = (message: ToDrawer): void => {
    if (child?.connected) child.send(message);
  };

  function start(): Promise<ModelTold> {
    state = 'opening';
    return new Promise((resolve, reject) => {
      const started = startProcess(options, {
        tell,
        hear: (message) => {
          if (work && work.id === message.id) heed(message, work);
        },
        opened(model) {
          if (child !== started) return; // closed by us: it will end
          state = 'open';
          told = model;
          resolve(model);
        },
        ended(lost) {
          if (child !== started) {
            reject(letGo); // closed by us
            return;
          }
          reject(lost);
          const was = state;
          child = opening = undefined;
          state = 'lost';
          work?.reject(lost);
          if (was === 'open') onLost();
        },
      });
      child = started;
    });
  }

  const open = (): Promise<ModelTold> => {
    opening ??= start();
    return opening;
  };

  const untilIdle = (): void => {
    clearTimeout(idle);
    if (idleMs !== undefined && !drawing) idle = setTimeout(close, idleMs).unref();
  };

  function close(): void {
    clearTimeout(idle);
    const closed = child;
    child = opening = undefined;
    state = 'idle';
    if (!closed?.connected) return;
    closed.disconnect(); // at which it ends, after its step
  }

  return {
    async open() {
      clearTimeout(idle);
      const opened = await open();
      untilIdle();
      return opened;
    },
    async draw(order, hearing, signal) {
      clearTimeout(idle);
      drawing = true;
      const id = ++ids;
      const stop = () => send({ kind: 'stop', id });
      try {
        await open();
        if (signal.aborted) return; // while the models were opened
        signal.addEventListener('abort', stop);
        await new Promise<void>((resolve, reject) => {
          work = { id, hearing, resolve, reject };
          send({ kind: 'draw', id, order });
        });
      } finally {
        work = undefined;
        drawing = false;
        signal.removeEventListener('abort', stop);
        untilIdle();
      }
    },
    look: () => work && send({ kind: 'look', id: work.id }),
    told: () => told,
    state: () => state,
    close,
  };
}
