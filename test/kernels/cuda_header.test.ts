// The binding against the header that it was written from, where CUDA's toolkit is installed: nvcc compiles a program of nothing
// but assertions on cuda.h. Each call's parameters by kind and width, each number that the engine passes, and the places
// of the structs that libcuda.ts lays out by hand.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import {
  DeviceAttribute,
  FunctionAttribute,
  MemAccess,
  RELEASE_THRESHOLD,
  TensorMapDataType,
  TensorMapSwizzle,
} from '../../engine/cuda/api.ts';
import { cudaResults } from '../../engine/cuda/errors.ts';
import { packageRoot } from '../support/golden.ts';

const skip = spawnSync('nvcc', ['--version']).status !== 0 && 'no CUDA toolkit';

/** The letters of native.ts: pointers o and b, handles and addresses h, sizes z, ints and enums i. */
const prelude = `#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <cstddef>
#include <type_traits>
template <class T> constexpr bool is(char c) {
  constexpr bool pointer = std::is_pointer_v<T>, number = std::is_integral_v<T> || std::is_enum_v<T>;
  return c == 'o' || c == 'b' ? pointer
       : c == 'h' ? sizeof(T) == 8 && (pointer || number)
       : c == 'z' ? sizeof(T) == 8 && number
       : c == 'i' && sizeof(T) <= 4 && number;
}
template <class... A> constexpr bool takes(CUresult (*)(A...), const char *letters) {
  return ((is<A>(*letters) && *letters++) && ... && true) && !*letters;
}
`;

/** Every call of a file as [symbol, letters]; `made` and `encode` add what they share. */
function callsOf(source: string): [string, string][] {
  const found = source.matchAll(/\b(call|made|functionOf|encode)\(\s*'(cu\w+)',\s*'(\w*)'/g);
  return [...found].map(([, by, symbol, letters]) => {
    if (by === 'made') return [symbol, `o${letters}`];
    return [symbol, by === 'encode' ? `oiihbb${letters}biiii` : letters];
  });
}

const named = (prefix: string, numbers: Record<string, number>): [string, number][] =>
  Object.entries(numbers).map(([name, value]) => [prefix + name, value]);

const numbers: readonly [string, number][] = [
  ...named('CU_DEVICE_ATTRIBUTE_', DeviceAttribute),
  ...named('CU_FUNC_ATTRIBUTE_', FunctionAttribute),
  ...named('CU_TENSOR_MAP_DATA_TYPE_', TensorMapDataType),
  ...Object.entries(TensorMapSwizzle).map(([name, value]): [string, number] => [
    `CU_TENSOR_MAP_SWIZZLE_${name.replace(/^B(\d+)$/, '$1B')}`,
    value,
  ]),
  ...named('', cudaResults),
  ['CU_MEMPOOL_ATTR_RELEASE_THRESHOLD', RELEASE_THRESHOLD],
  ['CU_TENSOR_MAP_INTERLEAVE_NONE', 0],
  ['CU_TENSOR_MAP_L2_PROMOTION_L2_128B', 2],
  ['CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE', 0],
  ['CU_STREAM_NON_BLOCKING', 1],
  ['CU_EVENT_DISABLE_TIMING', 2],
  ['CU_MEM_LOCATION_TYPE_DEVICE', MemAccess.LOCATION_TYPE_DEVICE],
  ['CU_MEM_ACCESS_FLAGS_PROT_READWRITE', MemAccess.FLAGS_PROT_READWRITE],
  ['offsetof(CUmemAccessDesc, location.type)', 0],
  ['offsetof(CUmemAccessDesc, location.id)', 4],
  ['offsetof(CUmemAccessDesc, flags)', 8],
  ['sizeof(CUmemAccessDesc)', 12],
  ['CU_STREAM_CAPTURE_MODE_THREAD_LOCAL', 1],
  ['CU_JIT_ERROR_LOG_BUFFER', 5],
  ['CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES', 6],
  ['CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION', 4],
  ['CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION', 6],
  ['sizeof(CUtensorMap)', 128],
  ['alignof(CUtensorMap) % 64', 0],
  ['128 % alignof(CUtensorMap)', 0],
  ['offsetof(CUlaunchConfig, gridDimX)', 0],
  ['offsetof(CUlaunchConfig, blockDimX)', 12],
  ['offsetof(CUlaunchConfig, sharedMemBytes)', 24],
  ['offsetof(CUlaunchConfig, hStream)', 32],
  ['offsetof(CUlaunchConfig, attrs)', 40],
  ['offsetof(CUlaunchConfig, numAttrs)', 48],
  ['sizeof(CUlaunchConfig)', 56],
  ['offsetof(CUlaunchAttribute, id)', 0],
  ['offsetof(CUlaunchAttribute, value.clusterDim.x)', 8],
  ['offsetof(CUlaunchAttribute, value.clusterDim.z)', 16],
  ['offsetof(CUlaunchAttribute, value.programmaticStreamSerializationAllowed)', 8],
  ['sizeof(CUlaunchAttributeValue::programmaticStreamSerializationAllowed)', 4],
  ['sizeof(CUlaunchAttribute)', 72],
];

test('calls, numbers and structs are those of cuda.h', { skip }, (t) => {
  const files = ['libcuda.ts', 'native.ts'].map((name) => join(packageRoot, 'engine', 'cuda', name));
  const calls = files.flatMap((file) => callsOf(readFileSync(file, 'utf8')));
  t.ok(calls.length > 45, `${calls.length} calls`);
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-header-'));
  const compiled = (lines: readonly string[]) => {
    const path = join(folder, 'header.cpp');
    writeFileSync(path, prelude + lines.join('\n'));
    const args = ['-std=c++17', '-c', path, '-o', join(folder, 'header.o')];
    const { stderr } = spawnSync('nvcc', args, { encoding: 'utf8' });
    return [...stderr.matchAll(/static assertion failed: (.*)|error: (.*)/g)].map(
      ([, said, other]) => said ?? other,
    );
  };
  const call = ([symbol, letters]: readonly [string, string]) =>
    `static_assert(takes((decltype(&${symbol}))nullptr, "${letters}"), "${symbol}");`;
  const number = ([name, value]: readonly [string, number]) =>
    `static_assert((${name}) == ${value}, "${name}");`;
  t.same(compiled([...calls.map(call), ...numbers.map(number)]), []);
  const wrong = [
    call(['cuMemAllocAsync', 'oih']),
    call(['cuInit', 'ii']),
    number(['CU_STREAM_NON_BLOCKING', 2]),
  ];
  t.match(compiled(wrong), [/cuMemAllocAsync/, /cuInit/, /CU_STREAM_NON_BLOCKING/]);
  rmSync(folder, { recursive: true });
  t.end();
});
