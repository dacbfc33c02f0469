// The part of the stand-in for CUDA that follows libtorch's CUDA half into the process: the libraries that
// it names and that are not installed go before it, our kernels after it. And the functions of CUDA's
// runtime that training does not call, which end the process with their name.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void *(*real_dlopen)(const char *, int);

static void load(const char *path, int flags) {
  if (real_dlopen(path, flags) == NULL) {
    fprintf(stderr, "fake CUDA: %s\n", dlerror());
    abort();
  }
}

// The directory of the library that defines `symbol`, with a slash.
static void directory_of(const void *symbol, char out[PATH_MAX]) {
  Dl_info info;
  if (dladdr(symbol, &info) == 0 || realpath(info.dli_fname, out) == NULL) abort();
  strrchr(out, '/')[1] = 0;
}

static void load_stubs(const char *own) {
  char path[2 * PATH_MAX];
  snprintf(path, sizeof path, "%sstubs", own);
  DIR *directory = opendir(path);
  for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
    if (strstr(entry->d_name, ".so") == NULL) continue;
    snprintf(path, sizeof path, "%sstubs/%s", own, entry->d_name);
    load(path, RTLD_NOW | RTLD_GLOBAL);
  }
  if (directory != NULL) closedir(directory);
}

void *dlopen(const char *name, int flags) {
  static int loaded;
  if (real_dlopen == NULL) real_dlopen = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
  // What libtorch's CPU half lies beside; the linker would look beside this library.
  const void *torch = dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv");
  char own[PATH_MAX], path[2 * PATH_MAX];
  if (name == NULL || strchr(name, '/') != NULL || torch == NULL) return real_dlopen(name, flags);
  directory_of((const void *)&loaded, own);
  // The one that libtorch is linked to ends the process when it is called.
  if (strcmp(name, "libnccl.so.2") == 0) {
    snprintf(path, sizeof path, "%slibfake_nccl.so", own);
    return real_dlopen(path, flags);
  }
  directory_of(torch, path);
  strncat(path, name, PATH_MAX - 1);
  if (access(path, F_OK) != 0) return real_dlopen(name, flags);
  const int first = strcmp(name, "libtorch_cuda.so") == 0 && !loaded++;
  if (first) load_stubs(own);
  void *handle = real_dlopen(path, flags);
  if (first && handle != NULL) {
    snprintf(path, sizeof path, "%slibfake_kernels.so", own);
    load(path, RTLD_NOW | RTLD_GLOBAL);
  }
  return handle;
}

#define ABSENT(name) \
  void name(void) { \
    fprintf(stderr, "fake CUDA: " #name " is not there\n"); \
    abort(); \
  }
ABSENT(cudaDeviceGetDefaultMemPool)
ABSENT(cudaFreeAsync)
ABSENT(cudaFuncGetAttributes)
ABSENT(cudaFuncSetAttribute)
ABSENT(cudaGetSymbolAddress)
ABSENT(cudaGraphDebugDotPrint)
ABSENT(cudaGraphDestroy)
ABSENT(cudaGraphExecDestroy)
ABSENT(cudaGraphGetNodes)
ABSENT(cudaGraphInstantiateWithFlags)
ABSENT(cudaGraphLaunch)
ABSENT(cudaGraphNodeGetDependencies)
ABSENT(cudaIpcCloseMemHandle)
ABSENT(cudaIpcGetEventHandle)
ABSENT(cudaIpcGetMemHandle)
ABSENT(cudaIpcOpenEventHandle)
ABSENT(cudaIpcOpenMemHandle)
ABSENT(cudaMallocAsync)
ABSENT(cudaMemPoolGetAttribute)
ABSENT(cudaMemPoolSetAccess)
ABSENT(cudaMemPoolSetAttribute)
ABSENT(cudaMemPoolTrimTo)
ABSENT(cudaMemcpyToSymbol)
ABSENT(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
ABSENT(cudaStreamAddCallback)
ABSENT(cudaStreamBeginCapture)
ABSENT(cudaStreamEndCapture)
ABSENT(cudaLaunchHostFunc)
ABSENT(cudaMemcpy2DAsync)
ABSENT(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cudaProfilerStart)
ABSENT(cudaProfilerStop)

// What libtorch asks cuDNN before it chooses a kernel for attention.
size_t cudnnGetVersion(void) { return 91900; }
