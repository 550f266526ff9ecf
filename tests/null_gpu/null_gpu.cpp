// A CUDA runtime without a GPU, preloaded in place of the real one: tensors lie in host memory, kernels are written down
// and not run.  What a device would refuse is refused: launches of impossible shape, and waiting while a graph is
// recorded.  build.py adds stubs for every other function of CUDA that the PyTorch at hand calls.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kMemory = size_t{141} << 30;
constexpr int kSharedWithoutAsking = 48 << 10, kSharedAtMost = 227 << 10;  // of a block on sm_90

struct Range {
  size_t bytes;
  cudaMemoryType type;
  int device;
};

struct State {
  std::mutex mutex;
  std::unordered_map<const void*, const char*> kernels;  // by the address of their host function
  std::unordered_map<const void*, int> shared;           // what a kernel has asked for
  std::map<uintptr_t, Range> memory;
  std::set<cudaStream_t> capturing;
  std::set<cudaEvent_t> captured;
  bool recording = false;
  std::string log;
  size_t captured_nodes = 0, allocated = 0;
};

// Never destroyed: PyTorch calls in while the process ends.
State& state() {
  static State* const one = new State;
  return *one;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) { return last_error = error; }

void* token() {
  static uintptr_t next = 0x1000;
  const std::lock_guard lock(state().mutex);
  return reinterpret_cast<void*>(next += 16);
}

void note_locked(const std::string& line) {
  if (state().recording) state().log += line + "\n";
}
void note(const std::string& line) {
  const std::lock_guard lock(state().mutex);
  note_locked(line);
}

std::string text(const void* stream) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%p", stream);
  return stream ? buffer : "0x0";
}

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// A wait; refused if it is for what is being recorded, or, unless this thread has said that it knows, for anything else
// than a stream beside.
cudaError_t wait(const char* function, bool for_recording, bool for_a_stream) {
  const std::lock_guard lock(state().mutex);
  note_locked(std::string("wait ") + function);
  const bool unsafe = !for_a_stream && capture_mode != cudaStreamCaptureModeRelaxed;
  return state().capturing.empty() || !(for_recording || unsafe) ? cudaSuccess
                                                                 : fail(cudaErrorStreamCaptureUnsupported);
}

void* host_memory(size_t bytes) {
  void* const p = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

cudaError_t allocate(void** p, size_t bytes, cudaMemoryType type) {
  *p = host_memory(bytes);
  if (!*p) return fail(cudaErrorMemoryAllocation);
  const std::lock_guard lock(state().mutex);
  state().memory[reinterpret_cast<uintptr_t>(*p)] = {bytes, type, current_device};
  if (type == cudaMemoryTypeDevice) state().allocated += bytes;
  return cudaSuccess;
}

cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  const std::lock_guard lock(state().mutex);
  const auto at = state().memory.find(reinterpret_cast<uintptr_t>(p));
  if (at == state().memory.end()) return fail(cudaErrorInvalidValue);
  if (at->second.type == cudaMemoryTypeDevice) state().allocated -= at->second.bytes;
  munmap(p, std::max<size_t>(at->second.bytes, 1));
  state().memory.erase(at);
  return cudaSuccess;
}

const Range* find(const void* p) {
  auto at = state().memory.upper_bound(reinterpret_cast<uintptr_t>(p));
  if (at == state().memory.begin()) return nullptr;
  --at;
  return reinterpret_cast<uintptr_t>(p) < at->first + std::max<size_t>(at->second.bytes, 1) ? &at->second : nullptr;
}

