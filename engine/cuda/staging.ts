// Copies between the host and a GPU through pinned memory, the only memory of the host that a GPU reads by itself. Two buffers
// take turns: a piece is copied into one while the other is on its way, and an upload returns before it has arrived. So weights
// stream to the device while the next are being read. Small uploads share a buffer; they too are staged, as a driver mostly
// copies such bytes at once, but for a GPU that reads the host's pages (Grace Hopper) may do so when the stream gets there.
// Small downloads are waited for, and go directly.
import { type DevicePointer, DISABLE_TIMING, type Event, type GpuApi, type Stream } from './api.ts';
import { isOutOfMemory } from './errors.ts';

const PIECE_BYTES = 16 * 2 ** 20;
const DIRECT_BYTES = 64 * 2 ** 10;
/** Where a copy may begin in a buffer. */
const ALIGNMENT = 256;

interface Buffer {
  readonly bytes: Uint8Array;
  /** Recorded after the last copy that uses the buffer. */
  readonly done: Event;
  busy: boolean;
  /** Bytes from the start that copies on their way use. */
  used: number;
}

export interface Staging {
  upload(target: DevicePointer, source: Uint8Array): void;
  /** Returns when the bytes are there. */
  download(target: Uint8Array, source: DevicePointer): void;
}

export function openStaging(api: GpuApi, stream: Stream, pieceBytes = PIECE_BYTES): Staging {
  const buffers = new Buffers(api, stream, pieceBytes);
  return {
    upload(target, source) {
      for (let at = 0; at < source.byteLength; at += pieceBytes) {
        const piece = source.subarray(at, at + pieceBytes);
        const buffer = buffers.withRoom(piece.byteLength);
        if (!buffer) {
          api.cuMemcpyHtoDAsync(target + BigInt(at), piece, stream);
          api.cuStreamSynchronize(stream);
        } else {
          const [begin, end] = [buffer.used, buffer.used + piece.byteLength];
          buffer.bytes.set(piece, begin);
          api.cuMemcpyHtoDAsync(target + BigInt(at), buffer.bytes.subarray(begin, end), stream);
          buffers.queued(buffer, end);
        }
      }
    },
    download(target, source) {
      let onItsWay: { buffer: Buffer; at: number; length: number } | undefined;
      const arrive = (): void => {
        if (!onItsWay) return;
        const { buffer, at, length } = onItsWay;
        buffers.free(buffer);
        target.set(buffer.bytes.subarray(0, length), at);
      };
      for (let at = 0; at < target.byteLength; at += pieceBytes) {
        const length = Math.min(pieceBytes, target.byteLength - at);
        const buffer = target.byteLength > DIRECT_BYTES ? buffers.withRoom(pieceBytes) : undefined;
        if (!buffer) api.cuMemcpyDtoHAsync(target.subarray(at, at + length), source + BigInt(at), stream);
        else {
          api.cuMemcpyDtoHAsync(buffer.bytes.subarray(0, length), source + BigInt(at), stream);
          buffers.queued(buffer, pieceBytes);
          arrive();
          onItsWay = { buffer, at, length };
        }
      }
      if (onItsWay) arrive();
      else api.cuStreamSynchronize(stream);
    },
  };
}

/** The two that take turns, pinned when first asked for. */
class Buffers {
  readonly #api: GpuApi;
  readonly #stream: Stream;
  readonly #bytes: number;
  #pinned: readonly Buffer[] | undefined;
  #turn = 0;

  constructor(api: GpuApi, stream: Stream, bytes: number) {
    this.#api = api;
    this.#stream = stream;
    this.#bytes = bytes;
  }

  /** One with room for so many bytes behind `used`; undefined where the system has no memory to pin. */
  withRoom(bytes: number): Buffer | undefined {
    const pinned = (this.#pinned ??= pin(this.#api, this.#bytes));
    if (pinned.length === 0) return undefined;
    if (pinned[this.#turn].used + bytes > this.#bytes) {
      this.#turn = (this.#turn + 1) % pinned.length;
      this.free(pinned[this.#turn]);
    }
    return pinned[this.#turn];
  }

  /** Waits for the copies that use it. */
  free(buffer: Buffer): void {
    if (buffer.busy) this.#api.cuEventSynchronize(buffer.done);
    buffer.busy = false;
    buffer.used = 0;
  }

  /** A copy that uses its bytes up to `end` is on its way. */
  queued(buffer: Buffer, end: number): void {
    this.#api.cuEventRecord(buffer.done, this.#stream);
    buffer.busy = true;
    buffer.used = Math.ceil(end / ALIGNMENT) * ALIGNMENT;
  }
}

/** Two buffers, or none where the system has no memory to pin. */
function pin(api: GpuApi, bytes: number): Buffer[] {
  const memory: Uint8Array[] = [];
  const events: Event[] = [];
  try {
    for (let i = 0; i < 2; i++) {
      memory.push(api.cuMemAllocHost(bytes));
      events.push(api.cuEventCreate(DISABLE_TIMING));
    }
  } catch (error) {
    for (const pinned of memory) api.cuMemFreeHost(pinned);
    for (const event of events) api.cuEventDestroy(event);
    if (isOutOfMemory(error)) return [];
    throw error;
  }
  return memory.map((bytes, i) => ({ bytes, done: events[i], busy: false, used: 0 }));
}
