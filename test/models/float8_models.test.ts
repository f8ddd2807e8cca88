// Models in 8-bit floats, plain and scaled, as ComfyUI's checkpoints are: they load as a file does that holds the numbers they stand for.
import { test } from 'tap';
import { decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { openWeightsFile } from '../../models/checkpoint/weights_file.ts';
import { refuses } from '../support/io_helpers.ts';
import {
  fileOf,
  golden,
  plainFile,
  sameModel,
  sizeOf,
  unetPrefix,
  type Weight,
  type Weights,
  whole,
} from '../support/weights_helpers.ts';

/** A safetensors file of tensors in types that ours does not write. */
function rawFile(
  name: string,
  tensors: readonly { name: string; dtype: string; shape: readonly number[]; bytes: Uint8Array }[],
) {
  let end = 0;
  const header = Object.fromEntries(
    tensors.map(({ name: key, dtype, shape, bytes }) => {
      const begin = end;
      end += bytes.byteLength;
      return [key, { dtype, shape, data_offsets: [begin, end] }];
    }),
  );
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.byteLength));
  return fileOf(name, Buffer.concat([length, json, ...tensors.map(({ bytes }) => bytes)]));
}

/** 8-bit floats that are near to numbers; here it is enough that they are some. */
const someBytes = (count: number): Uint8Array =>
  Uint8Array.from({ length: count }, (_, i) => ((i * 37) % 120) | (i % 3 ? 0 : 0x80));

test("8-bit floats, plain and scaled, as ComfyUI's checkpoints have them", (t) => {
  for (const dtype of ['F8_E4M3', 'F8_E5M2']) {
    const scaleOf = (i: number) => Math.fround(0.003 * (i + 1));
    const weights = [...golden].map(([name, { shape, values }], i) => {
      const is8 = name.startsWith(unetPrefix) && name.endsWith('.weight') && shape.length > 1;
      const bytes = is8 ? someBytes(values.length) : encodeNumbers(values, 'float16');
      return { name, dtype: is8 ? dtype : 'F16', shape, bytes, scale: is8 && i % 2 ? scaleOf(i) : undefined };
    });
    const halves = (bytes: Uint8Array): Float32Array => {
      const file = openSafetensors(
        rawFile('bytes.safetensors', [{ name: 'x', dtype, shape: [bytes.length], bytes }]),
      );
      const values = decodeFloats(file.read('x'), 'float16');
      file.close();
      return values;
    };
    const numbers = (factor: (scale?: number) => number): Weights =>
      new Map(
        weights.map(({ name, dtype: type, shape, bytes, scale }): [string, Weight] => [
          name,
          {
            shape,
            values:
              type === 'F16'
                ? decodeFloats(bytes, 'float16')
                : halves(bytes).map((value) => value * factor(scale)),
          },
        ]),
      );
    const plain = whole(rawFile('plain8.safetensors', weights));
    sameModel(
      t,
      plain,
      whole(
        plainFile(
          'plain32.safetensors',
          numbers(() => 1),
        ),
      ),
    );
    const scales = (word: string) =>
      weights.flatMap(({ name, scale }) =>
        scale === undefined
          ? []
          : [
              {
                name: name.replace(/weight$/, word),
                dtype: 'F32',
                shape: [],
                bytes: encodeNumbers([scale], 'float32'),
              },
              {
                name: name.replace(/weight$/, 'scale_input'),
                dtype: 'F32',
                shape: [1],
                bytes: encodeNumbers([3], 'float32'),
              },
            ],
      );
    const want = whole(
      plainFile(
        'scaled32.safetensors',
        numbers((scale = 1) => scale),
      ),
    );
    const mark = { name: `${unetPrefix}scaled_fp8`, dtype, shape: [0], bytes: new Uint8Array() };
    for (const word of ['scale_weight', 'weight_scale']) {
      const scaled = whole(rawFile('scaled8.safetensors', [...weights, ...scales(word), mark]));
      sameModel(t, scaled, want, ['unet'], 'float32');
      sameModel(t, scaled, want, ['unet'], 'bfloat16');
    }
  }
  t.end();
});

test('what is scaled in other ways is refused', (t) => {
  const f32 = (name: string, shape: number[]) => ({
    name,
    dtype: 'F32',
    shape,
    bytes: new Uint8Array(4 * sizeOf(shape)),
  });
  const weight = { name: 'a.weight', dtype: 'F8_E4M3', shape: [2, 2], bytes: new Uint8Array(4) };
  const rows = rawFile('rows.safetensors', [weight, f32('a.weight_scale', [2, 1])]);
  refuses(t, /"a\.weight" of .* is F8_E4M3 scaled by "a\.weight_scale", F32 \[2,1\], and only/, () =>
    openWeightsFile(rows),
  );
  const lone = rawFile('lone.safetensors', [f32('a.scale_weight', [])]);
  refuses(t, /"a\.scale_weight" of .* scales no weight, as there is no "a\.weight"/, () =>
    openWeightsFile(lone),
  );
  const nvfp4 = rawFile('nvfp4.safetensors', [{ ...weight, dtype: 'U8' }, f32('a.weight_scale', [])]);
  refuses(t, /"a\.weight" of .* is U8 scaled by/, () => openWeightsFile(nvfp4));
  const file = openWeightsFile(
    rawFile('sound.safetensors', [
      { ...weight, bytes: Uint8Array.of(0x38, 0x40, 0xb8, 0) },
      { ...f32('a.scale_weight', [1]), bytes: encodeNumbers([0.25], 'float32') },
    ]),
  );
  t.same([...file.tensors.keys()], ['a.weight']);
  const [room, into] = [new Uint8Array(16), new Uint8Array(16)];
  file.read('a.weight', () => room);
  file.readInto('a.weight', into);
  for (const bytes of [file.read('a.weight'), room, into])
    t.same([...decodeFloats(bytes, 'float32')], [0.25, 0.5, -0.25, 0]);
  file.close();
  t.end();
});
