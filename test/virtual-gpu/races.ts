// Happens-before race detection. Each warp has a clock and a vector of how far it has seen the others (raised by
// barriers); memory is divided into cells as small as the kernel's smallest access, and each cell remembers its last
// writer and readers as keys (agents.ts). An access races when the cell's other
// access was by another lane at a clock that this warp has not seen. Lanes of a warp are ordered only by bar.warp.sync.
// In global memory a cell also remembers the cluster; other clusters of the same grid are never ordered, save by flags.
import { agentOf, clockOf, identity, makeKey, mostWarps, strongBit } from './agents.ts';
import { checkReadOnly, checkWaited } from './grid_dependency.ts';
import { type Machine, sharedBytes } from './machine.ts';
import { fail, quote, threadName } from './report.ts';

type Access = (lane: number, ax: number, bytes: number, site: number) => void;

export interface RaceDetector {
  readonly sharedRead: Access;
  readonly sharedWrite: Access;
  readonly sharedReadStrong: Access;
  readonly sharedWriteStrong: Access;
  readonly globalRead: Access;
  /** ld.global.nc: of what nobody writes while the grid runs. */
  readonly globalReadOnly: Access;
  readonly globalWrite: Access;
  readonly globalReadStrong: Access;
  readonly globalWriteStrong: Access;
  globalPrefetch(lane: number, site: number): void;
  /** Forget the shared memory of the last block, of which `bytes` may have been touched. */
  startBlock(bytes: number): void;
  readonly globals: GlobalRaces;
  readonly sharedCells: SharedCells;
}

/** State of shared memory, open to the asynchronous copies. */
export interface SharedCells {
  readonly writer: Int32Array;
  readonly writeSite: Int32Array;
  /** Bits for the cluster's warps, `words` to a cell: who has read since the last write, and at readClock[32 words cell + w] when. */
  words: number;
  readers: Int32Array;
  readClock: Int32Array;
  readonly lastRead: Int32Array;
  readonly readSite: Int32Array;
}

