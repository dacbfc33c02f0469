// A disk that fails: preloaded into a program, it makes fsync() of files whose path holds
// $FAULT_PATH fail with EIO, from the $FAULT_AFTER-th such call on, in the process of rank
// $FAULT_RANK; $FAULT_TIMES calls fail, all where it is not set.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text != NULL ? atol(text) : otherwise;
}

int fsync(int fd) {
  static atomic_long calls;
  const char *wanted = getenv("FAULT_PATH"), *rank = getenv("RANK"), *victim = getenv("FAULT_RANK");
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (wanted != NULL && rank != NULL && victim != NULL && strcmp(rank, victim) == 0 && length > 0) {
    path[length] = '\0';
    if (strstr(path, wanted) != NULL) {
      const long call = atomic_fetch_add(&calls, 1) + 1, after = number("FAULT_AFTER", 1);
      if (call >= after && call < after + number("FAULT_TIMES", 1000000)) {
        errno = EIO;
        return -1;
      }
    }
  }
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
  return real(fd);
}
