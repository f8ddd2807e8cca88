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

/** The process, where there is one, and what is known of it. */
interface Held {
  child?: ChildProcess;
  opening?: Promise<ModelTold>;
  state: ReturnType<Drawer['state']>;
  told?: ModelTold;
  /** So many were drawn. */
  orders: number;
  work?: Work;
}

/** Starts a process and holds it, until it has ended or another is held. */
function start(held: Held, options: Standing, { tell, onLost }: DrawerOptions): Promise<ModelTold> {
  held.state = 'opening';
  return new Promise((resolve, reject) => {
    const started = startProcess(options, {
      tell,
      hear: (message) => {
        const { work } = held;
        if (work && work.id === message.id) heed(message, work);
      },
      opened(told) {
        if (held.child !== started) return; // closed by us: it will end
        Object.assign(held, { state: 'open', told });
        resolve(told);
      },
      ended(lost) {
        if (held.child !== started) {
          reject(letGo); // closed by us
          return;
        }
        reject(lost);
        const was = held.state;
        Object.assign(held, { child: undefined, opening: undefined, state: 'lost' });
        held.work?.reject(lost);
        if (was === 'open') onLost();
      },
    });
    held.child = started;
  });
}

/** Lets the process go, which ends after its step. */
function leave(held: Held): void {
  const { child } = held;
  Object.assign(held, { child: undefined, opening: undefined, state: 'idle' });
  if (child?.connected) child.disconnect();
}

const send = ({ child }: Held, message: ToDrawer): void => {
  if (child?.connected) child.send(message);
};

/** Has the open models draw an order. */
async function drawn(held: Held, order: Order, hearing: Hearing, signal: AbortSignal): Promise<void> {
  const id = ++held.orders;
  const stop = () => send(held, { kind: 'stop', id });
  signal.addEventListener('abort', stop);
  try {
    await new Promise<void>((resolve, reject) => {
      held.work = { id, hearing, resolve, reject };
      send(held, { kind: 'draw', id, order });
    });
  } finally {
    held.work = undefined;
    signal.removeEventListener('abort', stop);
  }
}

export function openDrawer(options: Standing, events: DrawerOptions): Drawer {
  const held: Held = { state: 'idle', orders: 0 };
  let drawing = false;
  let idle: NodeJS.Timeout | undefined;
  const open = (): Promise<ModelTold> => {
    clearTimeout(idle);
    held.opening ??= start(held, options, events);
    return held.opening;
  };
  const close = (): void => {
    clearTimeout(idle);
    leave(held);
  };
  const untilIdle = (): void => {
    clearTimeout(idle);
    if (events.idleMs !== undefined && !drawing) idle = setTimeout(close, events.idleMs).unref();
  };
  return {
    async open() {
      const opened = await open();
      untilIdle();
      return opened;
    },
    async draw(order, hearing, signal) {
      drawing = true;
      try {
        await open();
        if (signal.aborted) return; // while the models were opened
        await drawn(held, order, hearing, signal);
      } finally {
        drawing = false;
        untilIdle();
      }
    },
    look: () => held.work && send(held, { kind: 'look', id: held.work.id }),
    told: () => held.told,
    state: () => held.state,
    close,
  };
}
