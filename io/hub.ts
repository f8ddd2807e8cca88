// Models and datasets from the Hugging Face hub, in the cache folder that Python's huggingface_hub uses, so that either
// finds what the other downloaded: models--owner--name/{blobs/<hash>, refs/<revision>,
// snapshots/<commit>/<file> → ../../blobs/<hash>}. The standard variables count: HF_HOME, HF_HUB_CACHE,
// HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and their older names, and those that name a proxy.
import { copyFileSync, existsSync, lstatSync, readdirSync, renameSync, rmSync, symlinkSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { UserError } from './errors.ts';
import { asUserError, makeFolder, readBytes, writeFileAtomic } from './files.ts';
import { downloadBlob, NetworkError, networkError, type RemoteFile } from './hub_download.ts';
import { fetchOf } from './proxy.ts';

export interface HubProgress {
  file: string;
  /** Bytes of all wanted files together. */
  done: number;
  total: number;
}

export interface HubOptions {
  /** What kind of repository it is; 'model' if absent. */
  repo_type?: 'model' | 'dataset';
  /** A branch, tag or commit; 'main' if absent. */
  revision?: string;
  /** The files wanted, by their paths in the repository, all of which must exist there; or chosen from those that do. */
  files: readonly string[] | ((all: readonly string[]) => readonly string[]);
  onProgress?: (progress: HubProgress) => void;
}

/** The repository is there, and has nothing that would be chosen. */
export class NothingWantedError extends UserError {}

/** The hub cannot be asked, and what is wanted is not in the cache. */
export class OutOfReachError extends UserError {}

/** How files of weights end: models/sdxl.safetensors that is not here is a file that is missed, and no repository to be asked for. */
const weights = /\.(safetensors|gguf|ckpt|pth?|bin)$/i;

/** Whether `text` reads as owner/name on the hub and is no path that exists here. */
export function looksLikeHubId(text: string): boolean {
  const reads = /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*$/.test(text) && !/--|\.\./.test(text);
  return reads && !weights.test(text) && !existsSync(text);
}

/** `owner/name`, and perhaps a file's path in it. Nothing where `text` reads otherwise or is there. */
export function hubPath(text: string): { id: string; inner?: string } | undefined {
  const [, id = '', inner] = /^([^/]+\/[^/]+)(?:\/(.+))?$/.exec(text) ?? [];
  return looksLikeHubId(id) && !existsSync(text) ? { id, inner } : undefined;
}

/**
 * Downloads what is missing of a model or dataset and returns its snapshot folder. Without a network, or with
 * HF_HUB_OFFLINE, the cached snapshot serves. @throws UserError when the repository, revision or files cannot be
 * had, saying what to do
 */
export async function resolveHub(repoId: string, options: HubOptions): Promise<string> {
  const repo = new HubRepo(repoId, options.repo_type ?? 'model', options.revision ?? 'main');
  const { snapshot: cached, lacks = '' } = repo.cachedSnapshot(options.files);
  // A commit never changes: with every listed file here there is nothing to ask.
  const pinned = isCommit(repo.revision) && Array.isArray(options.files);
  if (cached && (isOffline() || pinned)) return cached;
  if (isOffline())
    throw new OutOfReachError(
      `HF_HUB_OFFLINE is set and ${repoId} is not (wholly) in ${repo.folder}${lacks}: unset it to download`,
    );
  try {
    return await repo.download(options);
  } catch (error) {
    if (!(error instanceof NetworkError)) throw asUserError(error, repo.folder);
    if (cached) return cached;
    throw new OutOfReachError(
      `cannot reach ${endpoint()} for ${repoId} (${error.message}), which is not (wholly) in ${repo.folder}${lacks}: ` +
        'check the network, or give a local folder',
    );
  }
}

interface Listing {
  sha: string;
  siblings: { rfilename: string; size?: number; blobId?: string; lfs?: { sha256: string; size: number } }[];
}

class HubRepo {
  readonly id: string;
  readonly type: 'model' | 'dataset';
  readonly revision: string;
  readonly folder: string;

  constructor(id: string, type: 'model' | 'dataset', revision: string) {
    if (!/^[\w.-]+\/[\w.-]+$/.test(id) || /--|\.\./.test(id)) {
      throw new UserError(`"${id}" is no ${type} on the hub: give it as owner/name`);
    }
    if (!isSafePath(revision))
      throw new UserError(`"${revision}" is no revision: give a branch, a tag or a commit`);
    this.id = id;
    this.type = type;
    this.revision = revision;
    this.folder = join(cacheFolder(), `${type}s--${id.replace('/', '--')}`);
  }

  /**
   * The snapshot in the cache, if it has every listed file, or any of those that would be chosen. A choice that refuses the
   * cached files does not refuse the repository, which may have more: what it says is told only where nothing can be fetched.
   */
  cachedSnapshot(files: HubOptions['files']): { snapshot?: string; lacks?: string } {
    const commit = isCommit(this.revision)
      ? this.revision
      : readText(join(this.folder, 'refs', this.revision));
    if (commit === undefined || !isCommit(commit)) return {};
    const snapshot = join(this.folder, 'snapshots', commit);
    if (!existsSync(snapshot)) return {};
    if (typeof files !== 'function') {
      return files.every((name) => existsSync(join(snapshot, name))) ? { snapshot } : {};
    }
    const names = readdirSync(snapshot, { recursive: true, encoding: 'utf8' });
    const all = names.map((name) => name.replaceAll('\\', '/'));
    try {
      return files(all).length > 0 ? { snapshot } : {};
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      return { lacks: ` (of what is there: ${error.message})` };
    }
  }

  async download({ files, onProgress }: HubOptions): Promise<string> {
    const { sha, siblings } = await this.#list();
    const wanted = choose(this, siblings, files);
    const snapshot = join(this.folder, 'snapshots', sha);
    makeFolder(join(this.folder, 'blobs'));
    const total = wanted.reduce((sum, { size }) => sum + size, 0);
    let before = 0;
    for (const file of wanted) {
      const report = (done: number) => onProgress?.({ file: file.name, done: before + done, total });
      await this.#fetchFile(file, snapshot, sha, report);
      before += file.size;
      report(0);
    }
    // Last, so that a half-downloaded snapshot never becomes what offline use finds. A cache that has all of it may be read-only.
    const ref = join(this.folder, 'refs', this.revision);
    if (this.revision !== sha && readText(ref) !== sha) {
      makeFolder(dirname(ref));
      writeFileAtomic(ref, sha);
    }
    return snapshot;
  }

  async #fetchFile(
    file: RemoteFile,
    snapshot: string,
    sha: string,
    report: (done: number) => void,
  ): Promise<void> {
    const blob = join(this.folder, 'blobs', file.hash);
    if (!existsSync(blob)) {
      const path = file.name.split('/').map(encodeURIComponent).join('/');
      const open = (_: RemoteFile, start: number) =>
        this.#request(
          `${this.#page}/resolve/${sha}/${path}`,
          start > 0 ? { range: `bytes=${start}-` } : {},
          file.name,
        );
      await downloadBlob(file, blob, open, report);
    }
    linkAtomically(blob, join(snapshot, file.name));
  }

  /** Where a browser finds it. */
  get #page(): string {
    return `${endpoint()}/${this.type === 'dataset' ? 'datasets/' : ''}${this.id}`;
  }

  async #list(): Promise<Listing> {
    const revision = encodeURIComponent(this.revision);
    const response = await this.#request(
      `${endpoint()}/api/${this.type}s/${this.id}/revision/${revision}?blobs=true`,
      {},
    );
    const listing = (await response.json().catch(() => undefined)) as Listing | undefined;
    const isNamed = (file: Partial<Listing['siblings'][number]>) => typeof file?.rfilename === 'string';
    if (
      !isCommit(String(listing?.sha)) ||
      !Array.isArray(listing?.siblings) ||
      !listing.siblings.every(isNamed)
    ) {
      throw new UserError(`${endpoint()} does not answer like the Hugging Face hub: check HF_ENDPOINT`);
    }
    return listing;
  }

  async #request(url: string, headers: Record<string, string>, file?: string): Promise<Response> {
    const token = accessToken();
    const authorization: Record<string, string> = token ? { authorization: `Bearer ${token}` } : {};
    // Identity: a compressed body would not match its size, nor a range of it.
    const response = await fetchOf(url, {
      ...headers,
      ...authorization,
      'accept-encoding': 'identity',
    }).catch((error: unknown) => {
      throw error instanceof UserError ? error : networkError(error);
    });
    if (response.ok) return response;
    await response.body?.cancel();
    if (response.status >= 500) throw new NetworkError(`the hub answers ${response.status}`);
    throw this.#refusal(response, token !== undefined, file);
  }

  // The hub also says 401 for models that do not exist, so as not to tell which private ones do.
  #refusal(response: Response, hadToken: boolean, file?: string): UserError {
    const code = response.headers.get('x-error-code');
    const { status } = response;
    const { id, revision } = this;
    if (code === 'GatedRepo' || (status === 403 && !code)) {
      const mend = hadToken
        ? 'with the account of your token'
        : 'and set HF_TOKEN to a token of your account';
      return new UserError(`${id} is gated: accept its terms at ${this.#page} ${mend}`);
    }
    if (code === 'RevisionNotFound')
      return new UserError(`${id} has no revision "${revision}": check its name`);
    if (status === 429)
      return new UserError(`${endpoint()} refuses more requests for now: wait some minutes and run again`);
    if (status === 404 && file !== undefined)
      return new UserError(`${id} on the hub lists ${file}, but does not give it (404): try again later`);
    if (status === 401 || status === 404) {
      const mend = hadToken
        ? 'whether your HF_TOKEN is valid and may read it'
        : 'set HF_TOKEN if it is private';
      return new UserError(
        `the hub has no ${this.type} ${id} that you may read (${status}): check the name, and ${mend}`,
      );
    }
    return new UserError(`${endpoint()} refuses ${id} (status ${status}): try again later`);
  }
}

