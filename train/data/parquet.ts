// Pictures and captions in parquet files, as Hugging Face's datasets write them: columns of images, { bytes, path } or bytes, and a
// caption column of texts or lists of texts. Of pairs of which one picture is preferred a column of labels may say which, as Pick-a-Pic's
// (Kirstain et al. 2023) label_0 does of jpg_0 and jpg_1. Captions and labels are read at once, pictures when they are wanted.
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { openParquet, type ParquetTable } from '../../io/parquet.ts';
import { besideOf, type Dataset, type DatasetOptions, noCaption, type PictureFile } from './dataset.ts';
import { captionsOf, noColumn } from './metadata.ts';

/** Lists the rows of several files, named from `folder`, as one dataset. @throws UserError when a file is damaged or lacks a column */
export async function openParquetDataset(
  folder: string,
  names: readonly string[],
  options: Omit<DatasetOptions, 'path' | 'revision' | 'split'>,
): Promise<Dataset> {
  const { image_column, caption_column, label_column, instance_prompt } = options;
  const beside = besideOf(options);
  const dataset: Dataset = { examples: [], problems: [] };
  for (const name of names) {
    const path = join(folder, name);
    const table = await openParquet(path);
    const uncaptioned = instance_prompt !== '' && !table.columns.includes(caption_column);
    for (const wanted of [
      image_column,
      ...(uncaptioned ? [] : [caption_column]),
      ...[beside.column, label_column].filter((column) => column !== ''),
    ])
      if (!table.columns.includes(wanted)) throw noColumn(path, wanted, table.columns);
    const column = uncaptioned
      ? Array<string>(table.rows).fill(instance_prompt)
      : await table.readColumn(caption_column);
    const labels = label_column ? await table.readColumn(label_column) : undefined;
    for (const [row, value] of column.entries()) {
      const id = `${name}#${String(row).padStart(8, '0')}`;
      const choices = captionsOf(value);
      if (!choices)
        throw new UserError(`${id}: "${caption_column}" is neither a text nor a list of texts: mend it`);
      const captions = choices.length || !instance_prompt ? choices : [instance_prompt];
      const label = labels ? labelOf(labels[row], id, label_column) : 1;
      const [first, second] = label === 0 ? [beside.column, image_column] : [image_column, beside.column];
      const pictureIn = (column: string) => pictureOf(table, column, row, id);
      if (captions.length === 0) dataset.problems.push(`${id} ${noCaption}`);
      else if (label === 0 || label === 1)
        dataset.examples.push({
          ...pictureIn(first),
          captions,
          ...(second && { beside: { ...pictureIn(second), id: `${id} (${second})`, kind: beside.kind } }),
        });
    }
  }
  return dataset;
}

/** 1 where the first picture is preferred, 0 where the second is. */
function labelOf(value: unknown, id: string, column: string): number {
  const label = ['number', 'bigint', 'boolean'].includes(typeof value) ? Number(value) : Number.NaN;
  if (label >= 0 && label <= 1) return label;
  throw new UserError(
    `${id}: "${column}" is not a number from 0 to 1: 1 prefers the first picture, 0 the second, and 0.5 neither`,
  );
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
