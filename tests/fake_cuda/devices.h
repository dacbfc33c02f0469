// The devices of the stand-in for CUDA, as its runtime and its NVML tell of them.
//
// environment: FAKE_CUDA_DEVICES     how many (default 1)
//              FAKE_CUDA_MB          memory of each (default 16384)
//              FAKE_CUDA_MAJOR       the generation, their compute capability's first number (default 9)
//              FAKE_CUDA_MIG         into how many MIG slices each is divided (default 0: it is not)
//              FAKE_CUDA_BUSY        INDEX:PID, a process that computes on one
//              FAKE_CUDA_LOST        the index of one that has fallen off the bus, for NVML
//              FAKE_CUDA_DENIED      indices, such as 01, of those that a control group keeps from this process; for
//                                    NVML
//              FAKE_CUDA_TRACE       prints each operation with the bytes that tensors hold
//              FAKE_CUDA_LOSE_WAITS  1: the default stream waits for no event; 2: the others do not. To see
//                                    that it is noticed
#pragma once

#include <stdio.h>
#include <stdlib.h>

enum { MAX_DEVICES = 8, UUID_SIZE = 48 };

static inline long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

static inline int device_count(void) {
  const long count = setting("FAKE_CUDA_DEVICES", 1);
  return count < MAX_DEVICES ? (int)count : MAX_DEVICES;
}

// The name of a device, or of one of its slices.
static inline void device_uuid(char out[UUID_SIZE], int device, int slice) {
  const char *kind = slice < 0 ? "GPU" : "MIG";
  snprintf(out, UUID_SIZE, "%s-fa4e0000-0000-0000-%04d-%012d", kind, slice + 1, device);
}