/** The detector of a machine, or with `globals`, those of one, that of another shared memory. */
export function newRaceDetector(m: Machine, known?: GlobalRaces): RaceDetector {
  const cells: SharedCells = {
    ...{ writer: new Int32Array(sharedBytes), writeSite: new Int32Array(sharedBytes) },
    ...{ words: 1, readers: new Int32Array(0), readClock: new Int32Array(0) },
    ...{ lastRead: new Int32Array(sharedBytes), readSite: new Int32Array(sharedBytes) },
  };
  const { writer, writeSite, lastRead, readSite } = cells;
  const other = (key: number, site: number) => {
    const who = agentOf(key) < mostWarps ? threadName(m, key) : 'an asynchronous copy';
    return `${who} at ${quote(m.kernel.source.instructions[site])}`;
  };
  const reportShared = (
    kind: string,
    lane: number,
    cell: number,
    key: number,
    keySite: number,
    site: number,
  ): never => {
    const at = `shared+0x${(cell << m.kernel.sharedGrain).toString(16)}`;
    return fail(
      m,
      'race',
      `${kind} on ${at} with ${other(key, keySite)} and no ordering between them`,
      lane,
      site,
    );
  };

  const sharedRead = (lane: number, ax: number, bytes: number, site: number, strong: number) => {
    if (!m.detectRaces) return;
    const { warp, block } = m;
    const w = warp.agent;
    const seen = warp.seen;
    const me = (w << 5) | lane;
    const clock = block.clocks[w];
    const grain = m.kernel.sharedGrain;
    const end = (ax + bytes - 1) >> grain;
    const { words, readers, readClock } = cells;
    for (let c = ax >> grain; c <= end; c++) {
      const key = writer[c];
      if (key !== 0 && (key & identity) !== me && clockOf(key) > seen[agentOf(key)] && !(key & strong)) {
        const kind = agentOf(key) < mostWarps ? 'read-after-write' : 'read before the copy is waited for';
        reportShared(kind, lane, c, key, writeSite[c], site);
      }
      readers[c * words + (w >> 5)] |= 1 << (w & 31);
      readClock[c * words * 32 + w] = clock;
      lastRead[c] = (clock << 14) | me;
      readSite[c] = site;
    }
  };
  const sharedWrite = (lane: number, ax: number, bytes: number, site: number, strong: number) => {
    if (!m.detectRaces) return;
    const { warp, block } = m;
    const w = warp.agent;
    const seen = warp.seen;
    const me = (w << 5) | lane;
    const grain = m.kernel.sharedGrain;
    const end = (ax + bytes - 1) >> grain;
    const mine = (block.clocks[w] << 14) | strong | me;
    const { words, readers, readClock } = cells;
    for (let c = ax >> grain; c <= end; c++) {
      const key = writer[c];
      if (key !== 0 && (key & identity) !== me && clockOf(key) > seen[agentOf(key)] && !(key & strong)) {
        reportShared('write-after-write', lane, c, key, writeSite[c], site);
      }
      for (let k = 0; k < words; k++) {
        let mask = readers[c * words + k];
        if (mask === 0) continue;
        const last = lastRead[c];
        if (agentOf(last) === w && (last & identity) !== me && clockOf(last) > seen[w]) {
          reportShared('write-after-read', lane, c, last, readSite[c], site);
        }
        while (mask !== 0) {
          const bit = 31 - Math.clz32(mask);
          const reader = 32 * k + bit;
          mask &= ~(1 << bit);
          if (reader !== w && readClock[c * words * 32 + reader] > seen[reader]) {
            const key2 = agentOf(last) === reader ? last : makeKey(0, reader, 0);
            reportShared('write-after-read', lane, c, key2, readSite[c], site);
          }
        }
        readers[c * words + k] = 0;
      }
      writer[c] = mine;
      writeSite[c] = site;
    }
  };

  const globals = known ?? newGlobalRaces(m, other);
  return {
    sharedRead: (lane, ax, bytes, site) => sharedRead(lane, ax, bytes, site, 0),
    sharedWrite: (lane, ax, bytes, site) => sharedWrite(lane, ax, bytes, site, 0),
    sharedReadStrong: (lane, ax, bytes, site) => sharedRead(lane, ax, bytes, site, strongBit),
    sharedWriteStrong: (lane, ax, bytes, site) => sharedWrite(lane, ax, bytes, site, strongBit),
    globalRead: (lane, ax, bytes, site) => globals.read(lane, ax, bytes, site, 0),
    globalReadOnly: (lane, ax, bytes, site) => globals.readOnly(lane, ax, bytes, site),
    globalWrite: (lane, ax, bytes, site) => globals.write(lane, ax, bytes, site, 0),
    globalReadStrong: (lane, ax, bytes, site) => globals.read(lane, ax, bytes, site, strongBit),
    globalWriteStrong: (lane, ax, bytes, site) => globals.write(lane, ax, bytes, site, strongBit),
    globalPrefetch: (lane, site) => checkWaited(m, lane, site),
    startBlock(bytes) {
      const count = (bytes >> m.kernel.sharedGrain) + 1;
      writer.fill(0, 0, count);
      const { blocks } = m.block.cluster;
      cells.words = Math.ceil((blocks.length * blocks[0].warps.length) / 32);
      const places = Math.min(count, sharedBytes) * cells.words;
      if (cells.readers.length < places) cells.readers = new Int32Array(places);
      if (cells.readClock.length < 32 * places) cells.readClock = new Int32Array(32 * places);
      cells.readers.fill(0, 0, places);
    },
    globals,
    sharedCells: cells,
  };
}

type GlobalRaces = ReturnType<typeof newGlobalRaces>;

