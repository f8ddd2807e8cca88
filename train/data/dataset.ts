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
  /** A second picture that belongs to it, where that is asked for. */
  beside?: PictureBeside;
}

/** What a ControlNet or T2I-Adapter is shown with a picture, or its mask; or the one that people like less. */
export interface PictureBeside extends PictureFile {
  kind: 'conditioning image' | 'rejected picture';
}

export interface Dataset {
  /** Sorted by id, so that the order does not depend on the disk. */
  examples: Example[];
  /** Captions without a picture and the reverse, one sentence each. */
  problems: string[];
}

/** What is said of an example without one, for which there is a mend (survey.ts). */
export const noCaption = 'has no caption';

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
  /** Where each picture's conditioning image is, or the one that was rejected; empty where none is wanted. One of both may be. */
  conditioning_image_column: string;
  rejected_image_column: string;
  /** Parquet: 1 where the first of both pictures is preferred, 0 where the other is, between them a tie, which is left out. Empty for always 1. */
  label_column: string;
  /** The caption of pictures that have none; empty where each must have its own. */
  instance_prompt: string;
}

/** The revision of a run that names none. */
export const mainRevision = 'main';

/** The column of what is beside each picture, empty where nothing is, and its kind. */
export const besideOf = ({
  conditioning_image_column,
  rejected_image_column,
}: Pick<DatasetOptions, 'conditioning_image_column' | 'rejected_image_column'>): {
  column: string;
  kind: PictureBeside['kind'];
} =>
  rejected_image_column
    ? { column: rejected_image_column, kind: 'rejected picture' }
    : { column: conditioning_image_column, kind: 'conditioning image' };
