// Tables in parquet, read a column or a row at a time through hyparquet: byte arrays stay bytes unless the file says that
// they are text. Where a file has a page index, a row costs its page; where it has none, a row group is decoded whole and
// the last two are kept, so that neighbours are free and memory stays small.
import zlib from 'node:zlib';
import type { AsyncBuffer, FileMetaData, RowGroup, SchemaTree } from 'hyparquet';
import { UserError } from './errors.ts';
import { asUserError } from './files.ts';
import { snappyDecompress } from './snappy.ts';

export interface ParquetTable {
  path: string;
  /** The top-level columns. */
  columns: readonly string[];
  rows: number;
  /** A whole column. @throws UserError when the file is damaged */
  readColumn(column: string): Promise<unknown[]>;
  /** One value. @throws UserError when the file is damaged */
  readValue(column: string, row: number): Promise<unknown>;
}

const keptGroups = 2;

/** Opens a parquet file and reads its footer. @throws UserError when it is missing or not parquet */
export async function openParquet(path: string): Promise<ParquetTable> {
  const told = async <T>(work: () => Promise<T>): Promise<T> => {
    try {
      return await work();
    } catch (error) {
      throw parquetError(error, path);
    }
  };
  const { metadata, columns, readRows } = await told(() => open(path));
  const read: Read = (...asked) => told(() => readRows(...asked));
  const groups = groupsOf(metadata);
  const readGroup = keepingLast(read);
  const rows = Number(metadata.num_rows);
  return {
    path,
    columns,
    rows,
    readColumn: (column) => read(column, 0, rows),
    async readValue(column, row) {
      const group = groups.find(({ end }) => row < end);
      if (!group) throw new Error(`${path} has no row ${row}`);
      if (group.indexed.has(column)) return (await read(column, row, row + 1))[0];
      return (await readGroup(column, group.start, group.end))[row - group.start];
    },
  };
}

/** Rows of a column, from the first on and before the last. */
type Read = (column: string, rowStart: number, rowEnd: number) => Promise<unknown[]>;

/** What a file's footer says, and how its rows are read, whose pages are checked first. */
async function open(path: string): Promise<{ metadata: FileMetaData; columns: string[]; readRows: Read }> {
  // Imported late: most commands never read a table.
  const { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema } = await import(
    'hyparquet'
  );
  const { pageChecks } = await import('./parquet_pages.ts');
  const file = await asyncBufferFromFile(path);
  const metadata = await parquetMetadataAsync(file);
  const schema = parquetSchema(metadata);
  checkFooter(metadata, schema);
  const check = pageChecks(metadata, compressors);
  const readRows: Read = async (column, rowStart, rowEnd) => {
    const checked: AsyncBuffer = {
      byteLength: file.byteLength,
      async slice(start, end) {
        const bytes = await file.slice(start, end);
        check(column, bytes, start);
        return bytes;
      },
    };
    const asked = { rowStart, rowEnd, columns: [column], utf8: false, useOffsetIndex: true };
    const rows = await parquetReadObjects({ file: checked, metadata, compressors, ...asked });
    return rows.map((row) => row[column]);
  };
  return { metadata, columns: schema.children.map(({ element }) => element.name), readRows };
}

/** `read` of row groups, of which the last ones are kept. */
function keepingLast(read: Read): Read {
  const kept = new Map<string, Promise<unknown[]>>();
  return (column, start, end) => {
    const key = `${column} ${start}`;
    const found = kept.get(key) ?? read(column, start, end);
    kept.delete(key);
    kept.set(key, found); // the youngest is last
    for (const old of [...kept.keys()].slice(0, -keptGroups)) kept.delete(old);
    return found;
  };
}

/** The paths of a schema's columns. */
const leavesOf = ({ path, children }: SchemaTree): string[] =>
  children.length > 0 ? children.flatMap(leavesOf) : [path.join('.')];

/**
 * What hyparquet takes on trust. It begins to read whatever chunks a group has, and of those that are no column of the schema's, or one a
 * second time, nobody hears an error, which then ends the program.
 */
function checkFooter({ num_rows, row_groups }: FileMetaData, schema: SchemaTree): void {
  const leaves = new Set(leavesOf(schema));
  const isSound = ({ columns }: RowGroup): boolean => {
    const paths = columns.map(({ meta_data }) => meta_data?.path_in_schema.join('.') ?? '');
    return new Set(paths).size === paths.length && paths.every((path) => leaves.has(path));
  };
  const rows = row_groups.reduce((sum, group) => sum + group.num_rows, 0n);
  const isNamed = schema.children.every(({ element }) => typeof element.name === 'string');
  if (rows !== num_rows || !isNamed || !row_groups.every(isSound))
    throw new Error('its footer contradicts itself');
}

interface Group {
  start: number;
  end: number;
  /** The columns of which single pages can be found. */
  indexed: ReadonlySet<string>;
}

function groupsOf({ row_groups }: FileMetaData): Group[] {
  let end = 0;
  return row_groups.map(({ num_rows, columns }) => {
    const start = end;
    end += Number(num_rows);
    const unindexed = columns.filter((chunk) => !chunk.offset_index_offset);
    const without = new Set(unindexed.map((chunk) => chunk.meta_data?.path_in_schema[0] ?? ''));
    const all = columns.map((chunk) => chunk.meta_data?.path_in_schema[0] ?? '');
    return { start, end, indexed: new Set(all.filter((name) => !without.has(name))) };
  });
}

// Zstandard came to Node with 22.15.
const { zstdDecompressSync } = zlib as { zstdDecompressSync?: typeof zlib.gunzipSync };

/** Unpacks no more than a page is said to hold: a few bytes may be told to become gigabytes. */
const bounded = (unpack: typeof zlib.gunzipSync) => (bytes: Uint8Array, length: number) =>
  unpack(bytes, { maxOutputLength: Math.max(1, length) });

const compressors = {
  GZIP: bounded(zlib.gunzipSync),
  BROTLI: bounded(zlib.brotliDecompressSync),
  SNAPPY: snappyDecompress,
  ...(zstdDecompressSync && { ZSTD: bounded(zstdDecompressSync) }),
};

function parquetError(error: unknown, path: string): unknown {
  const told = asUserError(error, path);
  if (told instanceof UserError) return told;
  const reason = (error as Error).message.trim().replace(/\s+/g, ' ');
  const another = 'write it with another compression';
  const mend = /ZSTD/.test(reason)
    ? `use Node 22.15 or newer, or ${another}`
    : /unsupported compression/.test(reason)
      ? `${another}, such as snappy`
      : 'download it again';
  return new UserError(`${path} cannot be read as parquet (${reason}): ${mend}`);
}