/** The same for global memory, where cells outlive clusters: a stamp tells which of which grid touched one last. */
function newGlobalRaces(m: Machine, other: (key: number, site: number) => string) {
  const count = m.global.u8.length;
  const make = () => new Int32Array(count);
  const [writeStamp, writeKey, writeSite] = [make(), make(), make()];
  // The last reader, the last reader of the same block but another warp, and the last block but this one that read.
  const [readStamp, readKey, readSite, readKey2, readOther] = [make(), make(), make(), make(), make()];
  /** Who last read a cell by ld.global.nc, made when first one does. */
  let constant: Int32Array | undefined;
  /** Stamps from `first` on are clusters of the running grid. */
  let first = 1;
  let stamp = 0;
  let next = 1;

  const report = (
    kind: string,
    lane: number,
    cell: number,
    blockStamp: number,
    key: number,
    keySite: number,
    site: number,
  ): never => {
    const offset = cell << m.kernel.globalGrain;
    const where = `global+0x${offset.toString(16)} (${m.arena.describe(offset)})`;
    const unit = m.block.cluster.blocks.length > 1 ? 'cluster' : 'block';
    const block = blockStamp === stamp ? '' : `${unit} number ${blockStamp - first} of the grid, `;
    return fail(
      m,
      'race',
      `${kind} on ${where} with ${block}${other(key, keySite)} and no ordering between them`,
      lane,
      site,
    );
  };
  /** Whether the running warp has synchronised with another block's access through a flag. */
  const acquired = (block: number, key: number) => {
    const clock = m.warp.acquired.get(block);
    return clock !== undefined && clock[agentOf(key)] >= clockOf(key);
  };

  const checkWriter = (kind: string, lane: number, c: number, me: number, strong: number, site: number) => {
    const by = writeStamp[c];
    if (by < first) return;
    const key = writeKey[c];
    if (key & strong) return;
    if (by === stamp) {
      if ((key & identity) !== me && clockOf(key) > m.warp.seen[agentOf(key)]) {
        report(kind, lane, c, by, key, writeSite[c], site);
      }
    } else if (!acquired(by, key)) report(kind, lane, c, by, key, writeSite[c], site);
  };

  return {
    /** The number by which the running cluster is known among all ever run. */
    stamp: () => stamp,
    startGrid(clusters: number) {
      first = next;
      next += clusters;
      stamp = first - 1;
    },
    startCluster() {
      stamp++;
    },
    read(lane: number, ax: number, bytes: number, site: number, strong: number) {
      checkWaited(m, lane, site);
      if (!m.detectRaces) return;
      const w = m.warp.agent;
      const me = (w << 5) | lane;
      const grain = m.kernel.globalGrain;
      const end = (ax + bytes - 1) >> grain;
      const mine = (m.block.clocks[w] << 14) | me;
      for (let c = ax >> grain; c <= end; c++) {
        if (writeStamp[c] >= first) checkWriter('read-after-write', lane, c, me, strong, site);
        if (strong) continue;
        if (readStamp[c] !== stamp) {
          readOther[c] = readStamp[c];
          readStamp[c] = stamp;
          readKey2[c] = 0;
        } else if (agentOf(readKey[c]) !== w) readKey2[c] = readKey[c];
        readKey[c] = mine;
        readSite[c] = site;
      }
    },
    readOnly(lane: number, ax: number, bytes: number, site: number) {
      checkReadOnly(m, lane, site);
      if (!m.detectRaces) return;
      constant ??= make();
      const grain = m.kernel.globalGrain;
      for (let c = ax >> grain, end = (ax + bytes - 1) >> grain; c <= end; c++) {
        if (writeStamp[c] >= first)
          report('ld.global.nc after a write', lane, c, writeStamp[c], writeKey[c], writeSite[c], site);
        constant[c] = stamp;
        readSite[c] = site;
      }
    },
    write(lane: number, ax: number, bytes: number, site: number, strong: number) {
      checkWaited(m, lane, site);
      if (!m.detectRaces) return;
      const { warp } = m;
      const w = warp.agent;
      const me = (w << 5) | lane;
      const grain = m.kernel.globalGrain;
      const end = (ax + bytes - 1) >> grain;
      const mine = (m.block.clocks[w] << 14) | strong | me;
      for (let c = ax >> grain; c <= end; c++) {
        if (writeStamp[c] >= first) checkWriter('write-after-write', lane, c, me, strong, site);
        if (constant && constant[c] >= first)
          report('write after ld.global.nc', lane, c, constant[c], makeKey(0, w, lane), readSite[c], site);
        const by = readStamp[c];
        if (by >= first) {
          const kind = 'write-after-read';
          if (by === stamp) {
            for (const key of [readKey[c], readKey2[c]]) {
              if (key !== 0 && (key & identity) !== me && clockOf(key) > warp.seen[agentOf(key)]) {
                report(kind, lane, c, by, key, readSite[c], site);
              }
            }
            const before = readOther[c];
            if (before >= first && !acquired(before, makeKey(0, 0, 0)))
              report(kind, lane, c, before, 0, readSite[c], site);
          } else if (!acquired(by, readKey[c])) report(kind, lane, c, by, readKey[c], readSite[c], site);
          readStamp[c] = 0;
          readOther[c] = 0;
        }
        writeStamp[c] = stamp;
        writeKey[c] = mine;
        writeSite[c] = site;
      }
    },
  };
}
