// The rows of metadata.jsonl and metadata.csv: a file name and one or more captions each. CSV is RFC 4180's: quoted
// fields may hold commas, doubled quotes and line breaks; lines may end as in any system's texts.
import { didYouMean, UserError } from '../../io/errors.ts';
import { readText } from '../../io/files.ts';
import { isRecord } from '../../io/json.ts';

export interface MetadataRow {
  file_name: string;
  /** Trimmed, without empty ones. */
  captions: string[];
  /** The file name of what is beside it; undefined where nothing is wanted, or the row has none. */
  beside?: string;
  /** Where the row begins, from 1. */
  line: number;
}

/**
 * Reads a metadata file. A column of pictures may have its name with _file_name behind, as Hugging Face's imagefolder has it. That of
 * captions may be missing unless `needsCaptions`.
 * @throws UserError naming the line that cannot be read or the column that is not there
 */
export function readMetadata(
  path: string,
  captionColumn: string,
  besideColumn: string = '',
  needsCaptions = true,
): MetadataRow[] {
  const text = readText(path);
  const records = path.endsWith('.csv') ? csvRecords(text, path) : jsonLines(text, path);
  return records.map(({ record, line }) => {
    const spelled = [`${besideColumn}_file_name`, besideColumn];
    const second = besideColumn && (spelled.find((key) => Object.hasOwn(record, key)) ?? spelled[1]);
    const columns = [needsCaptions && captionColumn, second !== '' && second];
    for (const column of ['file_name', ...columns.filter((each) => each !== false)]) {
      if (!Object.hasOwn(record, column)) throw noColumn(`${path}:${line}`, column, Object.keys(record));
    }
    const name = record.file_name;
    if (typeof name !== 'string' || name === '')
      throw new UserError(`${path}:${line}: file_name is not a text: write the picture's path there`);
    const captions = captionsOf(record[captionColumn]);
    if (!captions)
      throw new UserError(
        `${path}:${line}: "${captionColumn}" is neither a text nor a list of texts: mend it`,
      );
    const beside = second ? (record[second] ?? '') : '';
    if (typeof beside !== 'string')
      throw new UserError(`${path}:${line}: "${second}" is not a text: write the image's path there`);
    return { file_name: name, captions, beside: beside || undefined, line };
  });
}

/** A caption, a list of them, or nothing at all as a list; undefined for anything else. */
export function captionsOf(value: unknown): string[] | undefined {
  const values = Array.isArray(value) ? value : [value ?? ''];
  if (!values.every((entry) => typeof entry === 'string')) return undefined;
  return values.map((entry: string) => entry.trim()).filter((entry) => entry !== '');
}

export function noColumn(where: string, column: string, columns: readonly string[]): UserError {
  const hint = didYouMean(column, columns) || `; its columns are ${columns.join(', ')}`;
  return new UserError(`${where} has no column "${column}"${hint}`);
}

interface Located {
  record: Record<string, unknown>;
  line: number;
}

function jsonLines(text: string, path: string): Located[] {
  return text.split('\n').flatMap((source, i) => {
    if (source.trim() === '') return [];
    let record: unknown;
    try {
      record = JSON.parse(source);
    } catch {
      record = undefined;
    }
    if (!isRecord(record)) throw new UserError(`${path}:${i + 1} is not a JSON object: correct the line`);
    return [{ record, line: i + 1 }];
  });
}

function csvRecords(text: string, path: string): Located[] {
  const [header, ...rows] = csvRows(text, path);
  if (!header)
    throw new UserError(`${path} is empty: write a line of column names and a line for each picture`);
  const columns = header.fields.map((name) => name.trim());
  const twice = columns.find((name, i) => name !== '' && columns.indexOf(name) < i); // as spreadsheets end lines
  if (twice !== undefined)
    throw new UserError(`${path} names the column "${twice}" twice: remove one, or give it another name`);
  return rows.map(({ fields, line }) => {
    if (fields.length !== columns.length) {
      throw new UserError(
        `${path}:${line} has ${fields.length} fields where the first line names ${columns.length}: ` +
          'put texts that hold commas in quotes',
      );
    }
    return { record: Object.fromEntries(columns.map((name, i) => [name, fields[i]])), line };
  });
}

function csvRows(text: string, path: string): { fields: string[]; line: number }[] {
  const rows: { fields: string[]; line: number }[] = [];
  // Without a choice for each letter, of which a long text would have more than the stack holds.
  const field = /(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(,|\r\n|\n|\r|$)/y;
  let fields: string[] = [];
  let [line, begin] = [1, 1];
  while (field.lastIndex < text.length) {
    const match = field.exec(text);
    if (!match)
      throw new UserError(`${path}:${line} has a quote that does not end: double quotes inside a text`);
    fields.push(match[1]?.replaceAll('""', '"') ?? match[2]);
    line += match[0].split(/\r\n|\n|\r/).length - 1;
    const ends = match[3] !== ',' || field.lastIndex === text.length;
    if (match[3] === ',' && ends) fields.push('');
    if (!ends) continue;
    if (fields.length > 1 || fields[0] !== '') rows.push({ fields, line: begin });
    [fields, begin] = [[], line];
  }
  return rows;
}
