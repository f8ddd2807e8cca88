// A stand-in for libcuda.so.1 with host memory, for the test of the koffi binding: it checks what each call was given, and
// its only kernel doubles. It knows nothing of PTX; the virtual GPU does that.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Handle;
static const Handle CONTEXT = 0x7fff12345678ull, STREAM = 0xabcdef, MODULE = 77, KERNEL = 99, POOL = 0x5000,
                    EVENT = 0x6000, GRAPH = 0x7000, EXEC = 0x8000;

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
// A CUdevice is not its number here.
static const int DEVICE = 7;
static int check(int device) { return device == DEVICE ? 0 : 101; }
int cuDeviceGet(int *device, int ordinal) { return *device = DEVICE, ordinal ? 101 : 0; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, (size_t)length, "stub %d", device - DEVICE), check(device); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = 85899345920ull, check(device); }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;
  return check(device);
}
int cuDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 1, check(device) ? check(device) : check(peer); }
int cuDevicePrimaryCtxRetain(Handle *context, int device) { return *context = CONTEXT, check(device); }
int cuDevicePrimaryCtxRelease_v2(int device) { return check(device); }
int cuCtxSetCurrent(Handle context) { return context == CONTEXT ? 0 : 201; }
int cuStreamCreate(Handle *stream, unsigned flags) { return *stream = STREAM, flags == 1 ? 0 : 1; }
int cuStreamSynchronize(Handle stream) { return stream == STREAM ? 0 : 400; }
int cuMemGetInfo_v2(size_t *unused, size_t *total) { return *unused = 5, *total = 1ull << 36, 0; }
int cuDeviceGetDefaultMemPool(Handle *pool, int device) { return *pool = POOL, check(device); }
int cuMemPoolSetAttribute(Handle pool, int attribute, const uint64_t *value) {
  return pool == POOL && attribute == 4 && *value == UINT64_MAX ? 0 : 1;
}
// A CUmemAccessDesc: a device (1), which one, and leave to read and write (3).
int cuMemPoolSetAccess(Handle pool, const int *leave, size_t count) {
  return pool == POOL && count == 1 && leave[0] == 1 && leave[1] == DEVICE && leave[2] == 3 ? 0 : 1;
}
int cuMemPoolTrimTo(Handle pool, size_t keep) { return pool == POOL && keep == 0 ? 0 : 1; }
int cuEventCreate(Handle *event, unsigned flags) { return *event = EVENT, flags == 2 ? 0 : 1; }
int cuEventRecord(Handle event, Handle stream) { return event == EVENT && stream == STREAM ? 0 : 400; }
int cuEventSynchronize(Handle event) { return event == EVENT ? 0 : 400; }
int cuMemAllocHost_v2(void **memory, size_t bytes) { return *memory = malloc(bytes), 0; }
int cuMemFreeHost(void *memory) { return free(memory), 0; }
int cuMemAllocAsync(Handle *address, size_t bytes, Handle stream) {
  if (stream != STREAM) return 400;
  if (bytes > 1ull << 40) return 2;
  return *address = (Handle)malloc(bytes), 0;
}
int cuMemFreeAsync(Handle address, Handle stream) { return free((void *)address), stream == STREAM ? 0 : 400; }
int cuMemcpyHtoDAsync_v2(Handle to, const void *from, size_t bytes, Handle stream) {
  return memcpy((void *)to, from, bytes), stream == STREAM ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, Handle from, size_t bytes, Handle stream) {
  return memcpy(to, (void *)from, bytes), stream == STREAM ? 0 : 400;
}
int cuMemcpyDtoDAsync_v2(Handle to, Handle from, size_t bytes, Handle stream) {
  return memcpy((void *)to, (void *)from, bytes), stream == STREAM ? 0 : 400;
}
int cuMemcpyPeerAsync(Handle to, Handle own, Handle from, Handle other, size_t bytes, Handle stream) {
  if (own != CONTEXT || other != CONTEXT) return 201;
  return memcpy((void *)to, (void *)from, bytes), stream == STREAM ? 0 : 400;
}
int cuMemsetD8Async(Handle to, unsigned char value, size_t bytes, Handle stream) {
  return memset((void *)to, value, bytes), stream == STREAM ? 0 : 400;
}
int cuCtxSynchronize(void) { return 0; }
int cuStreamDestroy_v2(Handle stream) { return stream == STREAM ? 0 : 400; }
int cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) { return stream == STREAM && event == EVENT && !flags ? 0 : 400; }
int cuEventDestroy_v2(Handle event) { return event == EVENT ? 0 : 400; }
int cuEventElapsedTime(float *milliseconds, Handle start, Handle end) { return *milliseconds = 1.5f, start == EVENT && end == EVENT ? 0 : 400; }
// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL is 1.
int cuStreamBeginCapture_v2(Handle stream, int mode) { return stream == STREAM && mode == 1 ? 0 : 1; }
int cuStreamEndCapture(Handle stream, Handle *graph) { return *graph = GRAPH, stream == STREAM ? 0 : 400; }
int cuGraphInstantiateWithFlags(Handle *exec, Handle graph, unsigned long long flags) { return *exec = EXEC, graph == GRAPH && !flags ? 0 : 400; }
int cuGraphLaunch(Handle exec, Handle stream) { return exec == EXEC && stream == STREAM ? 0 : 400; }
int cuGraphExecDestroy(Handle exec) { return exec == EXEC ? 0 : 400; }
int cuGraphDestroy(Handle graph) { return graph == GRAPH ? 0 : 400; }
int cuModuleLoadData(Handle *module, const char *text) { return *module = MODULE, strstr(text, ".entry ") ? 0 : 218; }
// CU_JIT_ERROR_LOG_BUFFER is 5 and its size 6; the size stands where its pointer would.
int cuModuleLoadDataEx(Handle *module, const char *text, unsigned count, const int *options, void **values) {
  if (count != 2 || options[0] != 5 || options[1] != 6) return 1;
  return snprintf(values[0], (size_t)values[1], "ptxas: %.9s\nis no module\n", text), 218;
}
int cuGetErrorName(int code, const char **name) { return *name = code == 912 ? "CUDA_ERROR_INVALID_CLUSTER_SIZE" : 0, *name == 0; }
int cuModuleUnload(Handle module) { return module == MODULE ? 0 : 400; }
int cuFuncGetAttribute(int *value, int attribute, Handle kernel) { return *value = 100 + attribute, kernel == KERNEL ? 0 : 400; }
int cuFuncSetAttribute(Handle kernel, int attribute, int value) { return kernel == KERNEL && attribute == 8 && value == 232448 ? 0 : 912; }
int cuModuleGetFunction(Handle *kernel, Handle module, const char *name) {
  *kernel = KERNEL;
  return module == MODULE && strcmp(name, "silu_forward_float32") == 0 ? 0 : 500;
}

