// `sdxl serve` asked by OpenAI's own client for Python: what it draws is what `sdxl sample` draws, and it understands the rest.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { readPicture } from '../../io/image.ts';
import { packageRoot } from '../../io/package_root.ts';
import { base } from './calls.ts';

const image = join(packageRoot, 'test', 'golden', 'png', 'input.png');

/** What the client is to tell. */
const wanted = {
  pictures: 2,
  edited: 1,
  events: ['image_generation.partial_image', 'image_generation.partial_image', 'image_generation.completed'],
  models: ['tiny-sdxl'],
  error: 'size 65 is not divisible by 8; 64 or 72 is',
};

/** Whether it all came so; nothing where the client is absent. */
export async function served(sdxl: (...argv: string[]) => Promise<void>, folder: string): Promise<boolean[]> {
  const flags = ['serve', '--model', base, '--steps', '4', '--listen-port', '0', '--json', '--quiet'];
  const server = spawn(process.execPath, [join(packageRoot, 'bin', 'sdxl.js'), ...flags], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  try {
    const [line] = await once(server.stdout, 'data');
    const { url } = JSON.parse(String(line));
    const out = join(folder, 'served.png');
    const script = join(packageRoot, 'test', 'interop', 'openai_peer.py');
    const { status, stdout, stderr } = spawnSync('python3', [script, url, image, out], { encoding: 'utf8' });
    if (status === 3 || status === null) {
      console.log(`SKIPPED: openai cannot be loaded here (${stdout?.trim() || 'no python3'})`);
      return [];
    }
    const ours = join(folder, 'sampled.png');
    const asked = ['--prompt', 'a red fox', '--seed', '5', '--steps', '3', '--width', '64', '--height', '64'];
    await sdxl('sample', '--model', base, ...asked, '--output', ours);
    const isSame = stdout.trim() === '' ? false : await samePixels(ours, out);
    const ok = isSame && JSON.stringify(JSON.parse(stdout)) === JSON.stringify(wanted);
    console.log(
      `${ok ? 'ok' : 'NOT OK'}  serve: OpenAI's client${ok ? '' : `: ${stdout}${stderr.slice(-500)}`}`,
    );
    return [ok];
  } finally {
    server.kill();
  }
}

async function samePixels(a: string, b: string): Promise<boolean> {
  const [{ data: ours }, { data: theirs }] = [await readPicture(a), await readPicture(b)];
  return Buffer.compare(ours, theirs) === 0;
}
