// A stand-in for NCCL on the host, its ranks threads or processes: what the NCCL backend calls, with
// NCCL's nonblocking behaviour, and failures on request. It lets the backend's own logic run where
// there is no GPU. Tensors are the host's memory, or that of the stand-in for CUDA where it is loaded.
// Types and constants are nccl.h's.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SUCCESS = 0, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum { SUM = 0, MAX = 2, MIN = 3 };
enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST };
enum { MAX_RANKS = 8, MAX_QUEUED = 256 };

typedef struct { char internal[128]; } UniqueId;

typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking;
} ConfigHead;

// Addresses are those of the process that calls.
typedef struct {
  int kind, dtype, op, root, pid;
  size_t count;
  char *from, *to;
} Call;

// What the ranks share, in memory that all of their processes have mapped.
typedef struct {
  pthread_mutex_t lock;
  int ranks, joined, dead;
  long done, posted[MAX_RANKS];  // collectives
  Call calls[MAX_RANKS][MAX_QUEUED];
} Group;

// A group's identity: its memory as its maker has it open.
typedef struct { int pid, descriptor; } Identity;

typedef struct Comm {
  Group *group;
  int rank;
  const char *note;
  struct Comm *next_aborted;
} Comm;

// Of the stand-in for CUDA: where the bytes behind an address of its device are.
__attribute__((weak)) void *fake_cuda_host(const void *pointer);

typedef struct { const void *from; size_t size; _Bool write; } Range;

// Of the same: work of a stream on some bytes; what races with it, or null.
__attribute__((weak)) const char *fake_cuda_work(const void *stream, const char *name, const Range *ranges,
                                                 size_t count);

// Of the same: what comes on a stream waits until the others have done their part.
__attribute__((weak)) void fake_cuda_join(const void *stream, _Bool (*is_done)(const void *, long),
                                          const void *group, long number);

static char *on_host(const void *pointer) {
  return fake_cuda_host ? fake_cuda_host(pointer) : (char *)pointer;
}

// Peers read and write this process's memory, which some kernels allow parents alone.
__attribute__((constructor)) static void admit_peers(void) { prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY); }

// The holder may have been killed.
static void enter(Group *group) {
  if (pthread_mutex_lock(&group->lock) == EOWNERDEAD) pthread_mutex_consistent(&group->lock);
}

static void leave(Group *group) { pthread_mutex_unlock(&group->lock); }

static size_t width(int dtype) {
  static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return widths[dtype];
}

static double from_half(uint16_t h) {
  _Float16 value;
  memcpy(&value, &h, 2);
  return (double)value;
}

static double read_at(const char *p, int dtype, size_t i) {
  switch (dtype) {
    case INT8: return ((const int8_t *)p)[i];
    case UINT8: return ((const uint8_t *)p)[i];
    case INT32: return ((const int32_t *)p)[i];
    case INT64: return (double)((const int64_t *)p)[i];
    case FLOAT16: return from_half(((const uint16_t *)p)[i]);
    case FLOAT32: return ((const float *)p)[i];
    case FLOAT64: return ((const double *)p)[i];
    default: {
      uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
      float value;
      memcpy(&value, &bits, 4);
      return value;
    }
  }
}