function remoteFile({ rfilename, size, blobId, lfs }: Listing['siblings'][number]): RemoteFile {
  const hash = lfs?.sha256 ?? blobId ?? '';
  // The names become paths, so they are not taken on trust.
  if (!isSafePath(rfilename) || !/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(hash)) {
    throw new UserError(
      `${endpoint()} lists "${rfilename}" in a way that is not safe to store: give it another name there, or check HF_ENDPOINT`,
    );
  }
  return { name: rfilename, size: lfs?.size ?? size ?? 0, hash };
}

function choose({ id, type }: HubRepo, all: Listing['siblings'], files: HubOptions['files']): RemoteFile[] {
  const wanted = typeof files === 'function' ? files(all.map(({ rfilename }) => rfilename)) : files;
  if (wanted.length === 0) {
    throw new NothingWantedError(
      `${id} on the hub has none of the files needed: check that it is the right kind of ${type}`,
    );
  }
  const byName = new Map(all.map((file) => [file.rfilename, file]));
  return wanted.map((name) => {
    const found = byName.get(name);
    if (found) return remoteFile(found);
    throw new UserError(`${id} on the hub has no file ${name}: check the ${type}'s name and revision`);
  });
}

// Relative, so that the cache can be moved; a copy where links are not allowed (Windows without developer
// mode).
function linkAtomically(blob: string, path: string): void {
  if (existsSync(path)) return;
  makeFolder(dirname(path));
  const temporary = `${path}.${process.pid}.tmp`;
  rmSync(temporary, { force: true });
  try {
    symlinkSync(relative(dirname(path), blob), temporary);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EPERM') throw error;
    copyFileSync(blob, temporary);
  }
  renameSync(temporary, path);
}

