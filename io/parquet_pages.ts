// Pages of a parquet file, checked before hyparquet decodes them: it takes the counts in a page on trust, and a damaged one can have it loop
// without end, or fill memory until the program is ended, which no handler of errors hears of. A page is unpacked here and once more
// there, the first time it is read: that is little beside decoding its pictures.
import {
  type ColumnMetaData,
  type Compressors,
  type DataReader,
  type FileMetaData,
  type PageHeader,
  parquetSchema,
} from 'hyparquet';
import { parquetHeader } from 'hyparquet/src/column.js';
import { decompressPage } from 'hyparquet/src/datapage.js';
import { deltaBinaryUnpack } from 'hyparquet/src/delta.js';
import { readRleBitPackedHybrid } from 'hyparquet/src/encoding.js';
import { getMaxDefinitionLevel, getMaxRepetitionLevel, getTreePath } from 'hyparquet/src/schema.js';
import { readVarInt } from 'hyparquet/src/thrift.js';

/** A column's part of a row group. */
interface Chunk {
  meta: ColumnMetaData;
  group: number;
  start: number;
  end: number;
  /** The most values of a page. */
  values: number;
  maxRepetition: number;
  maxDefinition: number;
  compressors: Compressors;
}

/** Checks what is read of a column: the pages in `bytes`, which begin at `start` in the file. @throws Error that says what is damaged */
export type CheckPages = (column: string, bytes: ArrayBuffer, start: number) => void;

/** What checks a table's pages, each of them once. */
export function pageChecks(metadata: FileMetaData, compressors: Compressors): CheckPages {
  const chunks = chunksOf(metadata, compressors);
  const sound = new Set<number>();
  return (column, bytes, start) => {
    for (const chunk of chunks) {
      const from = Math.max(start, chunk.start);
      const end = Math.min(start + bytes.byteLength, chunk.end);
      if (chunk.meta.path_in_schema[0] !== column || from >= end) continue;
      try {
        checkPages(chunk, new DataView(bytes, from - start, end - from), from, sound);
      } catch (error) {
        const name = chunk.meta.path_in_schema.join('.');
        throw new Error(`row group ${chunk.group}, column "${name}": ${(error as Error).message}`);
      }
    }
  };
}

function chunksOf(metadata: FileMetaData, compressors: Compressors): Chunk[] {
  const schema = parquetSchema(metadata);
  return metadata.row_groups.flatMap(({ columns, num_rows }, group) =>
    columns.flatMap(({ meta_data: meta }): Chunk[] => {
      if (!meta) return [];
      const path = getTreePath(schema, meta.path_in_schema);
      const start = Number(meta.dictionary_page_offset || meta.data_page_offset);
      const end = start + Number(meta.total_compressed_size);
      const maxRepetition = getMaxRepetitionLevel(path);
      const maxDefinition = getMaxDefinitionLevel(path);
      const values = Number(maxRepetition > 0 ? meta.num_values : num_rows);
      return [{ meta, group, start, end, values, maxRepetition, maxDefinition, compressors }];
    }),
  );
}

function checkPages(chunk: Chunk, view: DataView, at: number, sound: Set<number>): void {
  const reader = { view, offset: 0 };
  // hyparquet ends here too: at the last value, or a byte before the last.
  for (let seen = 0; seen < chunk.values && reader.offset < view.byteLength - 1; ) {
    const place = at + reader.offset;
    const header = parquetHeader(reader);
    const size = header.compressed_page_size;
    need(isCount(size) && isCount(header.uncompressed_page_size), 'a page has no size');
    need(reader.offset + size <= view.byteLength, 'a page is longer than its column');
    const bytes = new Uint8Array(view.buffer, view.byteOffset + reader.offset, size);
    if (!sound.has(place)) checkPage(chunk, header, bytes);
    sound.add(place);
    reader.offset += size;
    seen += (header.data_page_header ?? header.data_page_header_v2)?.num_values ?? 0;
  }
}

function checkPage(chunk: Chunk, header: PageHeader, bytes: Uint8Array): void {
  if (header.type === 'DATA_PAGE') checkFirstVersion(chunk, header, bytes);
  if (header.type === 'DATA_PAGE_V2') checkSecondVersion(chunk, header, bytes);
}

