// A small hub of our own, one repository whatever is asked for.
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import type { Test } from 'tap';

const commit = '0123456789abcdef0123456789abcdef01234567';

/** The files of `folder`/repo as a model on the hub, with an empty cache beside it; gives the paths that are asked for. */
export async function hubOf(t: Test, folder: string): Promise<string[]> {
  const asked: string[] = [];
  const repo = join(folder, 'repo');
  const files = readdirSync(repo, { recursive: true, encoding: 'utf8' }).filter((name) =>
    statSync(join(repo, name)).isFile(),
  );
  const siblings = files.map((rfilename) => {
    const bytes = readFileSync(join(repo, rfilename));
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    return { rfilename, size: bytes.length, blobId: sha256.slice(24), lfs: { sha256, size: bytes.length } };
  });
  const server = createServer((request, response) => {
    const path = request.url?.split(`/resolve/${commit}/`)[1];
    if (path) asked.push(path);
    if (path) response.end(readFileSync(join(repo, path)));
    else response.end(JSON.stringify({ sha: commit, siblings }));
  });
  await new Promise<void>((ready) => server.listen(0, '127.0.0.1', ready));
  t.teardown(() => {
    server.closeAllConnections();
    server.close();
  });
  const { port } = server.address() as AddressInfo;
  Object.assign(process.env, {
    HF_ENDPOINT: `http://127.0.0.1:${port}`,
    HF_HUB_CACHE: join(folder, 'cache'),
  });
  return asked;
}
