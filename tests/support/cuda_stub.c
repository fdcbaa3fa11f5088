// A CUDA driver that runs nothing: it hands out two devices, checks what a launch hands to it by
// the rules that cuda.h writes down, and keeps the parameters of the last launch.
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define MAX_FUNCTIONS 4096
#define MAX_PARAMETERS 128

// What a kernel takes, by its PTX; functions are their places here, counted from 1.
static struct {
  int count;
  int sizes[MAX_PARAMETERS];
} functions[MAX_FUNCTIONS];
static int num_functions;
static int num_devices = 2, capability[2] = {9, 0}, max_shared;

static struct {
  long launches, maps;
  unsigned grid[3], threads, shared;
  int size;
  char parameters[1 << 14];
} last;
static char fault[256] = "a fault of the stub";

static CUresult refuse(const char* rule) {
  snprintf(fault, sizeof fault, "%s", rule);
  return CUDA_ERROR_INVALID_VALUE;
}
#define RULE(condition) \
  if (!(condition)) return refuse("violates " #condition)

// --- What Python asks of the stub itself ---

void stub_set_device(int major, int minor, int shared) {
  capability[0] = major;
  capability[1] = minor;
  max_shared = shared;
}
void stub_expect(uintptr_t function, int count, const int* sizes) {
  functions[function - 1].count = count;
  memcpy(functions[function - 1].sizes, sizes, count * sizeof *sizes);
}
long stub_launches(void) { return last.launches; }
long stub_maps(void) { return last.maps; }
const char* stub_parameters(void) { return last.parameters; }

// --- Devices, contexts, modules: just enough for Triton's driver to go on ---

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = num_devices, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)(uintptr_t)(device + 1), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = fault, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability[0]; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability[1]; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = max_shared; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1 << 16;
  }
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return *module = (CUmodule)image, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  RULE(num_functions < MAX_FUNCTIONS);
  return *function = (CUfunction)(uintptr_t)++num_functions, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* c) {
  return *count = 1, CUDA_SUCCESS;
}
// Any address may be one of the device's.
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)data = pointer, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

// --- Launches and tensor maps ---

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  RULE(config->gridDimX >= 1 && config->gridDimX <= INT32_MAX);
  RULE(config->gridDimY >= 1 && config->gridDimY <= 65535);
  RULE(config->gridDimZ >= 1 && config->gridDimZ <= 65535);
  RULE(config->blockDimX * config->blockDimY * config->blockDimZ <= 1024);
  RULE(config->sharedMemBytes <= (unsigned)max_shared);
  const int index = (int)(uintptr_t)function - 1;
  char* next = last.parameters;
  for (int i = 0; i < functions[index].count; ++i) {
    memcpy(next, parameters[i], functions[index].sizes[i]);
    next += functions[index].sizes[i];
  }
  ++last.launches;
  return CUDA_SUCCESS;
}

// The map keeps the address that it was made from, for whoever compares parameters.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* dim, const cuuint64_t* stride,
                                const cuuint32_t* box, const cuuint32_t* element_stride,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned spans[] = {~0u, 32, 64, 128};
  RULE(type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ);
  RULE(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE);
  RULE(swizzle <= CU_TENSOR_MAP_SWIZZLE_128B);
  RULE((uintptr_t)map % 64 == 0);
  RULE((uintptr_t)address % 16 == 0);
  RULE(rank >= 1 && rank <= 5);
  for (unsigned i = 0; i < rank; ++i) {
    RULE(dim[i] >= 1 && dim[i] <= (1ull << 32));
    RULE(box[i] >= 1 && box[i] <= 256);
    RULE(element_stride[i] >= 1 && element_stride[i] <= 8);
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    RULE(stride[i] % 16 == 0 && stride[i] < (1ull << 40));
    RULE(stride[i] > 0);  // cuda.h asks for at least the size of the dimension
  }
  RULE(box[0] * sizes[type] % 16 == 0);
  RULE(box[0] * sizes[type] <= spans[swizzle]);
  memset(map, 0, sizeof *map);
  memcpy(map, &address, sizeof address);
  ++last.maps;
  return CUDA_SUCCESS;
}
