// Streams and events of a device, through libtorch's device-independent interface: no CUDA header
// is needed, and CUDA answers once its library is in the process.
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "shim.h"

namespace {

c10::impl::VirtualGuardImpl cuda() { return c10::impl::VirtualGuardImpl(c10::kCUDA); }

c10::Device device_of(int index) {
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
}

}  // namespace

extern "C" {

// Makes GPU `index` the calling thread's current device.
char* rr_set_device(int index) {
  return rr::guarded([&] { cuda().setDevice(device_of(index)); });
}

// A stream of GPU `index` that runs before others where both could; `out` is the caller's.
char* rr_stream_new(int index, c10::Stream** out) {
  return rr::guarded([&] {
    *out = new c10::Stream(cuda().getStreamFromGlobalPool(device_of(index), /*high priority*/ true));
  });
}

void rr_stream_free(c10::Stream* stream) { delete stream; }

// The stream as CUDA's own handle.
char* rr_stream_handle(const c10::Stream* stream, void** out) {
  return rr::guarded([&] { *out = stream->native_handle(); });
}

// What is queued on `stream` from now on waits for what its device's current stream holds now.
char* rr_stream_follow(const c10::Stream* stream) {
  return rr::guarded([&] {
    c10::Event event(c10::kCUDA);
    event.record(cuda().getStream(stream->device()));
    event.block(*stream);
  });
}

// An event behind everything that `stream` holds now; `out` is the caller's.
char* rr_stream_mark(const c10::Stream* stream, c10::Event** out) {
  return rr::guarded([&] {
    auto event = std::make_unique<c10::Event>(c10::kCUDA);
    event->record(*stream);
    *out = event.release();
  });
}

char* rr_event_done(const c10::Event* event, bool* out) {
  return rr::guarded([&] { *out = event->query(); });
}

// What is queued on the current stream of the event's device from now on waits for the event.
char* rr_event_hold(const c10::Event* event) {
  return rr::guarded([&] { event->block(cuda().getStream(event->device())); });
}

void rr_event_free(c10::Event* event) { delete event; }

// Bytes of GPU `index`: free, in all, and the most that tensors of this process held at once.
char* rr_device_memory(int index, size_t* free, size_t* total, size_t* peak) {
  return rr::guarded([&] {
    auto* allocator = c10::getDeviceAllocator(c10::kCUDA);
    const auto device = static_cast<c10::DeviceIndex>(index);
    std::tie(*free, *total) = allocator->getMemoryInfo(device);
    const auto stats = allocator->getDeviceStats(device);
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *peak = static_cast<size_t>(stats.allocated_bytes[all].peak);
  });
}

}  // extern "C"
