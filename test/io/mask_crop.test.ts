// Inpainting of a part alone against diffusers' image processors (golden/mask_crop.jsonl), and through the command line.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { preprocessMask, readPicture, toGrey, writePng } from '../../io/image.ts';
import { cutAndFill, maskWindow, overlay } from '../../io/mask_crop.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import { readPngText } from '../../io/png.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLines } from '../support/golden.ts';

interface Case {
  size: [number, number];
  drawn_size: [number, number];
  padding_mask_crop: number;
  crops_coords: [number, number, number, number];
  picture: string;
  mask: string;
  drawn: string;
  part: string;
  mask_part: string;
  overlay: string;
}

const cases = goldenLines<Case>('mask_crop');
const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'base64'));

for (const golden of cases) {
  const [width, height] = golden.size;
  const [w, h] = golden.drawn_size;
  const padding = golden.padding_mask_crop;
  test(`${width}x${height}, ${padding} pixels around a mask, drawn at ${w}x${h}, as diffusers`, (t) => {
    const picture: Picture = { width, height, channels: 3, data: bytes(golden.picture) };
    const mask: Mask = { width, height, channels: 1, data: bytes(golden.mask) };
    const window = maskWindow(mask, w, h, padding);
    const { left, top } = window;
    t.same([left, top, left + window.width, top + window.height], golden.crops_coords);
    t.same(cutAndFill(picture, window, w, h).data, bytes(golden.part), 'the part');
    const seen = preprocessMask(cutAndFill(mask, window, w, h), w, h).data;
    t.same(Uint8Array.from(seen), bytes(golden.mask_part), "the mask's part");
    const drawn: Picture = { width: w, height: h, channels: 3, data: bytes(golden.drawn) };
    t.same(overlay(picture, mask, window, drawn).data, bytes(golden.overlay), 'laid back');
    t.end();
  });
}

test('an odd number of columns more: one more of them on the right, as diffusers', (t) => {
  const white = (i: number) => i % 20 >= 8 && i % 20 < 11 && i >= 40 && i < 140;
  const data = Uint8Array.from({ length: 200 }, (_, i) => (white(i) ? 255 : 0));
  // crop_x1 -= 7 // 2; crop_x2 += 7 - 7 // 2
  t.same(maskWindow({ width: 20, height: 10, channels: 1, data }, 64, 32, 0), {
    ...{ left: 5, top: 2, width: 10, height: 5 },
  });
  t.end();
});

test('sdxl sample draws the part, and leaves the rest of the picture as it is', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-part-'));
  const [image, mask, output, again] = ['image', 'mask', 'x', 'y'].map((name) => join(folder, `${name}.png`));
  const [width, height] = [80, 72];
  const noise = (i: number) => (i * 2654435761) >>> 24;
  writePng(image, {
    width,
    height,
    channels: 3,
    data: Uint8Array.from({ length: width * height * 3 }, (_, i) => noise(i)),
  });
  const white = (i: number) => i % width >= 20 && i % width < 40 && i >= 30 * width && i < 45 * width;
  const levels = Uint8Array.from({ length: width * height }, (_, i) => (white(i) ? 255 : 0));
  writePng(mask, { width, height, channels: 1, data: levels });
  const model = ['-m', join(goldenFolder, 'tiny-sdxl'), '-p', 'x', '--steps', '2', '-s', '1', '--quiet'];
  const over = ['-i', image, '--mask', mask, '--padding-mask-crop', '4'];
  const { status, out, err } = await sdxl(
    'sample',
    ...model,
    ...over,
    '-W',
    '64',
    '-H',
    '64',
    '-o',
    output,
    '--json',
  );
  t.equal(status, 0, err);
  t.match(JSON.parse(out), { width, height });
  const [before, after] = [await readPicture(image), await readPicture(output)];
  t.same([after.width, after.height], [width, height]);
  const changed = [...toGrey(after).data].map((value, i) => value !== toGrey(before).data[i]);
  t.notOk(
    changed.some((is, i) => is && !white(i)),
    'nothing beside the mask',
  );
  t.ok(changed.filter(Boolean).length > 200, 'most of what it marks');
  t.equal(JSON.parse(readPngText(output).sdxl).paddingMaskCrop, 4);
  t.equal((await sdxl('sample', '--from', output, '-o', again, '--quiet')).status, 0);
  t.ok(readFileSync(again).equals(readFileSync(output)), 'and again by its settings');

  writePng(mask, { width, height, channels: 1, data: new Uint8Array(width * height) });
  const black = await sdxl('sample', ...model, ...over, '-o', output);
  t.equal(black.status, 2);
  t.match(black.err, /error: .*mask.*\.png is all black: make white what is to be painted anew/);
  rmSync(folder, { recursive: true });
});
