// Datasets as a run opens them that says nothing else of its own.
import type { DatasetOptions } from '../../train/data/dataset.ts';
import { openDataset as open } from '../../train/data/source.ts';
import { usual } from '../../train/run/rules/owners.ts';

export const openDataset = (
  given: Partial<DatasetOptions> & Pick<DatasetOptions, 'path'>,
  onProgress?: Parameters<typeof open>[1],
): ReturnType<typeof open> => open({ ...usual.dataset, ...given }, onProgress);
