// Work on threads of their own, so that none of it holds up the thread that drives the device. Threads start when they are first
// needed and hold the program up only while they have work. Where a system gives none, or one dies, the work is done here.
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { parentPort, Worker } from 'node:worker_threads';
import { UserError } from './errors.ts';
import { packageRoot } from './package_root.ts';

/** One processor is left for the thread that asks. */
export const mostThreads = Math.max(1, Math.min(8, availableParallelism() - 1));

type Work<Question, Answer> = (question: Question) => Answer | Promise<Answer>;

/** What a thread sends back. */
type Reply<Answer> = { answer: Answer } | { message: string; isUserError: boolean };

interface Job<Question, Answer> {
  question: Question;
  signal?: AbortSignal;
  resolve(answer: Answer): void;
  reject(error: Error): void;
}

/** In a thread's program: does `work` for each question. Buffers of an answer that are handed over are not copied. */
export function answering<Question, Answer>(
  work: Work<Question, Answer>,
  buffersOf: (answer: Answer) => ArrayBuffer[] = () => [],
): void {
  const reply = (each: Reply<Answer>, moved: ArrayBuffer[] = []) => parentPort?.postMessage(each, moved);
  parentPort?.on('message', async (question: Question) => {
    try {
      const answer = await work(question);
      reply({ answer }, buffersOf(answer));
    } catch (error) {
      const { message } = error as Error;
      reply({ message, isUserError: error instanceof UserError });
    }
  });
}

/**
 * Threads that run `program`, a file of this package, which calls answering() with the same `work`. Gives what asks them: what is not
 * begun when `signal` is aborted is left.
 */
export function threads<Question, Answer>(program: readonly string[], work: Work<Question, Answer>) {
  const idle: Worker[] = [];
  const busy = new Map<Worker, Job<Question, Answer>>();
  const waiting: Job<Question, Answer>[] = [];
  const doHere = inTurn(work);
  let started = 0;

  /** Gives jobs to threads while there are both. */
  function assign(): void {
    for (let job = waiting.shift(); job; job = waiting.shift()) {
      if (job.signal?.aborted) {
        job.reject(job.signal.reason);
        continue;
      }
      const thread = idle.pop() ?? start();
      if (thread) {
        busy.set(thread, job);
        thread.ref();
        thread.postMessage(job.question);
      } else if (started === 0) doHere(job);
      else {
        waiting.unshift(job); // until a thread has done its own
        return;
      }
    }
  }

  function start(): Worker | undefined {
    if (started === mostThreads) return undefined;
    const thread = startThread<Answer>(program, done, lost);
    if (thread) started++;
    return thread;
  }

  function done(thread: Worker, reply: Reply<Answer>): void {
    const job = busy.get(thread);
    busy.delete(thread);
    thread.unref();
    idle.push(thread);
    if (job) settle(job, reply);
    assign();
  }

  /** However it ended, and whether it had work or none. */
  function lost(thread: Worker): void {
    started--;
    if (idle.includes(thread)) idle.splice(idle.indexOf(thread), 1);
    const job = busy.get(thread);
    busy.delete(thread);
    if (job) doHere(job);
    assign();
  }

  return (question: Question, signal?: AbortSignal): Promise<Answer> =>
    new Promise((resolve, reject) => {
      waiting.push({ question, signal, resolve, reject });
      assign();
    });
}

/** A thread at work on `program`; undefined where the system gives none. */
function startThread<Answer>(
  program: readonly string[],
  done: (thread: Worker, reply: Reply<Answer>) => void,
  lost: (thread: Worker) => void,
): Worker | undefined {
  try {
    const thread = new Worker(join(packageRoot, 'dist', ...program));
    thread.on('message', (reply: Reply<Answer>) => done(thread, reply));
    thread.on('error', () => undefined); // its exit follows
    thread.on('exit', () => lost(thread));
    return thread;
  } catch {
    return undefined;
  }
}

function settle<Answer>({ resolve, reject }: Job<unknown, Answer>, reply: Reply<Answer>): void {
  if ('answer' in reply) resolve(reply.answer);
  else reject(reply.isUserError ? new UserError(reply.message) : new Error(reply.message));
}

/** Does jobs on this thread, one after another, as each may hold a picture. */
function inTurn<Question, Answer>(work: Work<Question, Answer>) {
  let last: Promise<void> = Promise.resolve();
  return ({ question, resolve, reject }: Job<Question, Answer>): void => {
    last = last.then(async () => work(question)).then(resolve, reject);
  };
}
