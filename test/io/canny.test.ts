// Edges against OpenCV's (golden/canny.jsonl), and as `sdxl sample` has ControlNets follow them.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { canny } from '../../io/canny.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { sdxl } from '../support/command_line.ts';
import { picture, writeControlNet } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { writeT2IAdapter } from '../support/t2i_adapter_golden.ts';

interface Case {
  size: [width: number, height: number];
  low: number;
  high: number;
  picture: string;
  /** A bit for each pixel. */
  edges: string;
}

for (const {
  size: [width, height],
  low,
  high,
  ...golden
} of goldenLines<Case>('canny'))
  test(`edges of ${width}x${height} above ${low} and ${high}, as OpenCV's`, (t) => {
    const data = new Uint8Array(Buffer.from(golden.picture, 'base64'));
    const bits = Buffer.from(golden.edges, 'base64');
    // OpenCV, too, takes the larger for the upper one.
    for (const thresholds of [[low, high] as const, [high, low] as const]) {
      const found = canny({ width, height, channels: 3, data }, thresholds).data;
      const differs = Array.from({ length: width * height }, (_, i) => i).filter((i) => {
        const wanted = (bits[i >> 3] >> (7 - (i & 7))) & 1 ? 255 : 0;
        return [0, 1, 2].some((c) => found[3 * i + c] !== wanted);
      });
      t.same(differs, [], `${thresholds}`);
    }
    t.end();
  });

test('sample follows the edges of pictures, and says so in the one it draws', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-canny-'));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  const at = (name: string) => join(folder, name);
  const net = writeControlNet(at('small'), 'small');
  const adapter = writeT2IAdapter(at('edges'), 'edges');
  const seen = picture(1, 64, 64);
  writePng(at('seen.png'), seen);
  writePng(at('edges.png'), canny(seen, [100, 200]));
  writePng(at('more.png'), canny(seen, [20, 30]));
  const sample = (...flags: string[]) =>
    sdxl(
      ...[
        'sample',
        '--model',
        join(goldenFolder, 'tiny-sdxl'),
        '--quiet',
        '--prompt',
        'a fox',
        '--seed',
        '1',
      ],
      ...['--width', '64', '--height', '64', '--steps', '2', ...flags],
    );
  async function drawn(name: string, ...flags: string[]): Promise<Uint8Array> {
    const { status, err } = await sample('--output', at(name), ...flags);
    t.equal(status, 0, err);
    return (await readPicture(at(name))).data;
  }
  const followed = (file: string) => [
    ...['--controlnet', net, '--control-image', at(file), '--adapter', adapter, '--adapter-image', at(file)],
  ];
  const usual = await drawn('usual.png', ...followed('seen.png'), '--canny');
  const far = async (a: Uint8Array, b: Promise<Uint8Array>) => maxDifference(a, await b);
  t.equal(
    await far(usual, drawn('own.png', ...followed('edges.png'))),
    0,
    'edges in the place of the picture',
  );
  const finer = await drawn('finer.png', ...followed('seen.png'), '--canny', '20,30');
  t.equal(await far(finer, drawn('own.png', ...followed('more.png'))), 0, 'by other thresholds');
  t.ok(maxDifference(finer, usual) > 0);
  t.equal(await far(finer, drawn('again.png', '--from', at('finer.png'))), 0, '--from takes them, too');
  for (const [flags, sentence] of [
    [['--canny'], /--canny needs --controlnet or --adapter/],
    [
      [...followed('seen.png'), '--canny', 'photo.png'],
      /--canny takes LOW,HIGH such as 100,200, not "photo.png"/,
    ],
  ] as const) {
    const { status, err } = await sample(...flags);
    t.equal(status, 2);
    t.match(err, sentence);
  }
});
