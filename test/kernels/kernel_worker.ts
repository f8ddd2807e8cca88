// A thread of cuda.test.ts: runs the jobs that it is sent, and tells what it met when there are no more.
import { parentPort } from 'node:worker_threads';
import { type Job, runJob, summary } from './kernel_proof.ts';

parentPort?.on('message', (job: Job | undefined) => parentPort?.postMessage(job ? runJob(job) : summary()));
