// A disk that fails: preloaded into a program, it makes calls named $FAULT_CALL (fsync, write or
// open) on files whose path holds $FAULT_PATH fail with the error number $FAULT_ERRNO, from the
// $FAULT_AFTER-th such call on, in the process of rank $FAULT_RANK; $FAULT_TIMES calls fail, all
// where it is not set. With $FAULT_SLOW_MS they take so much longer instead.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text != NULL ? atol(text) : otherwise;
}

// Whether this call on the file at `path` fails; errno then says why.
static int fails(const char *call, const char *path) {
  static atomic_long calls;
  const char *wanted = getenv("FAULT_PATH"), *rank = getenv("RANK"), *victim = getenv("FAULT_RANK");
  const char *kind = getenv("FAULT_CALL");
  if (wanted == NULL || rank == NULL || victim == NULL || kind == NULL) return 0;
  if (strcmp(rank, victim) != 0 || strcmp(kind, call) != 0 || strstr(path, wanted) == NULL) return 0;
  const long now = atomic_fetch_add(&calls, 1) + 1, after = number("FAULT_AFTER", 1);
  if (now < after || now >= after + number("FAULT_TIMES", 1000000)) return 0;
  const long slow = number("FAULT_SLOW_MS", 0);
  if (slow > 0) {
    usleep((useconds_t)slow * 1000);
    return 0;
  }
  errno = (int)number("FAULT_ERRNO", EIO);
  return 1;
}

static int fails_on(const char *call, int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = '\0';
  return fails(call, path);
}

int fsync(int fd) {
  if (fails_on("fsync", fd)) return -1;
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
  return real(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
  if (fails_on("write", fd)) return -1;
  ssize_t (*real)(int, const void *, size_t) =
      (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
  return real(fd, bytes, count);
}

int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if ((flags & O_ACCMODE) != O_RDONLY && fails("open", path)) return -1;
  int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
  return real(path, flags, mode);
}
