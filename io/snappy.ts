// Snappy's raw format, as pages of parquet are packed in it. Not hyparquet's own: a damaged length can take that back to where it was, so
// that it never ends. Here each element has to fit into what is left, of the input and of the output.

/** Unpacks what has to come to `length` bytes. @throws Error when it does not */
export function snappyDecompress(packed: Uint8Array, length: number): Uint8Array {
  const input = Buffer.from(packed.buffer, packed.byteOffset, packed.byteLength);
  const output = new Uint8Array(length);
  let at = input.findIndex((byte) => byte < 128) + 1; // behind the length, which the page's header has too
  let end = 0;
  while (at < input.length) {
    const tag = input[at++];
    const kind = tag & 3;
    let size = kind === 1 ? 4 + ((tag >>> 2) & 7) : 1 + (tag >>> 2);
    if (kind === 0) {
      if (size > 60) {
        const bytes = size - 60;
        size = 1 + input.readUIntLE(at, bytes);
        at += bytes;
      }
      if (at + size > input.length || end + size > length) throw damaged();
      output.set(input.subarray(at, at + size), end);
      at += size;
    } else {
      const bytes = kind === 3 ? 4 : kind;
      const back = input.readUIntLE(at, bytes) + (kind === 1 ? (tag >>> 5) << 8 : 0);
      at += bytes;
      if (back === 0 || back > end || end + size > length) throw damaged();
      // A byte at a time, as a copy may go on into what it has just brought.
      for (let i = end; i < end + size; i++) output[i] = output[i - back];
    }
    end += size;
  }
  if (end !== length) throw damaged();
  return output;
}

const damaged = () => new Error('its compressed bytes are damaged');
