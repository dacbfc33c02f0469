// Which work of a device is ordered before which: streams run beside each other unless an event, or the
// host, makes one wait. Work on the same bytes that nothing orders is a race, which on a real device gives
// wrong numbers once in a while; here it is found every time.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bytes that a piece of work reads or writes.
typedef struct {
  const void *from;
  size_t size;
  bool write;
} FakeCudaRange;

// Work queued on `stream`. Returns null, or which race it is, in memory of the calling thread.
const char *fake_cuda_work(const void *stream, const char *name, const FakeCudaRange *ranges, size_t count);

// An event's place in its stream; the event was made or passed on before.
void fake_cuda_record(const void *event, const void *stream);

// What is queued on `stream` from now on waits for the event.
void fake_cuda_wait(const void *stream, const void *event);

// The calling thread has seen that an event has come, that a stream is empty, or (null) the device.
void fake_cuda_saw_event(const void *event);
void fake_cuda_saw_stream(const void *stream);
void fake_cuda_saw_device(void);

// An event, or memory, that is given back.
void fake_cuda_forget_event(const void *event);
void fake_cuda_forget_memory(const void *from, size_t size);

#ifdef __cplusplus
}
#endif
