// What a thread of png_threads.ts does: encodes the pictures that it is sent.
import { answering } from '../io/threads.ts';
import { encodeDrawn } from './png_threads.ts';

answering(encodeDrawn);