function checkFirstVersion(chunk: Chunk, header: PageHeader, bytes: Uint8Array): void {
  const { maxRepetition, maxDefinition, meta, compressors } = chunk;
  const { num_values: count, encoding } = header.data_page_header ?? {};
  need(isCount(count) && count <= chunk.values, 'a page has more values than its row group');
  if (maxDefinition === 0 && encoding === 'PLAIN') return; // nothing to repeat, nor to unpack for
  const reader = readerOf(decompressPage(bytes, header.uncompressed_page_size, meta.codec, compressors));
  if (maxRepetition > 0) levels(reader, maxRepetition, count);
  const nulls = maxDefinition > 0 ? levels(reader, maxDefinition, count) : 0;
  checkValues(reader, encoding, meta.type === 'BOOLEAN', count - nulls);
}

function checkSecondVersion(chunk: Chunk, header: PageHeader, bytes: Uint8Array): void {
  const { maxRepetition, maxDefinition, meta, compressors } = chunk;
  const page = header.data_page_header_v2;
  const { num_values: count, num_nulls: nulls, encoding } = page ?? {};
  const { repetition_levels_byte_length: repeated, definition_levels_byte_length: defined } = page ?? {};
  need(isCount(count) && count <= chunk.values, 'a page has more values than its row group');
  need(isCount(nulls) && nulls <= count, 'a page has more gaps than values');
  need(isCount(repeated) && isCount(defined), 'the levels of a page have no size');
  const reader = readerOf(bytes);
  if (maxRepetition > 0) levels(reader, maxRepetition, count, repeated);
  reader.offset = repeated;
  if (maxDefinition > 0) levels(reader, maxDefinition, count, defined);
  if (encoding === 'PLAIN') return;
  const packed = bytes.subarray(reader.offset);
  const size = header.uncompressed_page_size - repeated - defined;
  const unpack = () => decompressPage(packed, size, meta.codec, compressors);
  checkValues(
    readerOf(page?.is_compressed === false ? packed : unpack()),
    encoding,
    encoding === 'RLE',
    count - nulls,
  );
}

/** Reads levels, and gives how many of them are below the greatest. Without a length it stands in front of them. */
function levels(reader: DataReader, greatest: number, count: number, length?: number): number {
  const width = 32 - Math.clz32(greatest);
  checkRuns(reader, reader.offset + (length === undefined ? 4 : 0), width, count);
  const found = new Array<number>(count);
  readRleBitPackedHybrid(reader, width, found, length);
  return found.filter((level) => level !== greatest).length;
}

function checkValues(reader: DataReader, encoding: string | undefined, isBare: boolean, count: number): void {
  if (count === 0) return;
  if (encoding === 'RLE' || encoding?.endsWith('_DICTIONARY')) {
    // Truth values have their length in front, and are a bit wide; of others the width is told.
    const width = isBare ? 1 : reader.view.getUint8(reader.offset);
    checkRuns(reader, reader.offset + (isBare ? 4 : 1), width, count);
  }
  if (!encoding?.startsWith('DELTA_')) return;
  checkBlocks(reader);
  if (encoding !== 'DELTA_BYTE_ARRAY') return;
  deltaBinaryUnpack(reader, count, new Int32Array(count));
  checkBlocks(reader); // of the second lengths, which begin where the first ones end
}

/** The runs of `count` numbers of so many bits: none may be longer than what is still to come. */
function checkRuns({ view }: DataReader, from: number, width: number, count: number): void {
  const reader = { view, offset: from };
  need(width <= 32, 'a page has numbers of more than 32 bits');
  for (let seen = 0; seen < count && reader.offset < view.byteLength; ) {
    const header = readVarInt(reader) >>> 0;
    const isPacked = (header & 1) === 1;
    const run = (header >>> 1) * (isPacked ? 8 : 1);
    // Packed numbers end with their bytes, if they have any; some writers fill up their last 256.
    const most = !isPacked ? count - seen : width > 0 ? (8 * view.byteLength) / width : count + 256;
    need(run <= most, 'a page has a run that is longer than itself');
    reader.offset += isPacked ? (run / 8) * width : (width + 7) >> 3;
    seen += run;
  }
}

/** The sizes of blocks of differences, which say how far to go on. */
function checkBlocks({ view, offset }: DataReader): void {
  const reader = { view, offset };
  const size = readVarInt(reader);
  const parts = readVarInt(reader);
  need(size > 0 && parts > 0 && size % parts === 0, 'a page has blocks of no size');
}

const readerOf = (bytes: Uint8Array): DataReader => ({
  view: new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength),
  offset: 0,
});

const isCount = (value: unknown): value is number => Number.isInteger(value) && (value as number) >= 0;

function need(holds: boolean, otherwise: string): asserts holds {
  if (!holds) throw new Error(otherwise);
}
