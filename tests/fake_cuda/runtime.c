// A stand-in for CUDA's runtime (libcudart.so.13), to preload: devices of which only the memory exists.
// libtorch's own CUDA half runs over it: its allocator, streams, events, copies and guards. What it cannot
// do is launch kernels (launch.c); kernels.cpp computes those on the host.
//
// Device memory lies at addresses that nobody can touch: a pointer of the device that the host follows
// ends the process, as it does with a real one. The bytes are `fake_cuda_host(pointer)`. A copy into
// pinned memory arrives when the host waits for it, not before.
//
// CUDA_VISIBLE_DEVICES chooses among the devices of devices.h.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "devices.h"
#include "races.h"

enum { GRAIN = 2 << 20, MAX_BLOCKS = 1 << 16, MAX_HOST = 1 << 14, MAX_STREAMS = 4096 };
static const size_t SPAN = (size_t)64 << 30;  // of addresses, a device

typedef struct { size_t at, size; bool taken; } Block;
typedef struct { char *at; size_t size; } HostRange;

// A copy to pinned memory that the host has not waited for.
typedef struct Arrival {
  struct Arrival *next;
  cudaStream_t stream;
  uint64_t order;
  void *to;
  size_t size;
  char bytes[];
} Arrival;

// Work that ends when others do their part of it: the collectives of NCCL.
typedef struct {
  bool (*is_done)(const void *with, long number);  // null: none
  const void *with;
  long number;
} Joint;

struct CUstream_st { int device; Joint joint; };
struct CUevent_st { cudaStream_t stream; uint64_t order; Joint joint; };
static struct CUstream_st default_stream;
static struct CUstream_st *streams[MAX_STREAMS];  // never freed
static int stream_count;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *device_base, *host_base;
static int devices;
static size_t memory;
static Block blocks[MAX_DEVICES][MAX_BLOCKS];
static int block_count[MAX_DEVICES];
static size_t taken[MAX_DEVICES];
static HostRange pinned[MAX_HOST];
static Arrival *arrivals;
static uint64_t order;
static _Thread_local int current;
static _Thread_local cudaError_t last;

cudaError_t fake_cuda_fail(cudaError_t error) { return last = error; }
#define fail fake_cuda_fail

// Whether a machine of `count` devices has the one that an entry of CUDA_VISIBLE_DEVICES names, by its
// number, its UUID or a slice's.
static bool exists(const char *entry, int count) {
  char uuid[UUID_SIZE], *end;
  const long index = strtol(entry, &end, 10);
  if (end != entry && *end == 0) return index >= 0 && index < count;
  for (int device = 0; device < count; device++) {
    for (long slice = -1; slice < setting("FAKE_CUDA_MIG", 0); slice++) {
      device_uuid(uuid, device, (int)slice);
      if (strcmp(entry, uuid) == 0) return true;
    }
  }
  return false;
}

// How many devices this process sees: the first entry that names none ends the list.
static int visible(void) {
  const char *list = getenv("CUDA_VISIBLE_DEVICES");
  if (list == NULL) return device_count();
  int seen = 0;
  char *copy = strdup(list), *rest = copy;
  for (char *entry; (entry = strsep(&rest, ",")) != NULL && exists(entry, device_count());) seen++;
  free(copy);
  return seen;
}

