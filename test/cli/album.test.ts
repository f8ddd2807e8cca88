// The files of a call of `sdxl sample`: written by the time it ends, in order, and where one cannot be written the others are.
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openAlbum } from '../../cli/sample/album.ts';
import { encodePng } from '../../io/png.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { mostThreads } from '../../io/threads.ts';
import type { DecodedPicture, Latents } from '../../models/vae/latents.ts';

const latents = (seed: number): Latents => ({ shape: [1, 1, 1, 2], data: Float32Array.of(seed, -seed) });
/** Two pictures of 24x16. */
const images = (seed: number): DecodedPicture[] =>
  [0, 1].map((image) => ({
    ...{ width: 24, height: 16, channels: 3, finite: true },
    data: Uint8Array.from({ length: 3 * 16 * 24 }, (_, i) => 127 * (1 + Math.sin((i + image) * seed))),
  }));

test('pictures, their text and the latents', async (t) => {
  const folder = t.testdir();
  const saved = join(folder, 'latents.safetensors');
  const calls = 2 * mostThreads + 2;
  const album = openAlbum(join(folder, 'out.png'), saved, 2 * calls);
  for (let call = 0; call < calls; call++)
    await album.add(images(call + 1), latents(call), { parameters: `call ${call}` });
  await album.close();
  t.same(
    album.files,
    Array.from({ length: 2 * calls }, (_, i) => join(folder, `out-${i}.png`)),
  );
  for (const [i, file] of album.files.entries()) {
    const call = Math.floor(i / 2);
    const want = encodePng(images(call + 1)[i % 2], { parameters: `call ${call}` });
    t.ok(readFileSync(file).equals(want), file);
  }
  t.same(openSafetensors(saved).tensors.get('latents')?.shape, [calls, 1, 1, 2]);
  t.same(album.spoilt, []);
});

test('what is not finite is told, and written', async (t) => {
  const output = join(t.testdir(), 'out.png');
  const album = openAlbum(output, undefined, 2);
  const [first, second] = images(1);
  await album.add([first, { ...second, finite: false }], latents(0), {});
  await album.close();
  t.same(album.spoilt, [output.replace('.png', '-1.png')]);
  t.ok(album.files.every(existsSync));
});

test('a picture that cannot be written ends the call, and the others stay', async (t) => {
  const folder = join(t.testdir(), 'pictures');
  const saved = join(t.testdirName, 'latents.safetensors');
  mkdirSync(folder);
  const album = openAlbum(join(folder, 'out.png'), saved, 6);
  await album.add(images(1), latents(0), {});
  await album.settle();
  const kept = album.files.map((file) => readFileSync(file));
  t.equal(kept.length, 2);
  rmSync(folder, { recursive: true });
  const message = /pictures.*does not exist/;
  await album.add(images(2), latents(1), {});
  await album.settle();
  await t.rejects(album.add(images(3), latents(2), {}), { name: 'UserError', message }, 'at the next');
  await album.settle();
  await t.rejects(album.close(), { name: 'UserError', message }, 'at the end');
  t.notOk(existsSync(saved), 'no latents of pictures that are not there');
});
