// A stand-in for NVML (libnvidia-ml.so.1): what rr-launch and reranker ask of it, for the devices of the
// stand-in for CUDA. Types and numbers are nvml.h's.
#include <stdint.h>
#include <string.h>

#include "devices.h"

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6 };
enum { INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };
enum { MAX_SLICES = 7 };

// A device, or a slice of one (0 and up).
typedef struct { int index, slice; } Device;

typedef struct {
  char legacy[16];
  unsigned domain, bus, device, id, subsystem;
  char bus_id[32];
} Pci;

typedef struct {
  unsigned version;
  unsigned long long total, reserved, free, used;
} Memory;

typedef struct {
  unsigned pid;
  unsigned long long bytes;
  unsigned instance, compute_instance;
} Process;

static Device devices[MAX_DEVICES], slices[MAX_DEVICES][MAX_SLICES];

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInit(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "an error of fake NVML"; }

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
  snprintf(out, size, "580.00");
  return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
  *count = (unsigned)device_count();
  return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out) {
  if ((int)index >= device_count()) return INVALID_ARGUMENT;
  const char *denied = getenv("FAKE_CUDA_DENIED");
  if (denied && strchr(denied, '0' + (int)index)) return NO_PERMISSION;
  if (setting("FAKE_CUDA_LOST", -1) == (long)index) return GPU_IS_LOST;
  devices[index] = (Device){(int)index, -1};
  *out = &devices[index];
  return SUCCESS;
}

int nvmlDeviceGetUUID(const Device *device, char *out, unsigned size) {
  if (size < UUID_SIZE) return INSUFFICIENT_SIZE;
  device_uuid(out, device->index, device->slice);
  return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **out) {
  char other[UUID_SIZE];
  for (int i = 0; i < device_count(); i++) {
    device_uuid(other, i, -1);
    if (strcmp(uuid, other) == 0) return nvmlDeviceGetHandleByIndex_v2((unsigned)i, out);
  }
  return NOT_FOUND;
}

int nvmlDeviceGetName(const Device *device, char *out, unsigned size) {
  (void)device;
  snprintf(out, size, "fake CUDA device");
  return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(const Device *device, Pci *out) {
  memset(out, 0, sizeof *out);
  out->bus = (unsigned)device->index + 1;
  snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(const Device *device, Memory *out) {
  (void)device;
  out->total = out->free = (unsigned long long)setting("FAKE_CUDA_MB", 16384) << 20;
  out->reserved = out->used = 0;
  return SUCCESS;
}

int nvmlDeviceGetMigMode(const Device *device, unsigned *now, unsigned *later) {
  (void)device;
  *now = *later = setting("FAKE_CUDA_MIG", 0) > 0;
  return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(const Device *device, unsigned *count) {
  (void)device;
  *count = MAX_SLICES;
  return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const Device *device, unsigned index, Device **out) {
  if (index >= MAX_SLICES || index >= (unsigned long)setting("FAKE_CUDA_MIG", 0)) return NOT_FOUND;
  slices[device->index][index] = (Device){device->index, (int)index};
  *out = &slices[device->index][index];
  return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Device *device, unsigned *count, Process *out) {
  int index = -1, pid = 0;
  const char *busy = getenv("FAKE_CUDA_BUSY");
  if (busy != NULL && sscanf(busy, "%d:%d", &index, &pid) != 2) return INVALID_ARGUMENT;
  const unsigned room = *count;
  *count = index == device->index;
  if (*count == 0) return SUCCESS;
  if (room == 0) return INSUFFICIENT_SIZE;
  *out = (Process){(unsigned)pid, 3ull << 30, UINT32_MAX, UINT32_MAX};
  return SUCCESS;
}

// What libtorch looks for when a device has no memory left.
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Device **out) {
  unsigned bus = 0;
  if (sscanf(bus_id, "%*x:%x", &bus) != 1) return INVALID_ARGUMENT;
  return nvmlDeviceGetHandleByIndex_v2(bus - 1, out);
}

int nvmlDeviceGetComputeRunningProcesses(const Device *device, unsigned *count, Process *out) {
  return nvmlDeviceGetComputeRunningProcesses_v3(device, count, out);
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetGpuFabricInfoV(void) { return NOT_SUPPORTED; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, SUCCESS; }