static void write_at(char *p, int dtype, size_t i, double value) {
  switch (dtype) {
    case INT8: ((int8_t *)p)[i] = (int8_t)value; break;
    case UINT8: ((uint8_t *)p)[i] = (uint8_t)value; break;
    case INT32: ((int32_t *)p)[i] = (int32_t)value; break;
    case INT64: ((int64_t *)p)[i] = (int64_t)value; break;
    case FLOAT16: {
      _Float16 half = (_Float16)value;
      memcpy(&((uint16_t *)p)[i], &half, 2);
      break;
    }
    case FLOAT32: ((float *)p)[i] = (float)value; break;
    case FLOAT64: ((double *)p)[i] = value; break;
    default: {
      float rounded = (float)value;
      uint32_t bits;
      memcpy(&bits, &rounded, 4);
      ((uint16_t *)p)[i] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
  }
}

// Reads from or writes to the memory of the process that made a call; false where it is gone.
static int reach(const Call *call, char *own, char *other, size_t bytes, int write) {
  if (call->pid == getpid()) {
    memcpy(write ? other : own, write ? own : other, bytes);
    return 1;
  }
  for (size_t done = 0; done < bytes;) {
    const struct iovec here = {own + done, bytes - done}, there = {other + done, bytes - done};
    const ssize_t moved = write ? process_vm_writev(call->pid, &here, 1, &there, 1, 0)
                                : process_vm_readv(call->pid, &here, 1, &there, 1, 0);
    if (moved <= 0) return 0;
    done += (size_t)moved;
  }
  return 1;
}

// Reduces `count` elements of every rank's input, which lie one after the other, into `out`.
static void reduce(const Call *first, size_t ranks, const char *inputs, size_t count, char *out) {
  for (size_t i = 0; i < count; i++) {
    double value = read_at(inputs, first->dtype, i);
    for (size_t rank = 1; rank < ranks; rank++) {
      const double other = read_at(inputs, first->dtype, rank * count + i);
      if (first->op == SUM) value += other;
      if (first->op == MAX && other > value) value = other;
      if (first->op == MIN && other < value) value = other;
    }
    write_at(out, first->dtype, i, value);
  }
}

// Does the next collective, which all ranks have posted; false where a rank is gone. Everything is read before
// anything is written: buffers are read and written in place.
static int perform(Group *group) {
  const size_t at = (size_t)group->done % MAX_QUEUED, ranks = (size_t)group->ranks;
  const Call *first = &group->calls[0][at];
  const size_t part = first->count * width(first->dtype);
  const int scatters = first->kind == REDUCE_SCATTER, gathers = first->kind == ALL_GATHER;
  const size_t input = scatters ? ranks * part : part, output = gathers ? ranks * part : part;
  char *inputs = calloc(ranks, input + 1), *reduced = calloc(1, input + 1);
  int reached = inputs != NULL && reduced != NULL;
  for (size_t r = 0; r < ranks && reached; r++)
    reached = reach(&group->calls[r][at], inputs + r * input, group->calls[r][at].from, input, 0);
  if (reached && (first->kind == ALL_REDUCE || scatters))
    reduce(first, ranks, inputs, input / width(first->dtype), reduced);
  for (size_t r = 0; r < ranks && reached; r++) {
    char *result = gathers ? inputs : scatters ? reduced + r * part : reduced;
    if (first->kind == BROADCAST) result = inputs + (size_t)first->root * part;
    reached = reach(&group->calls[r][at], result, group->calls[r][at].to, output, 1);
  }
  free(inputs);
  free(reduced);
  return reached;
}

static _Bool all_posted(const Group *group) {
  for (int rank = 0; rank < group->ranks; rank++)
    if (group->posted[rank] <= group->done) return 0;
  return group->joined == group->ranks;
}

static _Bool is_done(const void *with, long number) {
  const Group *group = with;
  return __atomic_load_n(&group->done, __ATOMIC_ACQUIRE) >= number || group->dead;
}

static int post(Comm *comm, Call call, const void *from, const void *to, const void *stream) {
  Group *group = comm->group;
  if (fake_cuda_work) {
    const size_t bytes = call.count * width(call.dtype), all = bytes * (size_t)group->ranks;
    const Range ranges[] = {{from, call.kind == REDUCE_SCATTER ? all : bytes, 0},
                            {to, call.kind == ALL_GATHER ? all : bytes, 1}};
    comm->note = fake_cuda_work(stream, "a collective", ranges, 2);
    if (comm->note) return INTERNAL_ERROR;
  }
  call.pid = getpid();
  call.from = on_host(from);
  call.to = on_host(to);
  enter(group);
  long *posted = &group->posted[comm->rank];
  // Without streams nothing can be queued behind a call.
  const int full = *posted - group->done >= (fake_cuda_join ? MAX_QUEUED : 1);
  if (full) {
    comm->note = "a call while another is in progress";
  } else {
    group->calls[comm->rank][*posted % MAX_QUEUED] = call;
    ++*posted;
    if (fake_cuda_join) fake_cuda_join(stream, is_done, group, *posted);
    while (!group->dead && all_posted(group)) {
      group->dead |= !perform(group);
      __atomic_add_fetch(&group->done, 1, __ATOMIC_RELEASE);
    }
  }
  leave(group);
  return full ? INVALID_ARGUMENT : IN_PROGRESS;
}

int ncclGetVersion(int *version) {
  *version = 23007;
  return SUCCESS;
}

int ncclGetUniqueId(UniqueId *id) {
  if (getenv("FAKE_NCCL_NO_ID")) return INTERNAL_ERROR;
  const Identity identity = {getpid(), memfd_create("fake_nccl", MFD_CLOEXEC)};
  if (identity.descriptor < 0 || ftruncate(identity.descriptor, sizeof(Group)) != 0) return INTERNAL_ERROR;
  Group *group =
      mmap(NULL, sizeof *group, PROT_READ | PROT_WRITE, MAP_SHARED, identity.descriptor, 0);
  if (group == MAP_FAILED) return INTERNAL_ERROR;
  pthread_mutexattr_t shared;
  pthread_mutexattr_init(&shared);
  pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&shared, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&group->lock, &shared);
  memset(id, 0, sizeof *id);
  memcpy(id->internal, &identity, sizeof identity);
  return SUCCESS;
}

