// Pictures and captions in parquet files, as Hugging Face's datasets write them: columns of images, { bytes, path } or bytes, and a
// caption column of texts or lists of texts. Captions are read at once, pictures when they are wanted.
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { openParquet, type ParquetTable } from '../../io/parquet.ts';
import type { Dataset, DatasetOptions, PictureFile } from './dataset.ts';
import { captionsOf, noColumn } from './metadata.ts';

/** Lists the rows of several files, named from `folder`, as one dataset. @throws UserError when a file is damaged or lacks a column */
export async function openParquetDataset(
  folder: string,
  names: readonly string[],
  {
    image_column,
    caption_column,
    conditioning_image_column,
    instance_prompt,
  }: Pick<
    DatasetOptions,
    'image_column' | 'caption_column' | 'conditioning_image_column' | 'instance_prompt'
  >,
): Promise<Dataset> {
  const dataset: Dataset = { examples: [], problems: [] };
  for (const name of names) {
    const path = join(folder, name);
    const table = await openParquet(path);
    const conditioned = conditioning_image_column !== '';
    const uncaptioned = instance_prompt !== '' && !table.columns.includes(caption_column);
    for (const wanted of [
      image_column,
      ...(uncaptioned ? [] : [caption_column]),
      ...(conditioned ? [conditioning_image_column] : []),
    ])
      if (!table.columns.includes(wanted)) throw noColumn(path, wanted, table.columns);
    const column = uncaptioned
      ? Array<string>(table.rows).fill(instance_prompt)
      : await table.readColumn(caption_column);
    for (const [row, value] of column.entries()) {
      const id = `${name}#${String(row).padStart(8, '0')}`;
      const choices = captionsOf(value);
      if (!choices)
        throw new UserError(`${id}: "${caption_column}" is neither a text nor a list of texts: mend it`);
      const captions = choices.length || !instance_prompt ? choices : [instance_prompt];
      const pictureIn = (column: string) => pictureOf(table, column, row, id);
      if (captions.length > 0)
        dataset.examples.push({
          ...pictureIn(image_column),
          captions,
          ...(conditioned && {
            conditioning: {
              ...pictureIn(conditioning_image_column),
              id: `${id} (${conditioning_image_column})`,
            },
          }),
        });
      else dataset.problems.push(`${id} has no caption`);
    }
  }
  return dataset;
}

function pictureOf(table: ParquetTable, column: string, row: number, id: string): PictureFile {
  return {
    id,
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
