// Which pictures a run shows, under which captions and at which sizes.
import { join } from 'node:path';
import { test } from 'tap';
import { openPictures } from '../../train/pictures/pictures.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { Run } from '../../train/run/run.ts';
import { folderOf, png } from '../support/datasets.ts';

const opened = (dataset: Partial<Run['dataset']>) =>
  openPictures(resolveRun({ dataset }, 'a run', 'x'), 8, { line() {}, progress() {} });

test('folders that say how often their pictures are shown', async (t) => {
  const path = folderOf(t, {
    '3_ohwx man/a.png': png(),
    '3_ohwx man/deep/b.png': png(8, 8, 1),
    '1_dog/c.png': png(8, 8, 2),
    'plain/2_d.png': png(8, 8, 3),
  });
  const shown = async (folder_repeats: boolean) => {
    const { samples } = await opened({ path, resolution: 8, instance_prompt: 'x', folder_repeats });
    t.equal(new Set(samples.map(({ key }) => key)).size, samples.length, 'each with draws of its own');
    return samples.map(({ id }) => id);
  };
  t.strictSame(await shown(false), [
    '1_dog/c.png',
    '3_ohwx man/a.png',
    '3_ohwx man/deep/b.png',
    'plain/2_d.png',
  ]);
  t.strictSame(await shown(true), [
    '1_dog/c.png',
    ...['', ' (2)', ' (3)'].map((copy) => `3_ohwx man/a.png${copy}`),
    ...['', ' (2)', ' (3)'].map((copy) => `3_ohwx man/deep/b.png${copy}`),
    'plain/2_d.png',
  ]);
});

test('what stands around captions, but those of the class', async (t) => {
  const path = folderOf(t, {
    'own/a.png': png(),
    'own/a.txt': 'a fox\nit runs',
    'class/b.png': png(8, 8, 1),
  });
  const [own, class_data_dir] = ['own', 'class'].map((name) => join(path, name));
  const affixes = { caption_prefix: 'ohwx,', caption_suffix: 'in a wood' };
  const dataset = { path: own, resolution: 8, class_data_dir, class_prompt: 'animal', ...affixes };
  const { samples } = await opened(dataset);
  t.strictSame(
    samples.map(({ captions }) => captions),
    [['ohwx, a fox in a wood', 'ohwx, it runs in a wood'], ['animal']],
  );
  await t.rejects(opened({ ...dataset, class_prompt: '' }), {
    name: 'UserError',
    message:
      /^dataset\.class_data_dir: .* has no picture with a caption .* one caption with dataset\.class_prompt$/,
  });
});

test('pictures at several resolutions', async (t) => {
  const path = folderOf(t, { 'a.png': png(40, 20), 'b.png': png(16, 16, 1) });
  const dataset = { path, resolution: [16, 32], instance_prompt: 'x' };
  const sizing = { aspect_ratio_buckets: true, bucket_no_upscale: true };
  const { samples, buckets, bucketOf } = await opened({ ...dataset, ...sizing });
  t.strictSame(
    samples.map(({ id }, i) => [id, buckets[bucketOf[i]].join('x')]),
    [
      ['a.png', '16x24'],
      ['a.png at 16x40', '16x40'],
      ['b.png', '16x16'],
    ],
  );
  t.equal(new Set(samples.map(({ key }) => key)).size, 3, 'each with draws of its own');
  t.same((await opened(dataset)).bucketOf.length, 4, 'and enlarged');
  await t.rejects(
    opened({ ...dataset, resolution: [16, 20] }),
    /dataset\.resolution 20 is not divisible by 8/,
  );
});
