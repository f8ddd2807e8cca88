// Arguments that do not fit a kernel are refused where they are packed or passed on: neither C nor a GPU would notice.
import { test } from 'tap';
import { packParameters, structLayout } from '../../engine/cuda/manifest.ts';
import { silu } from '../../engine/ops/unary.ts';
import { standInCuda } from '../../engine/profile.ts';
import { scope } from '../../engine/scope.ts';
import { checkArguments } from '../../engine/signature.ts';
import { empty } from '../../engine/tensor.ts';
import { noLibrary, openNative } from '../support/native_library.ts';

test('a call has to fit its signature', (t) => {
  const check = (args: readonly (bigint | number)[]) => () => checkArguments('scale_forward', 'ppif', args);
  t.doesNotThrow(check([1n, 0n, 3, 0.5]));
  for (const args of [
    [1n, 2n, 3],
    [1n, 2n, 3n, 0.5],
    [1n, 2, 3, 0.5],
    [1n, 2n, 3, 0.5, 0],
  ])
    t.throws(check(args), { message: /^scale_forward takes \(ppif\), got \([pn]+\): p pointer/ });
  t.end();
});

test('the CPU library is not called with other arguments than it has', { skip: noLibrary }, (t) => {
  const driver = openNative();
  t.throws(() => driver.launch('silu_forward_float32', [0n, 0n]), { message: /takes \(ppi\), got \(pp\)/ });
  t.throws(() => driver.launch('nothing_float32', []), { message: /has no kernel nothing_float32/ });
  t.end();
});

test('numbers that no int holds are refused when they are packed, not wrapped', (t) => {
  const layout = structLayout('pif');
  const packed = (int: number) =>
    new DataView(packParameters(layout, [7n, int, 0.5]).buffer).getInt32(8, true);
  for (const int of [0, -1, 2 ** 31 - 1, -(2 ** 31)]) t.equal(packed(int), int);
  for (const int of [2 ** 31, 2 ** 32 - 1, -(2 ** 31) - 1, 0.5, Number.NaN])
    t.throws(() => packed(int), { message: /argument 1 is .*, not a 32-bit integer/ });
  t.throws(() => packParameters(layout, [7n, 1]), { message: /takes \(pif\), got \(pn\)/ });
  t.throws(() => packParameters(layout, [7n, 1, new Uint8Array(4)]), { message: /got \(pnb\)/ });
  t.end();
});

test('a double lies on a multiple of eight bytes', (t) => {
  const packed = packParameters(structLayout('idfp'), [3, Math.PI, 0.5, 9n]);
  const view = new DataView(packed.buffer);
  t.same(
    [
      view.getInt32(0, true),
      view.getFloat64(8, true),
      view.getFloat32(16, true),
      view.getBigUint64(24, true),
    ],
    [3, Math.PI, 0.5, 9n],
  );
  t.end();
});

test('a type that has no kernels is named', (t) => {
  const device = standInCuda();
  t.throws(() => scope(() => silu(empty([4], { device, dtype: 'int32' }))), {
    message: 'the GPU has no elementwise kernels for int32',
  });
  t.end();
});
