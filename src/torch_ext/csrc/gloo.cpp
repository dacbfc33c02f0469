// libtorch's own c10d::ProcessGroupGloo and c10d::TCPStore behind a C ABI.
#ifndef USE_DISTRIBUTED
#define USE_DISTRIBUTED
#endif
#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO
#endif
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iomanip>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>

#include "shim.h"

// The headers in gloo_decl/ are declarations of ours; this size is what libtorch 2.11.0 was built
// with, and a different libtorch must not get past the compiler.
static_assert(sizeof(c10d::ProcessGroupGloo) == 488, "gloo_decl/ does not match this libtorch");

namespace {

using Work = c10::intrusive_ptr<c10d::Work>;

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
};

// c10d keeps a record of recent collectives for its own post-mortem tool, which nothing here reads,
// and searches it linearly at each new one: several times the cost of a small collective. It looks
// at this variable when the first group is made.
void switch_flight_recorder_off() {
  static std::once_flag once;
  std::call_once(once, [] { setenv("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/0); });
}

// A group over `store`, reached through the device and with the timeout of `options`.
std::unique_ptr<Group> make_group(c10::intrusive_ptr<c10d::Store> store, int rank, int size,
                                  c10::intrusive_ptr<c10d::ProcessGroupGloo::Options> options) {
  auto group = std::make_unique<Group>();
  group->store = std::move(store);
  group->gloo =
      c10::make_intrusive<c10d::ProcessGroupGloo>(group->store, rank, size, std::move(options));
  return group;
}

}  // namespace

extern "C" {

// How one rank joins; the order is the Rust struct's.
struct RrGlooJoin {
  const char* host;           // where the store listens
  uint16_t port;
  bool serves_store;          // on this rank
  int rank;
  int world_size;
  int64_t joining_ms;         // the deadline of the rendezvous
  int64_t timeout_ms;         // of every collective
  const char* local_address;  // the own address that reaches the peers; empty: interfaces
  const char* interfaces;     // names with commas between; used when local_address is empty
  const char* way;            // the store's address as another host reaches it; empty: unknown here
  bool asks_the_way;          // local_address reaches this host alone, and others are elsewhere
  const char* prefix;         // separates this group's keys from an earlier group's
  bool is_lasting;            // the store lives over several meetings, whose keys are still there
};

namespace {

// The address that a rank binds. One on the store's host, whose name leads to loopback there, takes the
// address by which a rank of another host reaches that host.
std::string address_to_bind(c10d::Store& store, const RrGlooJoin* join) {
  const auto key = [](int rank) { return "way/" + std::to_string(rank); };
  const std::string nowhere = "-";
  const std::string way = join->way;
  store.set(key(join->rank), way.empty() ? nowhere : way);
  for (int rank = 0; join->asks_the_way && rank < join->world_size; ++rank) {
    const std::string told = store.get_to_str(key(rank));
    if (told != nowhere) return told;
  }
  return join->local_address;
}

// A name that no other process has.
std::string unique_name() {
  std::random_device random;
  std::ostringstream name;
  for (int i = 0; i < 4; ++i) name << std::hex << std::setfill('0') << std::setw(8) << random();
  return name.str();
}

// What a meeting in a lasting store is called. Rank 0 names it and waits for an answer from everyone; its
// list of these tells each that this is the meeting it has come to, and none from before.
std::string name_of_meeting(c10d::Store& store, const RrGlooJoin* join) {
  const auto answer = [](const std::string& name, int rank) {
    return "answer/" + name + "/" + std::to_string(rank);
  };
  const auto list = [](const std::string& name) { return "list/" + name; };
  const std::string current = "meeting", own = unique_name();
  if (join->rank == 0) {
    store.set(current, own);
    std::string answers;
    for (int rank = 1; rank < join->world_size; ++rank) {
      answers += store.get_to_str(answer(own, rank)) + " ";
    }
    store.set(list(own), answers);
    return own;
  }
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(join->joining_ms);
  std::chrono::milliseconds pause{10};
  for (std::string answered; std::chrono::steady_clock::now() < deadline;) {
    const std::string name = store.get_to_str(current);
    if (name != answered) store.set(answer(name, join->rank), own);
    answered = name;
    if (store.check({list(name)}) && store.get_to_str(list(name)).find(own) != std::string::npos) {
      return name;
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, std::chrono::milliseconds{200});
  }
  TORCH_CHECK(false, "timed out after ", join->joining_ms, " ms: not all ranks have come");
}

}  // namespace

char* rr_gloo_join(const RrGlooJoin* join, Group** out) {
  return rr::guarded([&] {
    switch_flight_recorder_off();
    const auto timeout = std::chrono::milliseconds(join->timeout_ms);
    c10d::TCPStoreOptions store_options;
    store_options.port = join->port;
    store_options.isServer = join->serves_store;
    store_options.numWorkers = static_cast<size_t>(join->world_size);
    store_options.timeout = std::chrono::milliseconds(join->joining_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(std::string(join->host), store_options);
    auto store = c10::make_intrusive<c10d::PrefixStore>(std::string(join->prefix), tcp);
    if (join->is_lasting) {
      store = c10::make_intrusive<c10d::PrefixStore>(name_of_meeting(*store, join), store);
    }
    auto options = c10d::ProcessGroupGloo::Options::create(timeout);
    const auto address = address_to_bind(*store, join);
    if (!address.empty()) {
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
    }
    std::istringstream names(address.empty() ? join->interfaces : "");
    for (std::string name; std::getline(names, name, ',');) {
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface(name));
    }
    *out = make_group(store, join->rank, join->world_size, options).release();
    // Groups that are split off later have as long as this one had.
    tcp->setTimeout(timeout);
  });
}

// A group of some of `group`'s ranks, all of which call this with the same `name`; `rank` and
// `size` are the new group's.
char* rr_gloo_split(Group* group, int rank, int size, const char* name, Group** out) {
  return rr::guarded([&] {
    const auto& old = group->gloo->getOptions();
    auto options = c10d::ProcessGroupGloo::Options::create(old->timeout);
    options->devices = old->devices;
    auto store = c10::make_intrusive<c10d::PrefixStore>(std::string(name), group->store);
    *out = make_group(store, rank, size, options).release();
  });
}

void rr_gloo_leave(Group* group) { delete group; }

// `op`: 0 sum, 1 max, 2 min. In place; the work holds a reference to the tensor.
char* rr_gloo_all_reduce(Group* group, at::Tensor* tensor, int op, Work** out) {
  return rr::guarded([&] {
    static constexpr c10d::ReduceOp::RedOpType kOps[] = {
        c10d::ReduceOp::SUM, c10d::ReduceOp::MAX, c10d::ReduceOp::MIN};
    TORCH_CHECK(op >= 0 && op < 3, "unknown reduction ", op);
    c10d::AllreduceOptions options;
    options.reduceOp = kOps[op];
    std::vector<at::Tensor> tensors{*tensor};
    *out = new Work(group->gloo->allreduce(tensors, options));
  });
}

char* rr_gloo_broadcast(Group* group, at::Tensor* tensor, int root, Work** out) {
  return rr::guarded([&] {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    std::vector<at::Tensor> tensors{*tensor};
    *out = new Work(group->gloo->broadcast(tensors, options));
  });
}

char* rr_gloo_barrier(Group* group, Work** out) {
  return rr::guarded([&] { *out = new Work(group->gloo->barrier()); });
}

// Waits for a collective, then frees it whatever came of it.
char* rr_gloo_wait(Work* work) {
  return rr::guarded([&] {
    std::unique_ptr<Work> owned(work);
    (*owned)->wait();
  });
}

void rr_gloo_forget(Work* work) { delete work; }

}  // extern "C"
