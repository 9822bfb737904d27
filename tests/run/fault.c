/* Preloaded into a process, lets one kind of call of the system fail: tests/run/test_faults.py.

   FAULT is "call number errno is_lasting is_in_child path": the number-th such call on a path that
   begins so fails, and all later ones if that lasts. Errno 0 means that only half of the bytes are
   moved. With is_in_child the process that the test starts is spared. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

static char wanted[32], where[4096];
static int number, failure, is_lasting, is_in_child, seen;
static pid_t first;

__attribute__((constructor)) static void begin(void)
{
    const char *told = getenv("FAULT");
    first = getpid();
    if (told == NULL || sscanf(told, "%31s %d %d %d %d %4095[^\n]", wanted, &number, &failure,
                               &is_lasting, &is_in_child, where) != 6)
        wanted[0] = 0;
}

static int fails(const char *call, const char *path)
{
    if (strcmp(call, wanted) || path == NULL || strncmp(path, where, strlen(where)))
        return 0;
    if (is_in_child && getpid() == first)
        return 0;
    seen++;
    if (is_lasting ? seen < number : seen != number)
        return 0;
    errno = failure;
    return 1;
}

static const char *path_of(int file)
{
    static __thread char path[4096];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define HALF(count) (((count) + 1) / 2)

/* Calls that move bytes: (name, as the test calls it, the file, the count, parameters, arguments) */
#define MOVES(name, call, file, count, parameters, arguments)                                      \
    ssize_t name parameters                                                                        \
    {                                                                                              \
        if (fails(call, path_of(file))) {                                                          \
            if (failure)                                                                           \
                return -1;                                                                         \
            count = HALF(count);                                                                   \
        }                                                                                          \
        return REAL(name) arguments;                                                               \
    }
MOVES(read, "read", f, n, (int f, void *b, size_t n), (f, b, n))
MOVES(pread64, "pread", f, n, (int f, void *b, size_t n, off64_t o), (f, b, n, o))
MOVES(write, "write", f, n, (int f, const void *b, size_t n), (f, b, n))
MOVES(pwrite64, "pwrite", f, n, (int f, const void *b, size_t n, off64_t o), (f, b, n, o))
MOVES(copy_file_range, "copy_file_range", t, n,
      (int f, off64_t *o, int t, off64_t *p, size_t n, unsigned g), (f, o, t, p, n, g))

static ssize_t read_into(int f, const struct iovec *v, int k, off64_t o, int flags)
{
    struct iovec part = *v;
    if (!fails("preadv", path_of(f)))
        return REAL(preadv64v2)(f, v, k, o, flags);
    if (failure)
        return -1;
    part.iov_len = HALF(part.iov_len);
    return REAL(preadv64v2)(f, &part, 1, o, flags);
}
ssize_t preadv64(int f, const struct iovec *v, int k, off64_t o) { return read_into(f, v, k, o, 0); }
ssize_t preadv64v2(int f, const struct iovec *v, int k, off64_t o, int g)
{
    return read_into(f, v, k, o, g);
}

int close(int f)
{
    int is_written = (fcntl(f, F_GETFL) & O_ACCMODE) != O_RDONLY;
    int is_failure = is_written && fails("close", path_of(f));
    int result = REAL(close)(f);
    if (is_failure)
        errno = failure;
    return is_failure ? -1 : result;
}

/* Calls that do one thing: (result, name, as the test calls it, path, parameters, arguments) */
#define DOES(result, bad, name, call, path, parameters, arguments)                                 \
    result name parameters { return fails(call, path) ? bad : REAL(name) arguments; }
DOES(int, -1, fsync, "fsync", path_of(f), (int f), (f))
DOES(int, -1, ftruncate64, "ftruncate", path_of(f), (int f, off64_t n), (f, n))
DOES(int, -1, rename, "rename", b, (const char *a, const char *b), (a, b))
DOES(int, -1, link, "link", b, (const char *a, const char *b), (a, b))
DOES(int, -1, linkat, "link", b, (int x, const char *a, int y, const char *b, int g),
     (x, a, y, b, g))
DOES(int, -1, mkdir, "mkdir", p, (const char *p, mode_t m), (p, m))
DOES(int, -1, unlink, "unlink", p, (const char *p), (p))
DOES(int, -1, rmdir, "rmdir", p, (const char *p), (p))
DOES(int, -1, stat64, "stat", p, (const char *p, struct stat64 *s), (p, s))
DOES(int, -1, lstat64, "lstat", p, (const char *p, struct stat64 *s), (p, s))
DOES(int, -1, statvfs64, "statvfs", p, (const char *p, struct statvfs64 *s), (p, s))
DOES(int, -1, utimensat, "utime", p, (int d, const char *p, const struct timespec t[2], int g),
     (d, p, t, g))
DOES(DIR *, NULL, opendir, "opendir", p, (const char *p), (p))

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return fails("open", path) ? -1 : REAL(open64)(path, flags, mode);
}
