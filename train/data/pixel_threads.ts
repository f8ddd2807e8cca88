// readPixels() on threads of their own. A photo of 12 megapixels takes one some 0.4 s, most of it for resizing as Pillow does:
// ten times what a GPU's VAE needs for the result, so several work at once and none is the thread that drives the GPU.
// Threads start when they are first needed and hold the program up only while they have work.
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { packageRoot } from '../../engine/cpu/build.ts';
import { UserError } from '../../io/errors.ts';
import type { ResizeFilter } from '../../io/resize.ts';
import type { Geometry } from './picture.ts';

/** To a thread: the arguments of readPixels(). */
export interface Question {
  file: Uint8Array;
  name: string;
  geometry: Geometry;
  interpolation: ResizeFilter;
}

/** And back. */
export type Answer = { pixels: Float32Array } | { message: string; isUserError: boolean };

/** Each holds a decoded picture. */
export const mostThreads = Math.max(1, Math.min(8, availableParallelism() - 1));

interface Job {
  question: Question;
  resolve(pixels: Float32Array): void;
  reject(error: Error): void;
}

const idle: Worker[] = [];
const waiting: Job[] = [];
let started = 0;

/** The picture in `file` after `geometry`: [h, w, 3] in [-1, 1]. @throws UserError naming the picture */
export const readPixelsAside = (question: Question): Promise<Float32Array> =>
  new Promise((resolve, reject) => {
    waiting.push({ question, resolve, reject });
    assign();
  });

/** Gives jobs to threads while there are both. */
function assign(): void {
  while (waiting.length > 0 && (idle.length > 0 || started < mostThreads))
    work(idle.pop() ?? start(), waiting.shift() as Job);
}

function start(): Worker {
  started++;
  return new Worker(join(packageRoot, 'dist', 'train', 'data', 'pixel_thread.js'));
}

function work(thread: Worker, { question, resolve, reject }: Job): void {
  thread.ref();
  const onMessage = (answer: Answer): void => {
    thread.off('error', onError);
    thread.unref();
    idle.push(thread);
    if ('pixels' in answer) resolve(answer.pixels);
    else reject(answer.isUserError ? new UserError(answer.message) : new Error(answer.message));
    assign();
  };
  const onError = (error: Error): void => {
    thread.off('message', onMessage);
    started--;
    reject(error);
    assign();
  };
  thread.once('message', onMessage);
  thread.once('error', onError);
  thread.postMessage(question);
}
