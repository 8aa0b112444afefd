// A CUDA runtime, driver and cuBLAS that compute nothing, for a machine without a GPU: memory is
// lent, launches are counted, and every call succeeds. Preloaded, it is what torch and Triton find.
//
// Host code runs as on an H200 (sm_90): Inductor and Triton compile, torch's allocator has the same
// peaks. Of the calls below those that return something fill it in; all others are `OK`.

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties

long no_op_launches, no_op_copies, no_op_waits;

static void *object(void) { return calloc(1, 512); }

int no_op_ok(void) { return 0; }
// Another name of it, whatever arguments the header gives that name.
#define OK(name) __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", no_op_ok");
#define RETURNS(type, name, arguments, body) type name arguments { body; return 0; }
#define RUNTIME(name, arguments, body) RETURNS(cudaError_t, name, arguments, body)
#define DRIVER(name, arguments, body) RETURNS(CUresult, name, arguments, body)

// --- the device

static int attribute(int which) {
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrWarpSize: return 32;
        default: return 0;
    }
}

RUNTIME(cudaGetDeviceProperties, (struct cudaDeviceProp *p, int device), {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no-op H200");
    p->major = 9;
    p->multiProcessorCount = 132;
    p->totalGlobalMem = 150000000000;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 52428800;
    p->textureAlignment = 512;
})
RUNTIME(cudaGetDevice, (int *d), *d = 0)
RUNTIME(cudaGetDeviceCount, (int *n), *n = 1)
RUNTIME(cudaDeviceGetAttribute, (int *v, enum cudaDeviceAttr a, int d), *v = attribute(a))
RUNTIME(cudaDeviceGetPCIBusId, (char *s, int n, int d), strncpy(s, "0000:00:00.0", n))
RUNTIME(cudaDriverGetVersion, (int *v), *v = CUDA_VERSION)
RUNTIME(cudaRuntimeGetVersion, (int *v), *v = CUDA_VERSION)
RUNTIME(cudaDeviceCanAccessPeer, (int *yes, int a, int b), *yes = 0)
RUNTIME(cudaDeviceGetStreamPriorityRange, (int *least, int *most), {
    if (least) *least = 0;
    if (most) *most = -5;
})
OK(cudaSetDevice) OK(cudaDeviceSynchronize) OK(cudaDeviceEnablePeerAccess)
OK(cudaGetLastError) OK(cudaPeekAtLastError) OK(cudaProfilerStart) OK(cudaProfilerStop)

// --- memory: addresses of the host that nobody touches cost nothing

RUNTIME(cudaMalloc, (void **p, size_t bytes), {
    const size_t step = 1 << 21;  // as a GPU aligns large blocks
    char *found = mmap(0, bytes + step, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return cudaErrorMemoryAllocation;
    *p = (void *)(((size_t)found + step - 1) & ~(step - 1));
})
RUNTIME(cudaMallocAsync, (void **p, size_t bytes, cudaStream_t s), return cudaMalloc(p, bytes))
RUNTIME(cudaHostAlloc, (void **p, size_t bytes, unsigned flags), *p = malloc(bytes))
RUNTIME(cudaFreeHost, (void *p), free(p))
RUNTIME(cudaMemGetInfo, (size_t *left, size_t *all), *left = 149000000000; *all = 150000000000)
RUNTIME(cudaMemcpy, (void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind), {
    no_op_copies++;
    if (bytes < 1 << 24) memcpy(to, from, bytes);  // larger ones are weights
})
RUNTIME(cudaMemcpyAsync, (void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                          cudaStream_t s), return cudaMemcpy(to, from, bytes, kind))
RUNTIME(cudaMemset, (void *p, int value, size_t bytes), if (bytes < 65536) memset(p, value, bytes))
RUNTIME(cudaMemsetAsync, (void *p, int value, size_t bytes, cudaStream_t s),
        return cudaMemset(p, value, bytes))
RUNTIME(cudaPointerGetAttributes, (struct cudaPointerAttributes *a, const void *p), {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
})
OK(cudaFree) OK(cudaFreeAsync) OK(cudaMemPoolTrimTo) OK(cudaHostRegister) OK(cudaHostUnregister)

// --- streams, events, launches

RUNTIME(cudaStreamCreate, (cudaStream_t *s), *s = object())
RUNTIME(cudaStreamCreateWithPriority, (cudaStream_t *s, unsigned f, int p), *s = object())
RUNTIME(cudaStreamGetPriority, (cudaStream_t s, int *p), *p = 0)
RUNTIME(cudaStreamSynchronize, (cudaStream_t s), no_op_waits++)
static enum cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
RUNTIME(cudaStreamIsCapturing, (cudaStream_t s, enum cudaStreamCaptureStatus *c), *c = capturing)
RUNTIME(cudaStreamGetCaptureInfo,
        (cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id, cudaGraph_t *g,
         const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n),
        {
    *c = capturing;
    if (id) *id = capturing;
})
RUNTIME(cudaStreamBeginCapture, (cudaStream_t s, enum cudaStreamCaptureMode mode),
        capturing = cudaStreamCaptureStatusActive)
RUNTIME(cudaEventCreate, (cudaEvent_t *e), *e = object())
RUNTIME(cudaEventCreateWithFlags, (cudaEvent_t *e, unsigned flags), *e = object())
RUNTIME(cudaEventElapsedTime, (float *ms, cudaEvent_t a, cudaEvent_t b), *ms = 1)
RUNTIME(cudaLaunchKernel,
        (const void *f, dim3 grid, dim3 block, void **a, size_t bytes, cudaStream_t s),
        no_op_launches++)
RUNTIME(__cudaLaunchKernel,  // what kernels compiled by nvcc 13 call
        (void *f, dim3 grid, dim3 block, void **a, size_t bytes, cudaStream_t s), no_op_launches++)
RUNTIME(cudaLaunchKernelExC, (const cudaLaunchConfig_t *c, const void *f, void **a),
        no_op_launches++)
RUNTIME(cudaFuncGetAttributes, (struct cudaFuncAttributes *a, const void *f), {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 90;
})
RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags,
        (int *n, const void *f, int block, size_t bytes, unsigned flags), *n = 2)
