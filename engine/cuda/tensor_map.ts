// What the driver refuses of a tensor map (CUDA driver API, cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col, without
// interleaving), for GPUs that are none: the stand-in, which sees SDXL's own sizes, and the tests' virtual GPU.
import { type Im2colMap, TensorMapDataType, type TiledMap } from './api.ts';
import { CudaError } from './errors.ts';

export const elementBytesOf: Readonly<Record<number, number>> = {
  [TensorMapDataType.UINT8]: 1,
  [TensorMapDataType.UINT16]: 2,
  [TensorMapDataType.INT32]: 4,
  [TensorMapDataType.FLOAT16]: 2,
  [TensorMapDataType.FLOAT32]: 4,
  [TensorMapDataType.BFLOAT16]: 2,
};
/** Bytes, by TensorMapSwizzle. */
const swizzleSpan = [Number.POSITIVE_INFINITY, 32, 64, 128];

type Refuse = (detail: string) => never;
const refusal =
  (call: string): Refuse =>
  (detail) => {
    throw new CudaError('CUDA_ERROR_INVALID_VALUE', call, detail);
  };

export function checkTiled(map: TiledMap): void {
  const refuse = refusal('cuTensorMapEncodeTiled');
  const { boxDim, globalDim } = map;
  if (boxDim.length !== globalDim.length) refuse('boxDim has another rank than globalDim');
  if (boxDim.some((n) => n < 1 || n > 256)) refuse(`boxDim [${boxDim}] is not within 1 to 256`);
  checkCommon(map, boxDim[0], refuse);
}

export function checkIm2col(map: Im2colMap): void {
  const refuse = refusal('cuTensorMapEncodeIm2col');
  const { globalDim, channelsPerPixel: channels, pixelsPerColumn: pixels } = map;
  const rank = globalDim.length;
  if (rank < 3) refuse(`rank ${rank} is below 3`);
  if (channels > 256 || pixels > 1024) refuse(`${channels} channels by ${pixels} pixels exceed 256 by 1024`);
  checkCommon(map, channels, refuse);
  const [lower, upper] = [map.pixelBoxLowerCorner, map.pixelBoxUpperCorner];
  if (lower.length !== rank - 2 || upper.length !== rank - 2)
    refuse('corners need one number per spatial dimension');
  const limit = 2 ** (Math.floor(16 / (rank - 2)) - 1);
  if ([...lower, ...upper].some((n) => n < -limit || n >= limit))
    refuse(`corners [${lower}] and [${upper}] are not within ${-limit} to ${limit - 1}`);
  if (lower.some((n, d) => n >= globalDim[d + 1] + upper[d])) refuse('the box of pixels is empty');
}

/** `inner` elements are a row of the box. */
function checkCommon(map: TiledMap | Im2colMap, inner: number, refuse: Refuse): void {
  const { globalAddress, globalDim, globalStrides, elementStrides, swizzle } = map;
  const bytes = inner * (elementBytesOf[map.dataType] ?? refuse(`data type ${map.dataType}`));
  if (globalAddress & 15n) refuse('globalAddress is not a multiple of 16');
  if (globalDim.length > 5 || globalDim.some((n) => n < 1 || n > 2 ** 32)) refuse(`globalDim [${globalDim}]`);
  if (globalStrides.length !== globalDim.length - 1)
    refuse('globalStrides needs one number less than globalDim');
  if (globalStrides.some((n) => n % 16 || n >= 2 ** 40))
    refuse(`globalStrides [${globalStrides}] are not multiples of 16 below 2^40`);
  if (elementStrides.some((n) => n < 1 || n > 8)) refuse(`elementStrides [${elementStrides}]`);
  if (swizzleSpan[swizzle] === undefined) refuse(`swizzle ${swizzle}`);
  if (bytes > swizzleSpan[swizzle]) refuse(`a row of ${bytes} bytes of the box exceeds the swizzle span`);
  if (bytes % 16) refuse(`a row of ${bytes} bytes of the box is no multiple of 16`);
}