static Group *open_group(const UniqueId *id) {
  Identity identity;
  char path[64];
  memcpy(&identity, id->internal, sizeof identity);
  snprintf(path, sizeof path, "/proc/%d/fd/%d", identity.pid, identity.descriptor);
  const int descriptor = open(path, O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return NULL;
  Group *group = mmap(NULL, sizeof *group, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  close(descriptor);
  return group == MAP_FAILED ? NULL : group;
}

int ncclCommInitRankConfig(Comm **out, int ranks, UniqueId id, int rank, const ConfigHead *config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || config->size < sizeof *config)
    return INVALID_ARGUMENT;
  const char *expected = getenv("FAKE_NCCL_NVLS"), *nvls = getenv("NCCL_NVLS_ENABLE");
  if (expected && strcmp(expected, nvls ? nvls : "unset") != 0) return INVALID_ARGUMENT;
  Group *group = ranks <= MAX_RANKS ? open_group(&id) : NULL;
  Comm *comm = calloc(1, sizeof *comm);
  if (group == NULL || comm == NULL) return INVALID_ARGUMENT;
  enter(group);
  group->ranks = ranks;
  group->joined++;
  leave(group);
  comm->group = group;
  comm->rank = rank;
  *out = comm;
  return IN_PROGRESS;
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
  Group *group = comm->group;
  enter(group);
  *state = SUCCESS;
  if (group->dead) {
    comm->note = "a rank has aborted\nplace.cc:1";
    *state = REMOTE_ERROR;
  } else if (group->joined < group->ranks) {
    *state = IN_PROGRESS;
  } else if (!fake_cuda_join && group->posted[comm->rank] > group->done) {
    *state = IN_PROGRESS;
  }
  leave(group);
  return SUCCESS;
}

// The library's, where there is one.
__attribute__((weak)) int cudaDeviceSynchronize(void);

static __thread int group_depth;
static __thread Comm *aborted;

static int begin_group(void) {
  group_depth++;
  return SUCCESS;
}

static int end_group(void) {
  if (--group_depth > 0 || aborted == NULL) return SUCCESS;
  if (cudaDeviceSynchronize) cudaDeviceSynchronize();
  while (aborted != NULL) {
    Comm *comm = aborted;
    aborted = comm->next_aborted;
    free(comm);
  }
  return SUCCESS;
}

int ncclGroupStart(void) { return begin_group(); }

int ncclGroupEnd(void) { return end_group(); }

// The group's peers learn of it, as over NVLink or a network. The real one stops the work at once too,
// and frees the communicator at the end of the group of calls; that waits for the whole device.
int ncclCommAbort(Comm *comm) {
  begin_group();
  enter(comm->group);
  comm->group->dead = 1;
  leave(comm->group);
  comm->next_aborted = aborted;
  aborted = comm;
  return end_group();
}

int ncclCommFinalize(Comm *comm) {
  (void)comm;
  return IN_PROGRESS;
}

int ncclCommDestroy(Comm *comm) {
  free(comm);
  return SUCCESS;
}

const char *ncclGetErrorString(int result) {
  switch (result) {
    case INTERNAL_ERROR: return "internal error";
    case INVALID_ARGUMENT: return "invalid argument";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "an error";
  }
}

const char *ncclGetLastError(Comm *comm) { return comm != NULL && comm->note ? comm->note : ""; }

int ncclAllReduce(const void *from, void *to, size_t count, int dtype, int op, Comm *comm,
                  void *stream) {
  return post(comm, (Call){ALL_REDUCE, dtype, op, 0, 0, count, NULL, NULL}, from, to, stream);
}

int ncclReduceScatter(const void *from, void *to, size_t count, int dtype, int op, Comm *comm,
                      void *stream) {
  return post(comm, (Call){REDUCE_SCATTER, dtype, op, 0, 0, count, NULL, NULL}, from, to, stream);
}

int ncclAllGather(const void *from, void *to, size_t count, int dtype, Comm *comm, void *stream) {
  return post(comm, (Call){ALL_GATHER, dtype, SUM, 0, 0, count, NULL, NULL}, from, to, stream);
}

int ncclBroadcast(const void *from, void *to, size_t count, int dtype, int root, Comm *comm,
                  void *stream) {
  return post(comm, (Call){BROADCAST, dtype, SUM, root, 0, count, NULL, NULL}, from, to, stream);
}
