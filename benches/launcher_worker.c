/* The worker of launcher.py, the same under every launcher. Times are CLOCK_MONOTONIC, nanoseconds.
 *
 *   start DIR               notes in DIR/RANK when its main began, and ends
 *   fork DIR COUNT          starts that COUNT times and waits: what the system alone takes
 *   sleep DIR               notes its process id there, and waits for a signal
 *   log DIR LINES RATE      writes LINES lines of 100 bytes, one write(2) each, RATE a second (0: as
 *                           fast as it goes), notes how long that took, and ends once DIR/go exists
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 100, SECOND = 1000000000 };

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (long long)time.tv_sec * SECOND + time.tv_nsec;
}

static void nap(long long until) {
    struct timespec time = {until / SECOND, until % SECOND};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

/* Writes a number into DIR/RANK, whole or not at all. */
static int note(const char *dir, long long number) {
    char path[4096], staged[4096];
    const char *rank = getenv("RANK");
    snprintf(path, sizeof path, "%s/%s", dir, rank ? rank : "0");
    snprintf(staged, sizeof staged, "%s/.%s", dir, rank ? rank : "0");
    FILE *file = fopen(staged, "w");
    if (!file || fprintf(file, "%lld\n", number) < 0 || fclose(file) != 0) return 1;
    return rename(staged, path) != 0;
}

static int write_lines(const char *dir, long lines, long rate) {
    char line[LINE + 1];
    long long begin = now();
    for (long i = 0; i < lines; i++) {
        /* A burst a millisecond keeps the rate without a system call a line. */
        if (rate > 1000 && i % (rate / 1000) == 0) nap(begin + i * (long long)SECOND / rate);
        int head = snprintf(line, sizeof line, "line %ld ", i);
        memset(line + head, 'x', LINE - 1 - head);
        line[LINE - 1] = '\n';
        if (write(1, line, LINE) != LINE) return 1;
    }
    if (note(dir, now() - begin)) return 1;
    char go[4096];
    snprintf(go, sizeof go, "%s/go", dir);
    while (access(go, F_OK) != 0) usleep(10000);
    return 0;
}

static int start_all(char **argv, int count) {
    char rank[16], *args[] = {argv[0], "start", argv[2], NULL};
    for (int i = 0; i < count; i++) {
        snprintf(rank, sizeof rank, "%d", i);
        setenv("RANK", rank, 1);
        if (vfork() == 0) {
            execv(argv[0], args);
            _exit(127);
        }
    }
    int status, failed = 0;
    while (wait(&status) > 0) failed |= status;
    return failed != 0;
}

int main(int argc, char **argv) {
    long long began = now();
    if (argc < 3) return 2;
    if (!strcmp(argv[1], "start")) return note(argv[2], began);
    if (!strcmp(argv[1], "fork") && argc == 4) return start_all(argv, atoi(argv[3]));
    if (!strcmp(argv[1], "log") && argc == 5)
        return write_lines(argv[2], atol(argv[3]), atol(argv[4]));
    if (strcmp(argv[1], "sleep") || note(argv[2], getpid())) return 2;
    pause();
    return 0;
}
