// Integer instructions: each runs on the virtual GPU over awkward operands, and BigInt arithmetic, written apart from the
// virtual GPU, says what PTX defines.
import { test } from 'tap';
import { type Bits, integerPairs, run, whole } from '../virtual-gpu/instruction.ts';

const hex = (values: Bits) => values.map((v) => v.toString(16)).join(' ');

type Oracle = (a: bigint, b: bigint, c: bigint) => bigint;

/** Integer oracles see values signed or unsigned as the type says; results are cut to the output's bits. */
const integerCases = (bits: 16 | 32 | 64): Record<string, Oracle> => {
  const [s, u, b] = [`s${bits}`, `u${bits}`, `b${bits}`];
  const n = BigInt(bits);
  const abs = (x: bigint) => (x < 0n ? -x : x);
  const wide: Record<string, Oracle> =
    bits === 64
      ? {}
      : {
          [`mul.wide.${s}`]: (x, y) => x * y,
          [`mul.wide.${u}`]: (x, y) => x * y,
          [`mad.wide.${s}`]: (x, y, z) => x * y + z,
          [`mad.wide.${u}`]: (x, y, z) => x * y + z,
        };
  return {
    [`add.${s}`]: (x, y) => x + y,
    [`sub.${s}`]: (x, y) => x - y,
    [`mul.lo.${s}`]: (x, y) => x * y,
    [`mul.hi.${s}`]: (x, y) => (x * y) >> n,
    [`mul.hi.${u}`]: (x, y) => (x * y) >> n,
    [`mad.lo.${s}`]: (x, y, z) => x * y + z,
    [`div.${s}`]: (x, y) => (y === 0n ? -1n : x / y),
    [`div.${u}`]: (x, y) => (y === 0n ? -1n : x / y),
    [`rem.${s}`]: (x, y) => (y === 0n ? -1n : x % y),
    [`rem.${u}`]: (x, y) => (y === 0n ? -1n : x % y),
    [`min.${s}`]: (x, y) => (x < y ? x : y),
    [`min.${u}`]: (x, y) => (x < y ? x : y),
    [`max.${s}`]: (x, y) => (x > y ? x : y),
    [`max.${u}`]: (x, y) => (x > y ? x : y),
    [`and.${b}`]: (x, y) => x & y,
    [`or.${b}`]: (x, y) => x | y,
    [`xor.${b}`]: (x, y) => x ^ y,
    [`neg.${s}`]: (x) => -x,
    [`abs.${s}`]: (x) => abs(x),
    [`not.${b}`]: (x) => ~x,
    ...wide,
  };
};

for (const bits of [16, 32, 64] as const) {
  test(`integer instructions of ${bits} bits`, (t) => {
    const [x, y] = integerPairs(bits);
    const z = y.map((v, i) => v ^ x[(i * 7) % x.length]);
    for (const [name, oracle] of Object.entries(integerCases(bits))) {
      const type = name.split('.').at(-1)!;
      const isWide = name.includes('wide');
      const out = isWide ? `u${bits * 2}` : type;
      const arity = oracle.length;
      const operands = ['%a', '%b', '%c'].slice(0, arity).join(', ');
      const types = [type, type, isWide ? out : type].slice(0, arity);
      const got = run(`${name} %d, ${operands};`, out, types, [x, y, z].slice(0, arity));
      const see = (v: bigint, as: string) =>
        as[0] === 's' ? BigInt.asIntN(bits, v) : BigInt.asUintN(isWide ? bits * 2 : bits, v);
      const cut = (v: bigint) => BigInt.asUintN(isWide ? bits * 2 : bits, v);
      const want = x.map((v, i) =>
        cut(oracle(see(v, type), see(y[i], type), isWide ? z[i] : see(z[i], type))),
      );
      // A quotient by zero is not defined, and JavaScript's remainder of the least number by -1 is.
      const same = got.every((v, i) => v === want[i] || (/div|rem/.test(name) && y[i] === 0n));
      t.ok(same, same ? name : `${name}: ${hex(got.slice(0, 8))} for ${hex(want.slice(0, 8))}`);
    }
    t.end();
  });

  test(`shifts and comparisons of ${bits} bits`, (t) => {
    const [x] = integerPairs(bits);
    const n = BigInt(bits);
    const counts = x.map((_, i) => BigInt(i % (bits + 5)));
    const signed = (v: bigint) => BigInt.asIntN(bits, v);
    const shifts: Record<string, Oracle> = {
      [`shl.b${bits}`]: (v, k) => (k >= n ? 0n : v << k),
      [`shr.u${bits}`]: (v, k) => (k >= n ? 0n : v >> k),
      [`shr.s${bits}`]: (v, k) => signed(v) >> (k >= n ? n - 1n : k),
    };
    for (const [name, oracle] of Object.entries(shifts)) {
      const want = x.map((v, i) => BigInt.asUintN(bits, oracle(v, counts[i], 0n)));
      t.same(
        run(`${name} %d, %a, %b;`, `u${bits}`, [`u${bits}`, 'u32'], [x, counts]),
        want,
        `${name} by a register`,
      );
      for (const k of [0, 1, 15, 16, 31, 32, 33, 63].filter((k) => k < bits)) {
        const fixed = x.map((v) => BigInt.asUintN(bits, oracle(v, BigInt(k), 0n)));
        t.same(run(`${name} %d, %a, ${k};`, `u${bits}`, [`u${bits}`], [x]), fixed, `${name} by ${k}`);
      }
    }
    const [a, b] = integerPairs(bits);
    const tests: Record<string, (p: bigint, q: bigint) => boolean> = {
      ...{ eq: (p, q) => p === q, ne: (p, q) => p !== q, lt: (p, q) => p < q },
      ...{ le: (p, q) => p <= q, gt: (p, q) => p > q, ge: (p, q) => p >= q },
    };
    for (const [how, holds] of Object.entries(tests)) {
      for (const sign of ['s', 'u']) {
        const body = `setp.${how}.${sign}${bits} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;`;
        const see = (v: bigint) => (sign === 's' ? signed(v) : v);
        const want = a.map((v, i) => (holds(see(v), see(b[i])) ? 1n : 0n));
        t.same(run(body, 'u32', [`u${bits}`, `u${bits}`], [a, b]), want, `setp.${how}.${sign}${bits}`);
      }
    }
    t.end();
  });
}

