// What a thread of pixel_threads.ts does: decodes, resizes and crops the pictures that it is sent, one after another.
import { parentPort } from 'node:worker_threads';
import { UserError } from '../../io/errors.ts';
import { readPixels } from './picture.ts';
import type { Answer, Question } from './pixel_threads.ts';

parentPort?.on('message', async ({ file, name, geometry, interpolation, reading }: Question) => {
  const answer = (message: Answer, moved: ArrayBuffer[] = []) => parentPort?.postMessage(message, moved);
  try {
    const pixels = await readPixels(file, name, geometry, interpolation, reading);
    answer({ pixels }, [pixels.buffer as ArrayBuffer]);
  } catch (error) {
    const { message } = error as Error;
    answer({ message, isUserError: error instanceof UserError });
  }
});
