// A stand-in for libcuda.so.1 with host memory, for the test of the koffi binding: it checks what each call was given, and
// its only kernel doubles. It knows nothing of PTX; the virtual GPU does that.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Handle;
static const Handle CONTEXT = 0x7fff12345678ull, STREAM = 0xabcdef, MODULE = 77, KERNEL = 99, POOL = 0x5000,
                    EVENT = 0x6000;

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, (size_t)length, "stub %d", device), 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = 85899345920ull, device; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;
  return device;
}
int cuDevicePrimaryCtxRetain(Handle *context, int device) { return *context = CONTEXT, device; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device; }
int cuCtxSetCurrent(Handle context) { return context == CONTEXT ? 0 : 201; }
int cuStreamCreate(Handle *stream, unsigned flags) { return *stream = STREAM, flags == 1 ? 0 : 1; }
int cuStreamSynchronize(Handle stream) { return stream == STREAM ? 0 : 400; }
int cuMemGetInfo_v2(size_t *unused, size_t *total) { return *unused = 5, *total = 1ull << 36, 0; }
int cuDeviceGetDefaultMemPool(Handle *pool, int device) { return *pool = POOL, device; }
int cuMemPoolSetAttribute(Handle pool, int attribute, const uint64_t *value) {
  return pool == POOL && attribute == 4 && *value == UINT64_MAX ? 0 : 1;
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
int cuModuleLoadData(Handle *module, const char *text) { return *module = MODULE, strstr(text, ".entry silu_forward_") ? 0 : 218; }
int cuModuleGetFunction(Handle *kernel, Handle module, const char *name) {
  *kernel = KERNEL;
  return module == MODULE && strcmp(name, "silu_forward_float32") == 0 ? 0 : 500;
}

// (y, x, n), each behind a pointer of its own.
int cuLaunchKernel(Handle kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned bytes,
                   Handle stream, void **parameters, void **extra) {
  if (kernel != KERNEL || stream != STREAM || extra || bytes) return 1;
  if (gx != 1 || gy != 1 || gz != 1 || bx != 256 || by != 1 || bz != 1) return 1;
  float *y = *(float **)parameters[0];
  const float *x = *(float **)parameters[1];
  const int n = *(int *)parameters[2];
  for (int i = 0; i < n; i++) y[i] = 2 * x[i];
  return 0;
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

// CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION is 4. The stand-in takes pairs in a grid of 2, and runs one block.
int cuLaunchKernelEx(const Config *config, Handle kernel, void **parameters, void **extra) {
  if (sizeof(Attribute) != 72 || sizeof(Config) != 56 || config->count != 1 || config->grid[0] != 2) return 1;
  const Attribute *cluster = config->attributes;
  if (cluster->id != 4 || cluster->x != 2 || cluster->y != 1 || cluster->z != 1) return 1;
  return cuLaunchKernel(kernel, 1, config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2],
                        config->shared, config->stream, parameters, extra);
}
