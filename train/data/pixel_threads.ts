// readPixels() on threads of their own. A photo of 12 megapixels takes one some 0.4 s, most of it for resizing as Pillow does:
// ten times what a GPU's VAE needs for the result, so several work at once and none is the thread that drives the GPU.
// Threads start when they are first needed and hold the program up only while they have work. Where a system gives none, or one
// dies, the work is done here.
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { UserError } from '../../io/errors.ts';
import { packageRoot } from '../../io/package_root.ts';
import type { ResizeFilter } from '../../io/resize.ts';
import { type Geometry, type Reading, readPixels } from './picture.ts';

/** To a thread: the arguments of readPixels(). */
export interface Question {
  file: Uint8Array;
  name: string;
  geometry: Geometry;
  interpolation: ResizeFilter;
  reading?: Reading;
}

/** And back. */
export type Answer = { pixels: Float32Array } | { message: string; isUserError: boolean };

/** Each holds a decoded picture. */
export const mostThreads = Math.max(1, Math.min(8, availableParallelism() - 1));

interface Job {
  question: Question;
  signal?: AbortSignal;
  resolve(pixels: Float32Array): void;
  reject(error: Error): void;
}

const idle: Worker[] = [];
const waiting: Job[] = [];
let started = 0;
let here: Promise<void> = Promise.resolve();

/**
 * What readPixels() reads of `file`. What is not begun when `signal` is aborted is left.
 * @throws UserError naming the picture
 */
export const readPixelsAside = (question: Question, signal?: AbortSignal): Promise<Float32Array> =>
  new Promise((resolve, reject) => {
    waiting.push({ question, signal, resolve, reject });
    assign();
  });

/** Gives jobs to threads while there are both. */
function assign(): void {
  for (let job = waiting.shift(); job; job = waiting.shift()) {
    if (job.signal?.aborted) {
      job.reject(job.signal.reason);
      continue;
    }
    const thread = idle.pop() ?? start();
    if (thread) work(thread, job);
    else if (started === 0) workHere(job);
    else {
      waiting.unshift(job); // until a thread has done its own
      return;
    }
  }
}

function start(): Worker | undefined {
  if (started === mostThreads) return undefined;
  try {
    const thread = new Worker(join(packageRoot, 'dist', 'train', 'data', 'pixel_thread.js'));
    started++;
    return thread;
  } catch {
    return undefined;
  }
}

/** One after another, as each holds a decoded picture. */
function workHere({ question, resolve, reject }: Job): void {
  const { file, name, geometry, interpolation, reading } = question;
  here = here.then(() => readPixels(file, name, geometry, interpolation, reading).then(resolve, reject));
}

function work(thread: Worker, job: Job): void {
  const { question, resolve, reject } = job;
  thread.ref();
  const onMessage = (answer: Answer): void => {
    thread.off('error', onError);
    thread.unref();
    idle.push(thread);
    if ('pixels' in answer) resolve(answer.pixels);
    else reject(answer.isUserError ? new UserError(answer.message) : new Error(answer.message));
    assign();
  };
  const onError = (): void => {
    thread.off('message', onMessage);
    started--;
    workHere(job);
    assign();
  };
  thread.once('message', onMessage);
  thread.once('error', onError);
  thread.postMessage(question);
}
