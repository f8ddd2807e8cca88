// The pool behind every device, over a driver that only counts: what is handed out, when the driver is asked, what a reserve
// keeps to itself, and who gives what back when memory runs out.
import { test } from 'tap';
import type { Block, Driver } from '../../engine/driver.ts';
import { holding, MemoryPool } from '../../engine/memory.ts';
import { standInCuda, standInDevice } from '../../engine/profile.ts';

/** A driver of so many bytes, and the blocks that it has handed out. Addresses rise. */
function open(capacity = 2 ** 30) {
  const held = new Set<Block>();
  let next = 0n;
  const bytes = () => [...held].reduce((sum, block) => sum + block.bytes, 0);
  const driver = {
    label: 'gpu 1',
    allocate(size) {
      if (bytes() + size > capacity) return undefined;
      const block = { bytes: size, address: next };
      next += BigInt(size);
      held.add(block);
      return block;
    },
    free: (block) => void held.delete(block),
    room: () => ({ free: capacity - bytes(), total: capacity }),
  } satisfies Partial<Driver>;
  return { held, pool: new MemoryPool(driver as unknown as Driver) };
}

const KIB = 1024;
const nothing = () => undefined;

test('a block has at most an eighth more than was asked for', (t) => {
  const { pool } = open(2 ** 50);
  for (const size of [0, 1, 255, 256]) t.equal(pool.take(size).bytes, 256, `${size} bytes`);
  for (let size = 257; size < 2 ** 34; size = Math.ceil(size * 1.013)) {
    const { bytes } = pool.take(size);
    const fits = bytes >= size && bytes % 256 === 0 && (bytes - size < 256 || bytes <= 1.125 * size);
    if (!fits) t.fail(`${size} bytes in a block of ${bytes}`);
  }
  for (const power of [9, 12, 20, 33]) t.equal(pool.take(2 ** power).bytes, 2 ** power, 'none is lost');
  t.end();
});

test('what is given is taken again, the lowest address first', (t) => {
  const { pool, held } = open();
  const blocks = Array.from({ length: 5 }, () => pool.take(KIB));
  const other = pool.take(2 * KIB);
  t.same([pool.live, pool.peak, pool.storages, pool.held], [7 * KIB, 7 * KIB, 6, 7 * KIB]);
  for (const i of [3, 0, 4, 1, 2]) pool.give(blocks[i]);
  pool.give(other);
  t.same([pool.live, pool.peak, pool.storages, pool.held], [0, 7 * KIB, 0, 7 * KIB]);
  t.same(
    blocks.map(() => pool.take(KIB).address),
    blocks.map(({ address }) => address),
  );
  t.equal(held.size, 6, 'the driver was not asked again');
  for (const block of blocks) pool.give(block);
  pool.trim();
  t.same([held.size, pool.held], [0, 0], 'trim gives all back');
  t.end();
});

test('what is idle is given back before memory runs out, and then it is told what holds how much', (t) => {
  const { pool, held } = open(8 * 2 ** 20);
  const small = Array.from({ length: 4 }, () => pool.take(2 ** 20));
  const model = holding('unet', () => pool.take(3 * 2 ** 20));
  for (const block of small) pool.give(block);
  const big = pool.take(4 * 2 ** 20);
  t.same([...held], [model, big], 'the small ones made room');
  t.throws(() => pool.take(2 ** 20 + 1), {
    name: 'MemoryError',
    message:
      /^out of memory on gpu 1: 1\.1 MiB wanted while these hold it: tensors at work 4\.0 MiB, unet 3\.0 MiB; 1\.0 MiB of the device's 8\.0 MiB are free; use/,
  });
  t.throws(() => holding('x', () => pool.take(2 ** 30)), /1\.00 GiB wanted/);
  pool.give(model);
  t.throws(() => pool.take(2 ** 30), /hold it: tensors at work 4\.0 MiB; /, 'what was given is not told');
  t.end();
});

