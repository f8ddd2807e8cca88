// PNG encoding of 8-bit grey or RGB pictures (https://www.w3.org/TR/png-3). Our own because the pure
// JavaScript encoders refuse text outside Latin-1, and prompts are kept in the file's text. Each row takes
// the filter whose bytes, read as signed numbers, have the least sum of magnitudes: the specification's own
// heuristic. Text is read back from anybody's PNG, pixels are not: a library does that.
import { crc32, deflateSync, inflateSync } from 'node:zlib';
import { UserError } from './errors.ts';
import { readBytes } from './files.ts';
import type { Pixels } from './pixels.ts';

/** The bytes of a PNG file; `text` becomes tEXt chunks, or iTXt (UTF-8) where Latin-1 does not suffice. */
export function encodePng(picture: Pixels, text: Readonly<Record<string, string>> = {}): Uint8Array {
  const { width, height, channels } = picture;
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  // Bit depth and colour type; the zeros after them mean no interlacing and the only compression there is.
  header.set([8, channels === 3 ? 2 : 0], 8);
  return Buffer.concat([
    Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a),
    chunk('IHDR', header),
    ...Object.entries(text).map(([keyword, value]) => textChunk(keyword, value)),
    chunk('IDAT', deflateSync(filterRows(picture), { level: 4 })),
    chunk('IEND', new Uint8Array(0)),
  ]);
}

function chunk(type: string, data: Uint8Array): Uint8Array {
  const bytes = Buffer.alloc(12 + data.byteLength);
  bytes.writeUInt32BE(data.byteLength, 0);
  bytes.write(type, 4, 'latin1');
  bytes.set(data, 8);
  bytes.writeUInt32BE(crc32(bytes.subarray(4, -4)), 8 + data.byteLength);
  return bytes;
}

function textChunk(keyword: string, value: string): Uint8Array {
  if (!/^[\x20-\x7e]{1,79}$/.test(keyword)) throw new Error(`"${keyword}" is not a PNG keyword`);
  const text = value.replaceAll('\0', ''); // A zero byte would end the field.
  if (/^[\n\x20-\x7e\xa0-\xff]*$/.test(text))
    return chunk('tEXt', Buffer.from(`${keyword}\0${text}`, 'latin1'));
  // After the keyword: uncompressed, method 0, no language tag, no translated keyword.
  return chunk(
    'iTXt',
    Buffer.concat([Buffer.from(`${keyword}\0\0\0\0\0`, 'latin1'), Buffer.from(text, 'utf8')]),
  );
}

/** Paeth's choice (filter 4): of the bytes left, above and above left the one nearest to left + up - upLeft. */
function paeth(left: number, up: number, upLeft: number): number {
  const toLeft = Math.abs(up - upLeft);
  const toUp = Math.abs(left - upLeft);
  const toUpLeft = Math.abs(left + up - 2 * upLeft);
  if (toLeft <= toUp && toLeft <= toUpLeft) return left;
  return toUp <= toUpLeft ? up : upLeft;
}

function filterRows({ data, width, height, channels }: Pixels): Uint8Array {
  const rowBytes = width * channels;
  const out = new Uint8Array(height * (1 + rowBytes));
  // Rows behind a pixel of zeros, which is what lies left of them.
  let row = new Uint8Array(channels + rowBytes);
  let above = new Uint8Array(channels + rowBytes);
  for (let y = 0; y < height; y++) {
    row.set(data.subarray(y * rowBytes, (y + 1) * rowBytes), channels);
    const costs = filterCosts(row, above, channels);
    const type = costs.indexOf(Math.min(...costs));
    out[y * (1 + rowBytes)] = type;
    filterRow(type, row, above, channels, out.subarray(y * (1 + rowBytes) + 1));
    [row, above] = [above, row];
  }
  return out;
}

/** The sums of magnitudes that the filters leave, by type; all in one walk, as most of a PNG's time goes here. */
function filterCosts(row: Uint8Array, above: Uint8Array, channels: number): number[] {
  let [none, sub, up, average, best] = [0, 0, 0, 0, 0];
  const magnitude = (rest: number) => Math.abs((rest << 24) >> 24);
  for (let i = channels; i < row.length; i++) {
    const [x, a, b, c] = [row[i], row[i - channels], above[i], above[i - channels]];
    none += magnitude(x);
    sub += magnitude(x - a);
    up += magnitude(x - b);
    average += magnitude(x - ((a + b) >> 1));
    best += magnitude(x - paeth(a, b, c));
  }
  return [none, sub, up, average, best];
}

/** What filter `type` leaves of a row. */
function filterRow(
  type: number,
  row: Uint8Array,
  above: Uint8Array,
  channels: number,
  target: Uint8Array,
): void {
  for (let i = channels; i < row.length; i++) {
    const [a, b, c] = [row[i - channels], above[i], above[i - channels]];
    const predicted = [0, a, b, (a + b) >> 1, type === 4 ? paeth(a, b, c) : 0][type];
    target[i - channels] = row[i] - predicted;
  }
}

/** `pngText` of a file. @throws UserError when it cannot be read, too */
export const readPngText = (path: string): Record<string, string> => pngText(readBytes(path), path);

/**
 * The text of a PNG by keyword (tEXt, zTXt and iTXt); `name` is what errors call it. A chunk that is damaged is passed over.
 * @throws UserError when it is no PNG
 */
export function pngText(file: Buffer, name: string): Record<string, string> {
  if (file.subarray(0, 8).toString('latin1') !== '\x89PNG\r\n\x1a\n')
    throw new UserError(`${name} is not a PNG file; give one that carries its settings`);
  const text: Record<string, string> = Object.create(null);
  let texts = 0;
  for (let at = 8; at + 12 <= file.length; ) {
    const length = file.readUInt32BE(at);
    const type = file.toString('latin1', at + 4, at + 8);
    const data = file.subarray(at + 8, at + 8 + length);
    const entry = data.length === length && texts < mostTexts ? textOf(type, data) : undefined;
    if (/^(tEXt|zTXt|iTXt)$/.test(type)) texts++;
    if (entry) text[entry[0]] = entry[1];
    at += 12 + length;
  }
  return text;
}

/** A settings text is short, and there are few: what unpacks to more than this, and what follows so many, is an attack or a mistake. */
const longestText = 1 << 20;
const mostTexts = 100;

function textOf(type: string, data: Buffer): [keyword: string, value: string] | undefined {
  const end = data.indexOf(0);
  if (end < 1 || end > 79) return undefined;
  const [keyword, rest] = [data.toString('latin1', 0, end), data.subarray(end + 1)];
  const unpacked = (bytes: Buffer) => inflateSync(bytes, { maxOutputLength: longestText });
  try {
    if (type === 'tEXt') return [keyword, rest.toString('latin1')];
    if (type === 'zTXt') return [keyword, unpacked(rest.subarray(1)).toString('latin1')];
    if (type !== 'iTXt') return undefined;
    const language = rest.indexOf(0, 2);
    const translated = rest.indexOf(0, language + 1);
    if (language < 0 || translated < 0) return undefined;
    const value = rest.subarray(translated + 1);
    return [keyword, (rest[0] ? unpacked(value) : value).toString('utf8')];
  } catch {
    return undefined;
  }
}
