// What every command has of the program around it: where it writes, and how it says that a signal ended it.

/** Where a command writes: the result on `out`, everything else on `err`. */
export interface Terminal {
  out(text: string): void;
  err(text: string): void;
  /** Whether `err` is a screen that can redraw a line. */
  live: boolean;
}

/** A signal has ended the work in good order; `status` is the program's, as shells count. */
export class Stopped extends Error {
  readonly status: number;

  constructor(status: number) {
    super('stopped by a signal');
    this.status = status;
  }
}