cudaError_t launched(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream) {
  const std::lock_guard lock(state().mutex);
  const auto name = state().kernels.find(kernel);
  const auto granted = state().shared.find(kernel);
  const size_t allowed = granted == state().shared.end() ? kSharedWithoutAsking : granted->second;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool possible = threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.x <= 0x7fffffffu &&
                        grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && dynamic_shared <= allowed;
  char line[256];
  std::snprintf(line, sizeof line, " %u %u %u %u %u %u %zu %s %d", grid.x, grid.y, grid.z, block.x, block.y, block.z,
                dynamic_shared, text(stream).c_str(), current_device);
  note_locked((possible ? "launch " : "refused ") + std::string(name == state().kernels.end() ? "?" : name->second) +
              line);
  if (state().capturing.count(stream)) ++state().captured_nodes;
  return possible ? cudaSuccess : fail(cudaErrorInvalidConfiguration);
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration configuration;

cudaError_t new_stream(cudaStream_t* stream) {
  *stream = static_cast<cudaStream_t>(token());
  return cudaSuccess;
}
cudaError_t new_event(cudaEvent_t* event) {
  *event = static_cast<cudaEvent_t>(token());
  return cudaSuccess;
}
cudaError_t record(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(state().mutex);
  if (state().capturing.count(stream))
    state().captured.insert(event);
  else
    state().captured.erase(event);
  return cudaSuccess;
}

bool is_recorded(cudaStream_t stream) {
  const std::lock_guard lock(state().mutex);
  return state().capturing.count(stream) > 0;
}
bool is_recorded(cudaEvent_t event) {
  const std::lock_guard lock(state().mutex);
  return state().captured.count(event) > 0;
}

cudaError_t copy(const char* function, void* to, const void* from, size_t bytes) {
  note(std::string("copy ") + function + " " + std::to_string(bytes));
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

}  // namespace

extern "C" {

// For Python, through ctypes.
int null_gpu_record(int on) {
  const std::lock_guard lock(state().mutex);
  return std::exchange(state().recording, on != 0);
}
const char* null_gpu_log() { return state().log.c_str(); }
void null_gpu_clear() {
  const std::lock_guard lock(state().mutex);
  state().log.clear();
}
void null_gpu_note(const char* function) { note(std::string("library ") + function); }
void* null_gpu_token() { return token(); }

// ------------------------------------------------------------------ kernels

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(token()); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const std::lock_guard lock(state().mutex);
  state().kernels.emplace(host, name);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launched(kernel, grid, block, shared, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launched(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launched(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > kSharedAtMost) return fail(cudaErrorInvalidValue);
  const std::lock_guard lock(state().mutex);
  state().shared[kernel] = std::max(value, kSharedWithoutAsking);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = kSharedWithoutAsking;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t,
                                                                   unsigned) {
  *blocks = std::max(1, 2048 / std::max(threads, 1));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}
cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static void* const somewhere = host_memory(1 << 20);
  *address = somewhere;
  return cudaSuccess;
}

// ------------------------------------------------------------------ devices

cudaError_t cudaGetDeviceCount(int* count) {
  const char* const wanted = std::getenv("NULL_GPU_DEVICES");
  *count = wanted ? std::atoi(wanted) : 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  std::snprintf(p->name, sizeof p->name, "null GPU");
  p->major = 9;
  p->totalGlobalMem = kMemory;
  p->sharedMemPerBlock = kSharedWithoutAsking;
  p->sharedMemPerBlockOptin = kSharedAtMost;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->multiProcessorCount = 132;
  p->l2CacheSize = 60 << 20;
  p->memoryBusWidth = 6144;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->memoryPoolsSupported = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedWithoutAsking; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedAtMost; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = 60 << 20; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlockDimX: *value = 1024; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, length, "0000:0%d:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = static_cast<cudaMemPool_t>(token());
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(0x10);
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------ errors

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "cudaErrorStreamCaptureUnsupported" : "error of the null GPU";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return "error of the null GPU";
  }
}

// ------------------------------------------------------------------ memory

cudaError_t cudaMalloc(void** p, size_t bytes) {
  note("allocate " + std::to_string(bytes));
  return allocate(p, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes, cudaMemoryTypeHost); }
cudaError_t cudaFree(void* p) { return p && wait("cudaFree", false, false) ? last_error : release(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
cudaError_t cudaFreeHost(void* p) { return release(p); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = kMemory - std::min(kMemory, state().allocated);
  *total = kMemory;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  const std::lock_guard lock(state().mutex);
  const Range* const range = find(p);
  *attributes = {};
  attributes->type = range ? range->type : cudaMemoryTypeUnregistered;
  attributes->device = range ? range->device : -2;
  if (range) attributes->hostPointer = attributes->devicePointer = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t refused = wait("cudaMemcpy", true, false)) return refused;
  return copy("cudaMemcpy", to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  {
    const std::lock_guard lock(state().mutex);
    if (state().capturing.count(stream)) ++state().captured_nodes;
  }
  return copy("cudaMemcpyAsync", to, from, bytes);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return copy("cudaMemcpyPeerAsync", to, from, bytes);
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  {
    const std::lock_guard lock(state().mutex);
    if (state().capturing.count(stream)) ++state().captured_nodes;
  }
  note("fill " + std::to_string(bytes));
  return cudaMemset(p, value, bytes);
}

// ------------------------------------------------------------------ streams and events

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_stream(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_stream(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return new_stream(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return wait("cudaStreamSynchronize", is_recorded(stream), stream != nullptr);
}
cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize", true, false); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait("cudaEventSynchronize", is_recorded(event), false); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_event(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_event(event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return record(event, stream); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return record(event, stream); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(state().mutex);
  if (state().captured.count(event)) state().capturing.insert(stream);
  return cudaSuccess;
}

// ------------------------------------------------------------------ graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const std::lock_guard lock(state().mutex);
  if (!stream || !state().capturing.empty()) return fail(cudaErrorStreamCaptureUnsupported);
  state().capturing.insert(stream);
  state().captured_nodes = 0;
  note_locked("capture begins");
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = static_cast<cudaGraph_t>(token());
  const std::lock_guard lock(state().mutex);
  state().capturing.clear();
  state().captured.clear();
  note_locked("capture ends " + std::to_string(state().captured_nodes));
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(state().mutex);
  *status = state().capturing.count(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  if (id) *id = 1;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  const std::lock_guard lock(state().mutex);
  *count = state().captured_nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  *graph = static_cast<cudaGraphExec_t>(token());
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  note("replay");
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = static_cast<cudaUserObject_t>(token());
  return cudaSuccess;
}

// ------------------------------------------------------------------ libraries, whose headers need not be here

// Heuristics name one algorithm, which is as good as any.
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
  std::memset(results, 0, 16);
  *count = 1;
  return 0;
}

constexpr int kNumericalNote = 11, kDescriptors = 15, kBehaviourNote = 19;  // CUDNN_TYPE_...
int cudnnBackendCreateDescriptor(int, void** descriptor) {
  *descriptor = token();
  return 0;
}
int cudnnBackendGetAttribute(void*, int, int type, int64_t wanted, int64_t* count, void* array) {
  const bool notes = type == kNumericalNote || type == kBehaviourNote;
  if (count) *count = notes ? 0 : 1;
  if (array && type != kDescriptors && !notes && wanted > 0) std::memset(array, 0, 8);
  return 0;
}
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                             size_t* bytes) {
  *bytes = 0;
  return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*,
                                                      size_t* bytes) {
  *bytes = 0;
  return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* bytes) {
  *bytes = 0;
  return 0;
}

}  // extern "C"
