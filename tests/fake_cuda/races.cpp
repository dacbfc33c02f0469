// Vector clocks (Mattern, 1989, "Virtual Time and Global States of Distributed Systems"): each stream counts
// its work, and knows up to which count of the others its next work comes after theirs.
#include "races.h"

#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using Clock = std::map<const void*, uint64_t>;  // stream -> count of its work

struct Access {
  const void* stream;
  uint64_t count;
  const char* name;
};

// What was last done to some bytes.
struct Bytes {
  size_t end;
  Access write{nullptr, 0, ""};
  std::vector<Access> reads;
};

std::mutex lock;
std::map<const void*, Clock> streams, events;
Clock host;                          // what work that is queued from now on comes after
thread_local Clock* seen = nullptr;  // what this thread knows to be done
std::map<size_t, Bytes> memory;      // by first byte; ranges do not overlap
std::set<std::string> names;

void join(Clock& into, const Clock& other) {
  for (const auto& [stream, count] : other)
    if (into[stream] < count) into[stream] = count;
}

Clock& own() {
  if (seen == nullptr) seen = new Clock;
  return *seen;
}

bool is_before(const Access& access, const Clock& now) {
  if (access.count == 0) return true;
  const auto known = now.find(access.stream);
  return known != now.end() && known->second >= access.count;
}

// Cuts the range that holds `at`, so that one begins there.
void cut(size_t at) {
  auto next = memory.upper_bound(at);
  if (next == memory.begin()) return;
  auto& [begin, bytes] = *std::prev(next);
  if (begin == at || bytes.end <= at) return;
  Bytes rest = bytes;
  bytes.end = at;
  memory.emplace(at, std::move(rest));
}

// Does an access to every range from `begin` to `end`, with gaps filled first.
template <typename Body>
void each_range(size_t begin, size_t end, Body body) {
  cut(begin);
  cut(end);
  for (size_t at = begin; at < end;) {
    auto place = memory.lower_bound(at);
    if (place == memory.end() || place->first > at) {
      const size_t gap = place == memory.end() ? end : std::min(end, place->first);
      place = memory.emplace(at, Bytes{gap, {nullptr, 0, ""}, {}}).first;
    }
    body(place->second);
    at = place->second.end;
  }
}

// After a write all that was known of the bytes is the same.
void replace(size_t begin, size_t end, const Access& write) {
  if (begin == end) return;
  memory.erase(memory.lower_bound(begin), memory.lower_bound(end));
  memory.emplace(begin, Bytes{end, write, {}});
}

std::string check(Bytes& bytes, const Access& now, const Clock& clock, bool write) {
  std::string race;
  const auto against = [&](const Access& other, const char* did) {
    if (other.stream != now.stream && !is_before(other, clock) && race.empty())
      race = std::string(now.name) + (write ? " writes" : " reads") + " what " + other.name + " " + did +
             " on another stream, and nothing makes it wait";
  };
  against(bytes.write, "writes");
  if (!write) {
    for (auto& read : bytes.reads)
      if (read.stream == now.stream) return read = now, race;
    bytes.reads.push_back(now);
    return race;
  }
  for (const auto& read : bytes.reads) against(read, "reads");
  return race;
}

}  // namespace

extern "C" {

const char* fake_cuda_work(const void* stream, const char* name, const FakeCudaRange* ranges, size_t count) {
  std::scoped_lock guard(lock);
  thread_local std::string race;
  race.clear();
  if (seen != nullptr) join(host, *seen);
  Clock& clock = streams[stream];
  join(clock, host);
  const Access now{stream, ++clock[stream], names.emplace(name).first->c_str()};
  for (size_t i = 0; i < count; i++) {
    const size_t begin = reinterpret_cast<size_t>(ranges[i].from);
    each_range(begin, begin + ranges[i].size, [&](Bytes& bytes) {
      const std::string found = check(bytes, now, clock, ranges[i].write);
      if (race.empty()) race = found;
    });
    if (ranges[i].write) replace(begin, begin + ranges[i].size, now);
  }
  return race.empty() ? nullptr : race.c_str();
}

void fake_cuda_record(const void* event, const void* stream) {
  std::scoped_lock guard(lock);
  events[event] = streams[stream];
}

void fake_cuda_wait(const void* stream, const void* event) {
  std::scoped_lock guard(lock);
  join(streams[stream], events[event]);
}

void fake_cuda_saw_event(const void* event) {
  std::scoped_lock guard(lock);
  join(own(), events[event]);
}

void fake_cuda_saw_stream(const void* stream) {
  std::scoped_lock guard(lock);
  join(own(), streams[stream]);
}

void fake_cuda_saw_device() {
  std::scoped_lock guard(lock);
  for (const auto& [stream, clock] : streams) join(own(), clock);
}

void fake_cuda_forget_event(const void* event) {
  std::scoped_lock guard(lock);
  events.erase(event);
}

void fake_cuda_forget_memory(const void* from, size_t size) {
  std::scoped_lock guard(lock);
  const size_t begin = reinterpret_cast<size_t>(from);
  cut(begin);
  cut(begin + size);
  memory.erase(memory.lower_bound(begin), memory.lower_bound(begin + size));
}

}  // extern "C"