static float factor = 2;
// (y, x, n), each behind a pointer of its own.
int cuLaunchKernel(Handle kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned bytes,
                   Handle stream, void **parameters, void **extra) {
  if (kernel != KERNEL || stream != STREAM || extra || bytes) return 1;
  if (gx != 1 || gy != 1 || gz != 1 || bx != 256 || by != 1 || bz != 1) return 1;
  float *y = *(float **)parameters[0];
  const float *x = *(float **)parameters[1];
  const int n = *(int *)parameters[2];
  for (int i = 0; i < n; i++) y[i] = factor * x[i];
  return factor = 2, 0;
}

// As cuda.h lays them out.
typedef struct {
  unsigned id, padding, x, y, z, rest[13];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  Handle stream;
  Attribute *attributes;
  unsigned count;
} Config;

// CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION is 4, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION 6. The stand-in takes pairs in
// a grid of 2 and single blocks, and runs one; a launch with the second attribute triples where others double.
int cuLaunchKernelEx(const Config *config, Handle kernel, void **parameters, void **extra) {
  if (sizeof(Attribute) != 72 || sizeof(Config) != 56 || config->count < 1 || config->count > 2) return 1;
  unsigned pairs = 0, early = 0;
  for (unsigned i = 0; i < config->count; i++) {
    const Attribute *a = config->attributes + i;
    if (a->id == 4 && a->x == 2 && a->y == 1 && a->z == 1 && !pairs) pairs = 1;
    else if (a->id == 6 && a->x == 1 && !early) early = 1;
    else return 1;
  }
  if (config->grid[0] != 1 + pairs) return 1;
  factor = early ? 3 : 2;
  return cuLaunchKernel(kernel, 1, config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2],
                        config->shared, config->stream, parameters, extra);
}

// A tensor map that repeats what it was made of.
int cuTensorMapEncodeTiled(int64_t *map, int type, unsigned rank, Handle address, const uint64_t *dims, const uint64_t *strides,
                           const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  const int64_t said[16] = {type,   rank,     address,  dims[0],    dims[2], strides[0], strides[1], box[0],
                            box[2], steps[0], steps[2], interleave, swizzle, promotion,  fill,       -1};
  return memcpy(map, said, sizeof said), (uint64_t)map % 64 || rank != 3;
}
int cuTensorMapEncodeIm2col(int64_t *map, int type, unsigned rank, Handle address, const uint64_t *dims, const uint64_t *strides,
                            const int *lower, const int *upper, unsigned channels, unsigned pixels, const uint32_t *steps,
                            int interleave, int swizzle, int promotion, int fill) {
  const int64_t said[16] = {type,     rank,     address,  dims[3],  strides[2], lower[0],   lower[1], upper[0],
                            upper[1], channels, pixels,   steps[1], interleave, swizzle,    promotion, fill};
  return memcpy(map, said, sizeof said), (uint64_t)map % 64 || rank != 4;
}
