// The package's version, read from its package.json, so that it is written in one place.
import { readFileSync } from 'node:fs';
import { packageRoot } from '../io/package_root.ts';

export const version = String(
  (JSON.parse(readFileSync(`${packageRoot}/package.json`, 'utf8')) as { version: string }).version,
);