test('a true predicate may be written -1', (t) => {
  const body =
    'mov.pred %p1, -1; not.pred %p2, %p1; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; add.s32 %d, %r1, %r2;';
  t.same(run(body, 'u32', ['u32'], [whole([0n])]), Array(32).fill(1n));
  t.end();
});

test('bit fields', (t) => {
  const [x, y] = integerPairs(32);
  const at = x.map((_, i) => BigInt((i * 5) % 37));
  const ones = (k: bigint) => (1n << k) - 1n;
  const bitsOf = (v: bigint) => v.toString(2).padStart(32, '0');
  const check = (body: string, inputs: Bits[], oracle: Oracle) => {
    const want = x.map((_, i) =>
      BigInt.asUintN(32, oracle(inputs[0][i], inputs[1]?.[i] ?? 0n, inputs[2]?.[i] ?? 0n)),
    );
    t.same(run(body, 'u32', Array(inputs.length).fill('u32'), inputs), want, body);
  };
  for (const length of [0n, 1n, 7n, 32n]) {
    check(`bfe.u32 %d, %a, %b, ${length};`, [x, at], (v, p) => (p > 31n ? 0n : (v >> p) & ones(length)));
    check(`bfe.s32 %d, %a, %b, ${length};`, [x, at], (v, p) => {
      // Bits above the top are copies of it.
      const extended = BigInt.asIntN(32, v) >> (p > 31n ? 31n : p);
      return length === 0n ? 0n : BigInt.asIntN(Number(length), extended);
    });
    check(`bfi.b32 %d, %a, %b, %c, ${length};`, [x, y, at], (v, w, p) =>
      p > 31n ? w : (w & ~(ones(length) << p)) | ((v & ones(length)) << p),
    );
  }
  check('popc.b32 %d, %a;', [x], (v) => BigInt(bitsOf(v).replaceAll('0', '').length));
  check('clz.b32 %d, %a;', [x], (v) => BigInt(`${bitsOf(v)}1`.indexOf('1')));
  check('brev.b32 %d, %a;', [x], (v) => BigInt(`0b${[...bitsOf(v)].reverse().join('')}`));
  check('bfind.u32 %d, %a;', [x], (v) => BigInt(v.toString(2).length - 1) - (v === 0n ? 1n : 0n));
  check('prmt.b32 %d, %a, %b, %c;', [x, y, x.map((_, i) => BigInt((i * 40503) & 0xffff))], (v, w, sel) => {
    const bytes = v | (w << 32n);
    let out = 0n;
    for (let k = 0n; k < 4n; k++) {
      const pick = (sel >> (4n * k)) & 15n;
      const byte = (bytes >> (8n * (pick & 7n))) & 255n;
      out |= (pick & 8n ? (byte & 128n ? 255n : 0n) : byte) << (8n * k);
    }
    return out;
  });
  check('lop3.b32 %d, %a, %b, %c, 0xCA;', [x, y, at], (p, q, r) => (p & q) | (~p & r));
  check('lop3.b32 %d, %a, %b, %c, 0x96;', [x, y, at], (p, q, r) => p ^ q ^ r);
  check('shf.l.wrap.b32 %d, %a, %b, %c;', [x, y, at], (lo, hi, k) => ((hi << 32n) | lo) >> (32n - (k & 31n)));
  check(
    'shf.r.clamp.b32 %d, %a, %b, %c;',
    [x, y, at],
    (lo, hi, k) => ((hi << 32n) | lo) >> (k > 32n ? 32n : k),
  );
  t.end();
});
test('an instruction that the virtual GPU does not know is named', (t) => {
  t.throws(
    () => run('frobnicate.b32 %d, %a;', 'u32', ['u32'], [whole([1n])]),
    /does not know "frobnicate\.b32 %d, %a"/,
  );
  t.end();
});
