// Pictures and captions in parquet files, as Hugging Face's datasets write them: an image column of { bytes, path } or of
// bytes, and a caption column of texts or lists of texts. Captions are read at once, pictures when they are wanted.
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { openParquet, type ParquetTable } from '../../io/parquet.ts';
import type { Dataset, DatasetOptions, Example } from './dataset.ts';
import { captionsOf, noColumn } from './metadata.ts';

/** Lists the rows of several files, named from `folder`, as one dataset. @throws UserError when a file is damaged or lacks a column */
export async function openParquetDataset(
  folder: string,
  names: readonly string[],
  {
    image_column,
    caption_column,
    instance_prompt,
  }: Pick<DatasetOptions, 'image_column' | 'caption_column' | 'instance_prompt'>,
): Promise<Dataset> {
  const dataset: Dataset = { examples: [], problems: [] };
  for (const name of names) {
    const path = join(folder, name);
    const table = await openParquet(path);
    for (const wanted of [image_column, caption_column])
      if (!table.columns.includes(wanted)) throw noColumn(path, wanted, table.columns);
    const column = await table.readColumn(caption_column);
    for (const [row, value] of column.entries()) {
      const id = `${name}#${String(row).padStart(8, '0')}`;
      const choices = captionsOf(value);
      if (!choices)
        throw new UserError(`${id}: "${caption_column}" is neither a text nor a list of texts: mend it`);
      const captions = choices.length || !instance_prompt ? choices : [instance_prompt];
      if (captions.length > 0) dataset.examples.push(exampleOf(table, image_column, row, id, captions));
      else dataset.problems.push(`${id} has no caption`);
    }
  }
  return dataset;
}

function exampleOf(
  table: ParquetTable,
  column: string,
  row: number,
  id: string,
  captions: string[],
): Example {
  return {
    id,
    captions,
    async read() {
      const value = await table.readValue(column, row);
      const bytes = value instanceof Uint8Array ? value : (value as { bytes?: unknown } | undefined)?.bytes;
      if (bytes instanceof Uint8Array) return bytes;
      throw new UserError(
        `${id} has no picture in "${column}": the column must hold the bytes of picture files`,
      );
    },
  };
}
