// A stand-in for NCCL whose ranks are threads of one process and whose device is the host's memory:
// what the NCCL backend calls, with NCCL's nonblocking behaviour, and failures on request. It lets
// the backend's own logic run where there is no GPU. Types and constants are nccl.h's.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum { SUM = 0, MAX = 2, MIN = 3 };
enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST };
enum { MAX_RANKS = 8, MAX_GROUPS = 4096 };

typedef struct { char internal[128]; } UniqueId;

typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking;
} ConfigHead;

typedef struct {
  int kind, dtype, op, root;
  size_t count;
  const char *from;
  char *to;
} Call;

typedef struct {
  long number;
  int ranks, joined, posted, dead;
  Call calls[MAX_RANKS];
} Group;

typedef struct {
  Group *group;
  int rank, waiting;  // waiting: for the others, in a call or to join
  long round;
  const char *note;
} Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Group groups[MAX_GROUPS];
static long rounds[MAX_GROUPS], next_number = 1;

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

// Reduces element `from` of every rank's input into element `to` of `out`.
static void reduce(const Group *group, size_t from, char *out, size_t to) {
  const Call *first = &group->calls[0];
  double value = read_at(first->from, first->dtype, from);
  for (int rank = 1; rank < group->ranks; rank++) {
    double other = read_at(group->calls[rank].from, first->dtype, from);
    if (first->op == SUM) value += other;
    if (first->op == MAX && other > value) value = other;
    if (first->op == MIN && other < value) value = other;
  }
  write_at(out, first->dtype, to, value);
}

// Does the collective that all ranks have posted. Results are computed aside first: buffers are
// read and written in place.
static void perform(Group *group) {
  const Call *first = &group->calls[0];
  const size_t bytes = first->count * width(first->dtype), ranks = (size_t)group->ranks;
  char *aside = calloc(ranks, bytes + 1);
  switch (first->kind) {
    case ALL_REDUCE:
      for (size_t i = 0; i < first->count; i++) reduce(group, i, aside, i);
      for (size_t r = 0; r < ranks; r++) memcpy(group->calls[r].to, aside, bytes);
      break;
    case REDUCE_SCATTER:
      for (size_t i = 0; i < ranks * first->count; i++) reduce(group, i, aside, i);
      for (size_t r = 0; r < ranks; r++) memcpy(group->calls[r].to, aside + r * bytes, bytes);
      break;
    case ALL_GATHER:
      for (size_t r = 0; r < ranks; r++) memcpy(aside + r * bytes, group->calls[r].from, bytes);
      for (size_t r = 0; r < ranks; r++) memcpy(group->calls[r].to, aside, ranks * bytes);
      break;
    default:
      memcpy(aside, group->calls[first->root].from, bytes);
      for (size_t r = 0; r < ranks; r++) memcpy(group->calls[r].to, aside, bytes);
  }
  free(aside);
}

static int post(Comm *comm, Call call) {
  int result = IN_PROGRESS;
  pthread_mutex_lock(&lock);
  Group *group = comm->group;
  if (comm->waiting) {
    comm->note = "a call while another is in progress";
    result = INVALID_ARGUMENT;
  } else {
    group->calls[comm->rank] = call;
    comm->waiting = 1;
    comm->round = rounds[group - groups];
    if (++group->posted == group->ranks) {
      perform(group);
      group->posted = 0;
      rounds[group - groups]++;
    }
  }
  pthread_mutex_unlock(&lock);
  return result;
}

int ncclGetVersion(int *version) {
  *version = 22809;
  return SUCCESS;
}

int ncclGetUniqueId(UniqueId *id) {
  if (getenv("FAKE_NCCL_NO_ID")) return INTERNAL_ERROR;
  pthread_mutex_lock(&lock);
  memset(id, 0, sizeof *id);
  memcpy(id->internal, &next_number, sizeof next_number);
  next_number++;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int ncclCommInitRankConfig(Comm **out, int ranks, UniqueId id, int rank, const ConfigHead *config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || config->size < sizeof *config)
    return INVALID_ARGUMENT;
  long number;
  memcpy(&number, id.internal, sizeof number);
  if (number < 1 || number >= MAX_GROUPS || ranks > MAX_RANKS) return INVALID_ARGUMENT;
  pthread_mutex_lock(&lock);
  Group *group = &groups[number];
  group->number = number;
  group->ranks = ranks;
  group->joined++;
  Comm *comm = calloc(1, sizeof *comm);
  comm->group = group;
  comm->rank = rank;
  *out = comm;
  pthread_mutex_unlock(&lock);
  return IN_PROGRESS;
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
  pthread_mutex_lock(&lock);
  Group *group = comm->group;
  *state = SUCCESS;
  if (group->dead) {
    comm->note = "a rank has aborted\nplace.cc:1";
    *state = REMOTE_ERROR;
  } else if (group->joined < group->ranks) {
    *state = IN_PROGRESS;
  } else if (comm->waiting && rounds[group - groups] == comm->round) {
    *state = IN_PROGRESS;
  } else {
    comm->waiting = 0;
  }
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

// The group's peers learn of it, as over NVLink or a network.
int ncclCommAbort(Comm *comm) {
  pthread_mutex_lock(&lock);
  comm->group->dead = 1;
  free(comm);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
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
  (void)stream;
  return post(comm, (Call){ALL_REDUCE, dtype, op, 0, count, from, to});
}

int ncclReduceScatter(const void *from, void *to, size_t count, int dtype, int op, Comm *comm,
                      void *stream) {
  (void)stream;
  return post(comm, (Call){REDUCE_SCATTER, dtype, op, 0, count, from, to});
}

int ncclAllGather(const void *from, void *to, size_t count, int dtype, Comm *comm, void *stream) {
  (void)stream;
  return post(comm, (Call){ALL_GATHER, dtype, SUM, 0, count, from, to});
}

int ncclBroadcast(const void *from, void *to, size_t count, int dtype, int root, Comm *comm,
                  void *stream) {
  (void)stream;
  return post(comm, (Call){BROADCAST, dtype, SUM, root, count, from, to});
}
