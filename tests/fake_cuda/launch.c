// The kernels of the stand-in for CUDA: registered by name, to say which one nobody computes.
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

cudaError_t fake_cuda_fail(cudaError_t error);

typedef struct { const void *function; const char *name; } Kernel;
static Kernel *kernels;
static size_t kernel_count, kernel_room;

void **__cudaRegisterFatBinary(void *binary) {
  (void)binary;
  static void *handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
char __cudaInitModule(void **handle) { return (void)handle, 1; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }

void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name,
                            int limit, void *tid, void *bid, void *block, void *grid, int *warp) {
  (void)handle, (void)device_function, (void)limit, (void)tid, (void)bid, (void)block, (void)grid;
  (void)warp;
  if (kernel_count == kernel_room) {
    kernel_room = kernel_room ? 2 * kernel_room : 1024;
    kernels = realloc(kernels, kernel_room * sizeof *kernels);
    if (kernels == NULL) abort();
  }
  kernels[kernel_count++] = (Kernel){function, name};
}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external,
                       size_t size, int constant, int global) {
  (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant;
  (void)global;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  (void)grid, (void)block, (void)shared, (void)stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  (void)grid, (void)block, (void)shared, (void)stream;
  return cudaSuccess;
}

static cudaError_t refuse(const void *function) {
  const char *name = "unknown";
  for (size_t i = 0; i < kernel_count; i++)
    if (kernels[i].function == function) name = kernels[i].name;
  fprintf(stderr, "fake CUDA: nothing computes the kernel %s\n", name);
  return fake_cuda_fail(cudaErrorNotSupported);
}

cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function) {
  *out = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
  return refuse((const void *)kernel);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  (void)config, (void)arguments;
  return refuse(function);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  return __cudaLaunchKernel((cudaKernel_t)function, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                        size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

static int refuse_driver_call(void) { return cudaErrorNotSupported; }

// The driver's functions are there, and refuse.
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **out, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  (void)symbol, (void)version, (void)flags;
  *out = (void *)refuse_driver_call;
  if (found != NULL) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