test('how many blocks of a size something takes at once', (t) => {
  const { pool } = open();
  const before = pool.take(KIB);
  const { result, demand } = pool.metered(() => {
    const first = pool.take(KIB);
    pool.give(first);
    pool.give(before);
    const [a, b] = [pool.take(KIB), pool.take(KIB)];
    pool.give(pool.take(2 * KIB));
    for (const block of [a, b]) pool.give(block);
    pool.take(KIB);
    return 7;
  });
  t.equal(result, 7);
  t.same(
    [...demand],
    [
      [KIB, 2],
      [2 * KIB, 1],
    ],
  );
  pool.take(4 * KIB);
  t.equal(demand.size, 2, 'and nothing after it');
  t.end();
});

test('a reserve is for its recordings alone, and may be shared by them', (t) => {
  const { pool, held } = open();
  const idle = pool.take(KIB);
  pool.give(idle);
  const reserve = pool.openReserve();
  const demand = new Map([[KIB, 2]]);
  const taken = (count: number) => Array.from({ length: count }, () => pool.take(KIB));
  const first = reserve.record(demand, nothing, () => {
    const blocks = taken(2);
    t.throws(() => pool.take(KIB), /takes 1024 bytes that its run before did not take/);
    return blocks;
  });
  t.ok(first.includes(idle), 'what was idle is used');
  t.ok(first.every(pool.isReserved));
  for (const block of first) pool.give(block);
  t.notOk(pool.isReserved(pool.take(KIB)), 'nobody else gets them');
  const second = reserve.record(demand, nothing, () => taken(2));
  t.same(new Set(second), new Set(first), 'another recording has the same');
  for (const block of second) pool.give(block);
  const spare = pool.take(8 * KIB);
  pool.give(spare);
  reserve.record(demand, nothing, () => t.same([...pool.makeRoom()], [], 'none has to be waited for'));
  t.ok(held.has(spare), 'so that what is idle stays while a recording is made');
  const size = held.size;
  const [lent, others] = reserve.borrow(() => [pool.take(KIB), pool.take(4 * KIB)]);
  t.ok(pool.isReserved(lent), 'lent by its leave');
  t.notOk(pool.isReserved(others), 'what it lacks comes from elsewhere');
  t.notOk(pool.isReserved(pool.take(KIB)), 'and no longer than that');
  pool.give(lent);
  t.equal(held.size, size + 2);
  reserve.release();
  t.notOk(first.some(pool.isReserved));
  t.ok(first.includes(pool.take(KIB)), 'then it is like any other');
  t.end();
});

test('where memory runs out a reserve that nobody reads loses its blocks', (t) => {
  const { pool, held } = open(4 * KIB);
  const dropped: string[] = [];
  const reserve = pool.openReserve();
  const record = (name: string, count: number) =>
    reserve.record(new Map([[KIB, count]]), () => void dropped.push(name), nothing);
  record('a', 2);
  record('b', 2);
  t.throws(() => reserve.use(() => pool.take(4 * KIB)), /out of memory/);
  t.throws(() => reserve.use(() => reserve.use(nothing) ?? pool.take(4 * KIB)), /out of memory/);
  t.same(dropped, [], 'not while it is read');
  const block = pool.take(4 * KIB);
  t.same(dropped, ['a', 'b']);
  t.same([...held], [block]);
  t.throws(() => record('c', 1), /out of memory/);
  t.throws(() => pool.take(KIB), /out of memory/, 'and there is nothing more to lose');
  t.same(dropped, ['a', 'b'], 'nor is it dropped twice');
  pool.give(block);
  t.throws(() => record('d', 5), /out of memory/);
  const blocks = Array.from({ length: 4 }, () => pool.take(KIB));
  t.notOk(blocks.some(pool.isReserved), 'what a recording did not get whole is free again');
  t.end();
});

test('what is read of a device that holds no numbers is zeros', (t) => {
  for (const { memory, driver } of [standInDevice(), standInCuda()]) {
    const block = memory.take(8);
    const read = new Uint8Array(8).fill(255);
    driver.download(block, 0, read);
    t.same(read, new Uint8Array(8));
    memory.give(block);
  }
  t.end();
});