__attribute__((constructor)) static void begin(void) {
  devices = visible();
  memory = (size_t)setting("FAKE_CUDA_MB", 16384) << 20;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  device_base = mmap(NULL, MAX_DEVICES * SPAN, PROT_NONE, flags, -1, 0);
  host_base = mmap(NULL, MAX_DEVICES * SPAN, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (device_base == MAP_FAILED || host_base == MAP_FAILED) {
    fprintf(stderr, "fake CUDA: no address space\n");
    abort();
  }
}

// The device that an address belongs to; -1 for the host's.
static int owner(const void *pointer) {
  const uintptr_t at = (uintptr_t)pointer, base = (uintptr_t)device_base;
  return at >= base && at < base + MAX_DEVICES * SPAN ? (int)((at - base) / SPAN) : -1;
}

// Where the bytes behind an address are: elsewhere for the device's, there for the host's.
void *fake_cuda_host(const void *pointer) {
  return owner(pointer) < 0 ? (void *)pointer : host_base + ((const char *)pointer - device_base);
}

static bool is_pinned(const void *pointer) {
  const char *at = pointer;
  for (int i = 0; i < MAX_HOST; i++)
    if (pinned[i].at && at >= pinned[i].at && at < pinned[i].at + pinned[i].size) return true;
  return false;
}

static bool pin(void *pointer, size_t size, bool add) {
  for (int i = 0; i < MAX_HOST; i++) {
    if (pinned[i].at == (add ? NULL : pointer)) {
      pinned[i] = (HostRange){add ? pointer : NULL, size};
      return true;
    }
  }
  return false;
}

// Lets copies arrive that were queued on a stream up to `until`, or on any.
static void arrive(cudaStream_t stream, uint64_t until, bool all) {
  for (Arrival **place = &arrivals; *place != NULL;) {
    Arrival *one = *place;
    if ((all || one->stream == stream) && one->order <= until) {
      memcpy(one->to, one->bytes, one->size);
      *place = one->next;
      free(one);
    } else {
      place = &one->next;
    }
  }
}

static Joint *last_joint(cudaStream_t stream) { return stream ? &stream->joint : &default_stream.joint; }

// What is queued on `stream` from now on comes after joint work.
void fake_cuda_join(cudaStream_t stream, bool (*is_done)(const void *, long), const void *with, long number) {
  *last_joint(stream) = (Joint){is_done, with, number};
}

static bool is_over(Joint joint) { return joint.is_done == NULL || joint.is_done(joint.with, joint.number); }

// The host waits where the device would.
static void outlast(Joint joint) {
  while (!is_over(joint)) usleep(50);
}

#define LOCKED(body) \
  do { \
    pthread_mutex_lock(&lock); \
    body; \
    pthread_mutex_unlock(&lock); \
  } while (0)

// --- devices

cudaError_t cudaGetDeviceCount(int *count) {
  *count = devices;
  return devices > 0 ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return devices > 0 ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  if (device < 0 || device >= devices) return fail(cudaErrorInvalidDevice);
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "fake CUDA device");
  out->totalGlobalMem = memory;
  out->major = (int)setting("FAKE_CUDA_MAJOR", 9);
  out->minor = 0;
  out->multiProcessorCount = 16;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = INT_MAX;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->sharedMemPerBlock = 48 << 10;
  out->sharedMemPerBlockOptin = out->sharedMemPerMultiprocessor = 227 << 10;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->textureAlignment = 512;
  out->l2CacheSize = 50 << 20;
  out->pciBusID = device + 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  (void)device;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 16; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  (void)peer, (void)flags;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int length, int device) {
  snprintf(out, (size_t)length, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  for (int i = 0; i < stream_count; i++) outlast(streams[i]->joint);
  fake_cuda_saw_device();
  LOCKED(arrive(NULL, UINT64_MAX, true));
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }

// --- errors

cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError(void) { return last; }

const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "an error of fake CUDA";
}

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported by the stand-in for CUDA";
    default: return "an error of fake CUDA";
  }
}

// --- memory

cudaError_t cudaMalloc(void **out, size_t size) {
  const size_t wanted = (size + GRAIN - 1) / GRAIN * GRAIN;
  cudaError_t result = cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  Block *list = blocks[current];
  int *count = &block_count[current];
  if (taken[current] + wanted <= memory) {
    Block *found = NULL;
    for (int i = 0; i < *count && found == NULL; i++)
      if (!list[i].taken && list[i].size == wanted) found = &list[i];
    const size_t end = *count ? list[*count - 1].at + list[*count - 1].size : 0;
    if (found == NULL && *count < MAX_BLOCKS && end + wanted <= SPAN) {
      found = &list[(*count)++];
      *found = (Block){end, wanted, false};
    }
    if (found != NULL) {
      found->taken = true;
      taken[current] += wanted;
      *out = device_base + (size_t)current * SPAN + found->at;
      result = cudaSuccess;
    }
  }
  pthread_mutex_unlock(&lock);
  return result == cudaSuccess ? result : fail(result);
}

