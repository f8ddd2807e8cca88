// What a thread of pixel_threads.ts does: decodes, resizes and crops the pictures that it is sent, one after another.
import { answering } from '../../io/threads.ts';
import { readQuestion } from './pixel_threads.ts';

answering(readQuestion, (pixels) => [pixels.buffer as ArrayBuffer]);