RUNTIME(cudaStreamEndCapture, (cudaStream_t s, cudaGraph_t *graph), {
    capturing = cudaStreamCaptureStatusNone;
    *graph = object();
})
RUNTIME(cudaGraphInstantiateWithFlags,
        (cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags), *ready = object())
RUNTIME(cudaGraphGetNodes, (cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n), *n = 1)
OK(cudaGraphLaunch) OK(cudaGraphDestroy) OK(cudaGraphExecDestroy)
OK(cudaStreamDestroy) OK(cudaStreamQuery) OK(cudaStreamWaitEvent) OK(cudaEventDestroy)
OK(cudaEventQuery) OK(cudaEventRecord) OK(cudaEventRecordWithFlags) OK(cudaEventSynchronize)
OK(cudaThreadExchangeStreamCaptureMode) OK(cudaFuncSetAttribute)

// --- the driver, as Triton and torch's lazy loading use it

#undef cuDevicePrimaryCtxRelease
#undef cuMemAlloc
static int context[16];
RUNTIME(cudaGetDriverEntryPointByVersion,
        (const char *name, void **f, unsigned v, unsigned long long flags,
         enum cudaDriverEntryPointQueryResult *found), {
    *f = (void *)cudaGetLastError;
    if (found) *found = cudaDriverEntryPointSuccess;
})
DRIVER(cuDriverGetVersion, (int *v), *v = CUDA_VERSION)
DRIVER(cuDeviceGetCount, (int *n), *n = 1)
DRIVER(cuDeviceGet, (CUdevice *d, int i), *d = 0)
DRIVER(cuDeviceGetName, (char *s, int n, CUdevice d), strncpy(s, "no-op H200", n))
DRIVER(cuDeviceGetAttribute, (int *v, CUdevice_attribute a, CUdevice d), {
    *v = attribute(a);
    if (!*v && a != CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *v = 1000;
})
DRIVER(cuDevicePrimaryCtxGetState, (CUdevice d, unsigned *flags, int *active), {
    if (flags) *flags = 0;
    if (active) *active = 1;
})
DRIVER(cuDevicePrimaryCtxRetain, (CUcontext *c, CUdevice d), *c = (CUcontext)context)
DRIVER(cuCtxGetCurrent, (CUcontext *c), *c = (CUcontext)context)
DRIVER(cuCtxGetDevice, (CUdevice *d), *d = 0)
DRIVER(cuModuleLoadData, (CUmodule *m, const void *image), *m = object())
DRIVER(cuModuleLoad, (CUmodule *m, const char *file), *m = object())
DRIVER(cuModuleGetFunction, (CUfunction *f, CUmodule m, const char *name), *f = object())
DRIVER(cuFuncGetAttribute, (int *v, CUfunction_attribute a, CUfunction f),
       *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0)
DRIVER(cuPointerGetAttribute, (void *v, CUpointer_attribute a, CUdeviceptr p),
       *(CUdeviceptr *)v = p)
DRIVER(cuLaunchKernel,
       (CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g,
        unsigned bytes, CUstream s, void **p, void **extra), no_op_launches++)
DRIVER(cuLaunchKernelEx, (const CUlaunchConfig *c, CUfunction f, void **p, void **extra),
       no_op_launches++)
DRIVER(cuOccupancyMaxActiveClusters, (int *n, CUfunction f, const CUlaunchConfig *c), *n = 1)
DRIVER(cuGetErrorString, (CUresult e, const char **s), *s = "none")
OK(cuInit) OK(cuCtxSetCurrent) OK(cuCtxSetLimit) OK(cuCtxGetLimit) OK(cuModuleUnload)
OK(cuFuncSetAttribute) OK(cuFuncSetCacheConfig) OK(cuStreamSynchronize) OK(cuTensorMapEncodeTiled)
OK(cuCtxPushCurrent_v2) OK(cuCtxPopCurrent_v2) OK(cuDevicePrimaryCtxRelease_v2)

// --- cuBLAS

#define PRODUCT(name) int name(void) { no_op_launches++; return 0; }
#define MAKES(name) int name(void **p) { *p = object(); return 0; }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasLtMatmul)
PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemmEx)
PRODUCT(cublasDgemm_v2) PRODUCT(cublasSgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDotEx)
MAKES(cublasCreate_v2) MAKES(cublasLtCreate) MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate) MAKES(cublasLtMatrixLayoutCreate)
OK(cublasDestroy_v2) OK(cublasSetMathMode) OK(cublasSetPointerMode_v2) OK(cublasSetStream_v2)
OK(cublasSetWorkspace_v2) OK(cublasLtMatmulDescDestroy) OK(cublasLtMatmulDescSetAttribute)
OK(cublasLtMatmulPreferenceDestroy) OK(cublasLtMatmulPreferenceSetAttribute)
OK(cublasLtMatrixLayoutDestroy) OK(cublasLtMatrixLayoutSetAttribute)
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *wanted, int most, void *found, int *count) {
    memset(found, 0, 64);
    *count = 1;
    return 0;
}
