// Models as commands ask for them: with downloads shown on the terminal.
import { existsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { hubPath } from '../io/hub.ts';
import { packageRoot } from '../io/package_root.ts';
import {
  type LocateOptions,
  locateControlNet,
  locateT2IAdapter,
  locateVae,
} from '../models/locate/locate.ts';
import { locateImageEncoder, locateIPAdapter } from '../models/locate/locate_ip_adapter.ts';
import { locateUNet, locateWithUNet } from '../models/locate/locate_unet.ts';
import type { Locate } from '../train/materials.ts';
import { type Bar, progressBar } from './progress.ts';
import type { Terminal } from './terminal.ts';

/** The small model in the package: what is drawn from when none is named. */
export const shippedModel = join(packageRoot, 'assets', 'emoji');

/** Whether a model is of many files, in a folder or on the hub, and so has its own configs. */
export function isFolderOrId(path: string): boolean {
  const hub = hubPath(path);
  return hub ? hub.inner === undefined : existsSync(path) && statSync(path).isDirectory();
}

/** A bar for each download. */
export function downloadsOn(terminal: Terminal, quiet: boolean): LocateOptions['onProgress'] {
  const bars = new Map<string, Bar | undefined>();
  return (path, { done, total }) => {
    if (!bars.has(path)) bars.set(path, progressBar(terminal, `downloading ${path}, MB`, quiet));
    const bar = bars.get(path);
    bar?.update(Math.round(done / 1e6), Math.max(1, Math.round(total / 1e6)));
    if (done < total) return;
    bar?.end();
    bars.set(path, undefined); // what is told once more is known
  };
}

/** All, as training asks for them. */
export const locatorOf = (where: LocateOptions): Locate => ({
  model: (path, unet) => locateWithUNet(path, unet, where),
  unet: (path, model) => locateUNet(path, model, where),
  vae: (path) => locateVae(path, where),
  controlnet: (path) => locateControlNet(path, where),
  adapter: (path) => locateT2IAdapter(path, where),
  ipAdapter: (path) => locateIPAdapter(path, where),
  imageEncoder: (path) => locateImageEncoder(path, where),
});
