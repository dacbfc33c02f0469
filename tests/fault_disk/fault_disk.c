// A disk that fails: preloaded into a program, it makes calls named $FAULT_CALL (fsync, read, write, open or
// flock) on files whose path holds $FAULT_PATH fail with the error number $FAULT_ERRNO, from the
// $FAULT_AFTER-th such call on, in the process of rank $FAULT_RANK, or in all where it is not set;
// $FAULT_TIMES calls fail, all where it is not set. With $FAULT_SLOW_MS they take so much longer instead.
// With $FAULT_KEEPS_OPEN a file that is removed while this process has it open stays in its directory as
// .nfsNNNN, as on NFS.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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
  if (wanted == NULL || kind == NULL) return 0;
  if (victim != NULL && (rank == NULL || strcmp(rank, victim) != 0)) return 0;
  if (strcmp(kind, call) != 0 || strstr(path, wanted) == NULL) return 0;
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
  const char *kind = getenv("FAULT_CALL");
  if (kind == NULL || strcmp(kind, call) != 0) return 0;
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

ssize_t read(int fd, void *bytes, size_t count) {
  if (fails_on("read", fd)) return -1;
  ssize_t (*real)(int, void *, size_t) = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
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

int flock(int fd, int operation) {
  if (fails_on("flock", fd)) return -1;
  int (*real)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
  return real(fd, operation);
}

// Whether this process has the file open.
static int is_open(int directory, const char *path) {
  struct stat file, other;
  DIR *open_files = opendir("/proc/self/fd");
  int found = 0;
  if (open_files == NULL) return 0;
  if (fstatat(directory, path, &file, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(file.st_mode)) {
    for (const struct dirent *entry; !found && (entry = readdir(open_files)) != NULL;) {
      found = fstat(atoi(entry->d_name), &other) == 0 && file.st_ino == other.st_ino &&
              file.st_dev == other.st_dev;
    }
  }
  closedir(open_files);
  return found;
}

// Moves a file that is open to a name beside it. Whether it has.
static int is_kept(int directory, const char *path) {
  static atomic_int kept;
  if (getenv("FAULT_KEEPS_OPEN") == NULL || !is_open(directory, path)) return 0;
  const char *slash = strrchr(path, '/');
  const int parent = slash == NULL ? 0 : (int)(slash + 1 - path);
  char name[4096];
  snprintf(name, sizeof name, "%.*s.nfs%04d", parent, path, atomic_fetch_add(&kept, 1));
  return renameat(directory, path, directory, name) == 0;
}

int unlink(const char *path) {
  if (is_kept(AT_FDCWD, path)) return 0;
  int (*real)(const char *) = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
  return real(path);
}

int unlinkat(int directory, const char *path, int flags) {
  if ((flags & AT_REMOVEDIR) == 0 && is_kept(directory, path)) return 0;
  int (*real)(int, const char *, int) =
      (int (*)(int, const char *, int))dlsym(RTLD_NEXT, "unlinkat");
  return real(directory, path, flags);
}
