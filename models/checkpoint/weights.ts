// Weights by name, and how they come into a module's parameters. They are streamed tensor by tensor into the device, so loading never holds
// more than one tensor beside the model itself.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, type Parameter } from '../../engine/module.ts';
import { update } from '../../engine/op.ts';
import { permute } from '../../engine/ops/move.ts';
import { isWhollyFinite, sumSquares } from '../../engine/ops/optimizer.ts';
import { cast } from '../../engine/ops/unary.ts';
import { keep, scope, unscoped } from '../../engine/scope.ts';
import { empty, type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import { type DType, decodeFloats, type FloatDType, isFloat, typedView } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import type { FilePlace, Room, TensorFile, TensorInfo } from '../../io/tensor_file.ts';

/** What is told of a weight without reading it. */
export type WeightInfo = Pick<TensorInfo, 'dtype' | 'shape' | 'storedAs' | 'bytes' | 'mend'>;

/** Weights by name, wherever they lie: `read` returns raw bytes in the checkpoint's own layout. */
export interface WeightSource {
  /** What error messages call it. */
  readonly where: string;
  readonly names: readonly string[];
  /** Changes with the files that all of it comes from; absent where it comes of more than them. */
  readonly stamp?: string;
  info(name: string): WeightInfo | undefined;
  floats(name: string): Float32Array;
  /** Where what `bytes` gives lies as it is; undefined where it is made of what lies there. */
  inFile?(name: string): FilePlace | undefined;
  /** In fresh memory, or in `room` where that saves a copy. */
  bytes(name: string, room?: Room): Uint8Array;
  close(): void;
}

/** Several files seen as one set of names. */
export function sourceOf(where: string, files: readonly TensorFile[]): WeightSource {
  const holder = new Map<string, TensorFile>();
  for (const file of files)
    for (const name of file.tensors.keys()) {
      const other = holder.get(name);
      if (other) {
        for (const each of files) each.close();
        throw new UserError(`${other.path} and ${file.path} both have tensor ${name}; download them again`);
      }
      holder.set(name, file);
    }
  const fileOf = (name: string): TensorFile => {
    const file = holder.get(name);
    if (!file) throw new UserError(`${where} has no tensor ${name}`);
    return file;
  };
  return {
    where,
    names: [...holder.keys()],
    stamp: files.map(({ stamp }) => stamp).join('\n'),
    info: (name) => holder.get(name)?.tensors.get(name),
    floats(name) {
      const file = fileOf(name);
      return decodeFloats(file.read(name), file.tensors.get(name)?.dtype ?? 'float32');
    },
    inFile: (name) => fileOf(name).inFile?.(name),
    bytes: (name, room) => fileOf(name).read(name, room),
    close() {
      for (const file of files) file.close();
    },
  };
}

/** Names that published files carry and no parameter wants. */
const ignorable = /(^|\.)(position_ids|logit_scale)$/;

/** transformers 5 saves text_encoder's keys without the `text_model.` that published files have: accept both. */
const spellings = (name: string): string[] =>
  name.startsWith('text_model.') ? [name, name.slice('text_model.'.length)] : [name];

/** How the weights of `source` meet the parameters of `module`: the stored name of each, and what does not fit. */
export function matchParameters(module: AnyModule, source: WeightSource) {
  const parameters = namedParameters(module);
  const stored = new Map<string, string>();
  for (const name of parameters.keys()) {
    const found = spellings(name).find((spelling) => source.info(spelling));
    if (found) stored.set(name, found);
  }
  const used = new Set(stored.values());
  const missing = [...parameters.keys()].filter((name) => !stored.has(name));
  const extra = source.names.filter((name) => !used.has(name) && !ignorable.test(name));
  const misshapen = [...stored].flatMap(([name, spelling]) => {
    const [want, got] = [parameters.get(name)?.shape, source.info(spelling)?.shape];
    return want?.join() === got?.join() ? [] : [`${name} is [${got}] and should be [${want}]`];
  });
  const problems = [
    listed('missing', missing),
    listed('unexpected', extra),
    listed('misshapen', misshapen),
  ].filter(Boolean);
  return { parameters, stored, problems };
}

/** What `matchParameters` found, in one sentence. */
export const misfit = ({ where }: WeightSource, problems: readonly string[]): UserError =>
  new UserError(
    `${where} does not fit its config: ${problems.join('; ')}; take config and weights from one model, or download it again`,
  );

/**
 * Fills every parameter of `module`, or those of `some` that are its own; what is missing, left over or misshapen is one error that
 * names all of it.
 */
export function loadParameters(
  module: AnyModule,
  source: WeightSource,
  device: Device,
  dtype: FloatDType,
  some?: ReadonlySet<Parameter>,
): void {
  const { parameters, stored: all, problems } = matchParameters(module, source);
  if (problems.length) throw misfit(source, problems);
  const stored = [...all].filter(([name]) => some?.has(parameters.get(name) as Parameter) ?? true);
  if (stored.length === 0) return;
  // A stand-in device holds no numbers: none need to be read.
  if (device.name === 'stand-in') {
    for (const [name] of stored) {
      const p = parameters.get(name) as Parameter;
      p.tensor = unscoped(() => empty(p.memoryShape, { device, dtype }));
    }
    return;
  }
  noGrad(() =>
    scope(() => {
      const sums = zeros([stored.length], { device });
      const room = reusedRoom();
      stored.forEach(([name, spelling], i) => {
        fillParameter(parameters.get(name) as Parameter, spelling, source, dtype, room, sums, i);
        trimMemory(device);
      });
      const found = sums.floats();
      stored.forEach(([name, spelling], i) => {
        if (!Number.isFinite(found[i]) && !isWhollyFinite((parameters.get(name) as Parameter).tensor))
          throw notFinite(source, spelling, dtype);
      });
    }),
  );
  device.memory.trim();
}

/** What conversions may leave to be used again, in bytes. */
const MOST_CACHED = 2 ** 29;

/** Gives back what conversions left, where that is much. */
export function trimMemory({ memory }: Device): void {
  if (memory.held - memory.live > MOST_CACHED) memory.trim();
}

/** loadParameters from a source that is used for nothing else. */
export function loadAndClose(
  module: AnyModule,
  weights: WeightSource,
  device: Device,
  dtype: FloatDType,
  some?: ReadonlySet<Parameter>,
): void {
  try {
    loadParameters(module, weights, device, dtype, some);
  } finally {
    weights.close();
  }
}

function listed(what: string, names: readonly string[]): string {
  if (names.length === 0) return '';
  const most = 20;
  const more = names.length > most ? ` and ${names.length - most} more` : '';
  return `${what} ${names.slice(0, most).join(', ')}${more}`;
}

/** One piece of memory, for one weight after another: fresh memory for each costs more than reading the file into it. */
export function reusedRoom(): Room {
  let memory = new Uint8Array(0);
  return (bytes) => {
    if (memory.byteLength < bytes) memory = new Uint8Array(bytes);
    return memory.subarray(0, bytes);
  };
}

/**
 * Uploads a weight as it is stored, and has the device turn it into its type and layout: on the host that takes ten times as
 * long as reading the file. sums[index] becomes the sum of its squares, which is finite only where all of it is.
 */
function fillParameter(
  target: Parameter,
  name: string,
  source: WeightSource,
  dtype: FloatDType,
  room: Room,
  sums: Tensor,
  index: number,
): void {
  const { device } = sums;
  scope(() => {
    const cut = cast(storedTensor(source, name, device, room), dtype);
    const [, , ...taps] = target.shape;
    const turned = target.layout === 'conv' && taps.some((n) => n > 1);
    const laid = turned ? permute(cut, [0, 2, 3, 1]) : cut;
    target.tensor = keep(laid.reshape(...target.memoryShape));
    update([sumSquares(laid, sums, index)]);
  });
}

/** A weight as it is stored, or in float32 what is stored as no float. */
export function storedTensor(source: WeightSource, name: string, device: Device, room?: Room): Tensor {
  const { dtype = 'float32', shape = [] } = source.info(name) ?? {};
  return isFloat(dtype)
    ? filled(empty(shape, { device, dtype }), source, name, room)
    : tensor(source.floats(name), shape, { device });
}

/** A tensor with a weight's bytes, from the file itself where they lie there. */
export function filled(
  target: Tensor,
  source: Pick<WeightSource, 'bytes' | 'inFile'>,
  name: string,
  room?: Room,
): Tensor {
  const place = source.inFile?.(name);
  // Where the file could not be read, reading it here tells why.
  if (place && target.uploadFile(place.fd, place.offset)) return target;
  return target.upload(source.bytes(name, room));
}

/** Why a weight is not finite, told by what is stored. */
export function notFinite(source: WeightSource, name: string, dtype: FloatDType): UserError {
  return new UserError(
    allFinite(source.bytes(name), source.info(name)?.dtype)
      ? `${source.where}: tensor ${name} holds numbers too large for ${dtype}; use --dtype bfloat16 or float32`
      : `${source.where}: tensor ${name} holds NaN or infinity; the file is damaged, download it again`,
  );
}

/** NaN and infinities are told by the exponent bits alone: all ones. */
export function allFinite(raw: Uint8Array, dtype: DType | undefined): boolean {
  if (!dtype || !isFloat(dtype)) return true;
  const mask = { float32: 0x7f800000, bfloat16: 0x7f80, float16: 0x7c00 }[dtype];
  const bits = typedView(raw, dtype === 'float32' ? 'int32' : 'float16') as Int32Array | Uint16Array;
  for (let i = 0; i < bits.length; i++) if ((bits[i] & mask) === mask) return false;
  return true;
}

/** [o, i, kh, kw] → [o, kh, kw, i], on raw elements of `size` bytes. */
export function toMemoryLayout(
  bytes: Uint8Array,
  [o, i, kh, kw]: readonly number[],
  size: number,
): Uint8Array {
  const taps = kh * kw;
  if (taps === 1) return bytes;
  const View = size === 4 ? Uint32Array : Uint16Array;
  const from = new View(bytes.buffer as ArrayBuffer, bytes.byteOffset, bytes.byteLength / size);
  const to = new View(from.length);
  for (let out = 0; out < o; out++)
    for (let c = 0; c < i; c++)
      for (let tap = 0; tap < taps; tap++) to[(out * taps + tap) * i + c] = from[(out * i + c) * taps + tap];
  return new Uint8Array(to.buffer as ArrayBuffer);
}

/** [o, kh, kw, i] → [o, i, kh, kw], on raw elements of `size` bytes: what a checkpoint of [o, i, kh, kw] stores. */
export function toStoredLayout(
  bytes: Uint8Array,
  [o, i, kh, kw]: readonly number[],
  size: number,
): Uint8Array {
  // The same turn with the roles of taps and channels exchanged.
  return toMemoryLayout(bytes, [o, kh * kw, i, 1], size);
}