const isCommit = (text: string) => /^[0-9a-f]{40}$/.test(text);

const isSafePath = (path: unknown): path is string =>
  typeof path === 'string' &&
  !/[\\:\0]/.test(path) &&
  path.split('/').every((part) => !['', '.', '..'].includes(part));

const expandHome = (path: string) => path.replace(/^~(?=$|[/\\])/, homedir());

// Read at each call, so that a program may set them after importing this.
function hfHome(): string {
  const { HF_HOME, XDG_CACHE_HOME } = process.env;
  return expandHome(HF_HOME || join(XDG_CACHE_HOME || join(homedir(), '.cache'), 'huggingface'));
}

export function cacheFolder(): string {
  const { HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE } = process.env;
  return expandHome(HF_HUB_CACHE || HUGGINGFACE_HUB_CACHE || join(hfHome(), 'hub'));
}

const endpoint = () => (process.env.HF_ENDPOINT || 'https://huggingface.co').replace(/\/+$/, '');

const isOffline = () => /^(1|on|yes|true)$/i.test(process.env.HF_HUB_OFFLINE ?? '');

function accessToken(): string | undefined {
  const { HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH } = process.env;
  const token =
    HF_TOKEN || HUGGING_FACE_HUB_TOKEN || readText(expandHome(HF_TOKEN_PATH || join(hfHome(), 'token')));
  return token?.trim() || undefined;
}

function readText(path: string): string | undefined {
  if (!lstatSync(path, { throwIfNoEntry: false })) return undefined;
  return readBytes(path).toString().trim();
}
