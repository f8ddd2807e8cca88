// CSV (RFC 4180) as Python's csv module reads it with skipinitialspace, by which A1111 reads its styles: a field in quotes may have commas,
// line ends and quotes (twice) in it, spaces before a field are passed over, and a quote within one is a quote.
import { UserError } from './errors.ts';

const field = / *(?:"([^"]*(?:""[^"]*)*)"(?!")([^,\r\n]*)|(?!")([^,\r\n]*))(,|\r\n|\r|\n|$)/y;

/** Rows of fields, without empty lines. @throws UserError for a quote that nothing closes */
export function parseCsv(text: string): string[][] {
  const rows: string[][] = [[]];
  field.lastIndex = 0;
  for (let end = ','; end !== ''; ) {
    const at = field.lastIndex;
    const found = field.exec(text);
    if (!found) {
      const line = text.slice(0, at).split(/\r\n|\r|\n/).length;
      throw new UserError(`nothing closes the quote of line ${line}; write quotes within a text twice`);
    }
    const [, quoted, behind, plain] = found;
    rows[rows.length - 1].push(quoted === undefined ? plain : quoted.replaceAll('""', '"') + behind);
    end = found[4];
    if (end !== ',' && end !== '') rows.push([]);
  }
  return rows.filter((row) => row.length > 1 || row[0] !== '');
}