cudaError_t cudaFree(void *pointer) {
  if (pointer == NULL) return cudaSuccess;
  const int device = owner(pointer);
  if (device < 0) return fail(cudaErrorInvalidValue);
  cudaDeviceSynchronize();
  const size_t at = (size_t)((char *)pointer - device_base) - (size_t)device * SPAN;
  cudaError_t result = cudaErrorInvalidValue;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < block_count[device]; i++) {
    Block *block = &blocks[device][i];
    if (block->at == at && block->taken) {
      block->taken = false;
      taken[device] -= block->size;
      madvise(fake_cuda_host(pointer), block->size, MADV_DONTNEED);
      fake_cuda_forget_memory(pointer, block->size);
      result = cudaSuccess;
    }
  }
  pthread_mutex_unlock(&lock);
  return result == cudaSuccess ? result : fail(result);
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = memory - taken[current];
  *total = memory;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t size, unsigned flags) {
  (void)flags;
  if (posix_memalign(out, 4096, size ? size : 1) != 0) return fail(cudaErrorMemoryAllocation);
  LOCKED(pin(*out, size, true));
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) {
  LOCKED(arrive(NULL, UINT64_MAX, true); pin(pointer, 0, false));
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  (void)flags;
  LOCKED(pin(pointer, size, true));
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
  LOCKED(pin(pointer, 0, false));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
  memset(out, 0, sizeof *out);
  const int device = owner(pointer);
  bool host = false;
  LOCKED(host = is_pinned(pointer));
  out->type = device >= 0 ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  out->device = device >= 0 ? device : current;
  out->devicePointer = device >= 0 ? (void *)pointer : NULL;
  out->hostPointer = host ? (void *)pointer : NULL;
  return cudaSuccess;
}

// Whether work may go before or after other work on the same bytes.
static bool is_race(cudaStream_t stream, const char *name, const FakeCudaRange *ranges, size_t count) {
  const char *race = fake_cuda_work(stream, name, ranges, count);
  if (race != NULL) fprintf(stderr, "fake CUDA: race: %s\n", race);
  return race != NULL;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  (void)kind;
  const FakeCudaRange used[] = {{from, owner(from) >= 0 ? size : 0, false}, {to, owner(to) >= 0 ? size : 0, true}};
  if (is_race(stream, "a copy", used, 2)) return fail(cudaErrorNotSupported);
  const void *source = fake_cuda_host(from);
  pthread_mutex_lock(&lock);
  if (owner(from) >= 0 && owner(to) < 0 && is_pinned(to)) {
    Arrival *late = malloc(sizeof *late + size);
    if (late == NULL) abort();
    *late = (Arrival){NULL, stream, ++order, to, size};
    memcpy(late->bytes, source, size);
    Arrival **end = &arrivals;
    while (*end != NULL) end = &(*end)->next;
    *end = late;
  } else {
    memmove(fake_cuda_host(to), source, size);
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, size, kind, NULL);
  return cudaDeviceSynchronize();
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                                cudaStream_t stream) {
  (void)to_device, (void)from_device;
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  const FakeCudaRange used = {to, size, true};
  if (is_race(stream, "a fill", &used, 1)) return fail(cudaErrorNotSupported);
  memset(fake_cuda_host(to), value, size);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }

// --- streams and events: work is done when it is queued, but for copies to pinned memory

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
  (void)flags, (void)priority;
  if (stream_count == MAX_STREAMS) return fail(cudaErrorMemoryAllocation);
  *out = calloc(1, sizeof **out);
  (*out)->device = current;
  LOCKED(streams[stream_count++] = *out);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  (void)stream;
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return cudaStreamSynchronize(stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  outlast(*last_joint(stream));
  fake_cuda_saw_stream(stream);
  LOCKED(arrive(stream, UINT64_MAX, false));
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return is_over(*last_joint(stream)) ? cudaStreamSynchronize(stream) : fail(cudaErrorNotReady);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  (void)flags;
  outlast(event->joint);
  if (setting("FAKE_CUDA_LOSE_WAITS", 0) != (stream == NULL ? 1 : 2)) fake_cuda_wait(stream, event);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out) {
  (void)stream;
  *out = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  (void)graph, (void)dependencies, (void)edges;
  if (id != NULL) *id = 0;
  if (count != NULL) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  (void)mode;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  (void)flags;
  *out = calloc(1, sizeof **out);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  fake_cuda_forget_event(event);
  free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  LOCKED(event->stream = stream; event->order = order; event->joint = *last_joint(stream));
  fake_cuda_record(event, stream);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  (void)flags;
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  outlast(event->joint);
  fake_cuda_saw_event(event);
  LOCKED(arrive(event->stream, event->order, false));
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return is_over(event->joint) ? cudaEventSynchronize(event) : fail(cudaErrorNotReady);
}

cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t from, cudaEvent_t to) {
  (void)from, (void)to;
  *out = 0;
  return cudaSuccess;
}
