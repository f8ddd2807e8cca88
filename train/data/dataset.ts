// What a dataset is to whoever trains on it: examples that can be read one by one, and a list of what is wrong with it.

export interface PictureFile {
  /** Its path within the dataset, or its row; names it in messages. */
  id: string;
  /** The bytes of its PNG, JPEG or WebP file. @throws UserError */
  read(): Promise<Uint8Array>;
}

export interface Example extends PictureFile {
  /** The choices for its caption, at least one. */
  captions: string[];
  /** What a ControlNet or T2I-Adapter is shown beside it, where that is asked for. */
  conditioning?: PictureFile;
}

export interface Dataset {
  /** Sorted by id, so that the order does not depend on the disk. */
  examples: Example[];
  /** Captions without a picture and the reverse, one sentence each. */
  problems: string[];
}

export interface DatasetOptions {
  /** A folder, a .parquet file, a folder of .parquet files, or owner/name on the Hugging Face hub. */
  path: string;
  /** Hub: a branch, tag or commit. */
  revision: string;
  /** Which part of the dataset, where names or folders tell parts apart. */
  split: string;
  image_column: string;
  caption_column: string;
  /** Folders: what the name of a picture's file of captions ends in. */
  caption_extension: string;
  /** Where each picture's conditioning image is; empty where none is wanted. */
  conditioning_image_column: string;
  /** The caption of pictures that have none; empty where each must have its own. */
  instance_prompt: string;
}

export const datasetDefaults: Omit<DatasetOptions, 'path'> = {
  revision: 'main',
  split: 'train',
  image_column: 'image',
  caption_column: 'text',
  caption_extension: '.txt',
  conditioning_image_column: '',
  instance_prompt: '',
};
