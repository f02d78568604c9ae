/* LD_PRELOAD: a disk that fails. Below the folder given to `disk_fails`, the n-th operation that writes fails
   with `error`; with `stays`, so does every later one that takes room, as on a disk that is full.

   Counted: opening a file for creation, write, pwrite, writev, sendfile, copy_file_range, fsync, fdatasync,
   rename, mkdir, ftruncate, fallocate. With n = 0 they are counted only. With error = -1 the process is killed
   in the n-th one's place. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static size_t length;
static long counted, fails_at;
static int failure, stays, armed, owner;

void disk_fails(const char *folder, long n, int error, int on) {
    length = strlen(folder);
    memcpy(below, folder, length + 1);
    counted = 0; fails_at = n; failure = error; stays = on; owner = getpid(); armed = 1;
}
void disk_mended(void) { armed = 0; }
long disk_operations(void) { return counted; }

/* 1 if the operation on this path is to fail. room: whether it takes any. */
static int fails(const char *path, int room) {
    if (strncmp(path, below, length) || path[length] != '/') return 0;
    long now = __sync_add_and_fetch(&counted, 1);
    if (!fails_at || now < fails_at || (now > fails_at && !(stays && room))) return 0;
    if (failure == -1) raise(SIGKILL);
    errno = failure;
    return 1;
}
static int fails_path(int folder, const char *path, int room) {
    char whole[2 * PATH_MAX];
    if (!armed || owner != getpid() || !path) return 0;
    if (path[0] == '/') return fails(path, room);
    char link[64], start[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(start, sizeof start)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, start, sizeof start - 1);
        if (size < 0) return 0;
        start[size] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", start, path);
    return fails(whole, room);
}
static int fails_fd(int fd, int room) {
    char link[64], path[PATH_MAX];
    if (!armed || owner != getpid()) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path, room);
}
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, room, parameters, arguments, ...) \
    type name parameters { REAL(type, name, __VA_ARGS__); return fails_fd(fd, room) ? -1 : real arguments; }

ON_FD(ssize_t, write, 1, (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
ON_FD(ssize_t, pwrite, 1, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
ON_FD(ssize_t, pwrite64, 1, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), int, const void *, size_t, off64_t)
ON_FD(ssize_t, writev, 1, (int fd, const struct iovec *v, int n), (fd, v, n), int, const struct iovec *, int)
ON_FD(ssize_t, sendfile, 1, (int fd, int i, off_t *o, size_t n), (fd, i, o, n), int, int, off_t *, size_t)
ON_FD(ssize_t, sendfile64, 1, (int fd, int i, off64_t *o, size_t n), (fd, i, o, n), int, int, off64_t *, size_t)
ON_FD(int, fsync, 0, (int fd), (fd), int)
ON_FD(int, fdatasync, 0, (int fd), (fd), int)
ON_FD(int, ftruncate, 1, (int fd, off_t n), (fd, n), int, off_t)
ON_FD(int, ftruncate64, 1, (int fd, off64_t n), (fd, n), int, off64_t)
ON_FD(int, fallocate, 1, (int fd, int m, off_t o, off_t n), (fd, m, o, n), int, int, off_t, off_t)
ON_FD(int, fallocate64, 1, (int fd, int m, off64_t o, off64_t n), (fd, m, o, n), int, int, off64_t, off64_t)

ssize_t copy_file_range(int in, off64_t *a, int fd, off64_t *b, size_t n, unsigned f) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    return fails_fd(fd, 1) ? -1 : real(in, a, fd, b, n, f);
}
int posix_fallocate64(int fd, off64_t o, off64_t n) {
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    return fails_fd(fd, 1) ? errno : real(fd, o, n);
}
int posix_fallocate(int fd, off_t o, off_t n) {
    REAL(int, posix_fallocate, int, off_t, off_t);
    return fails_fd(fd, 1) ? errno : real(fd, o, n);
}
int rename(const char *a, const char *b) {
    REAL(int, rename, const char *, const char *);
    return fails_path(AT_FDCWD, b, 0) ? -1 : real(a, b);
}
int renameat(int d, const char *a, int e, const char *b) {
    REAL(int, renameat, int, const char *, int, const char *);
    return fails_path(e, b, 0) ? -1 : real(d, a, e, b);
}
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return fails_path(e, b, 0) ? -1 : real(d, a, e, b, f);
}
int mkdir(const char *p, mode_t m) {
    REAL(int, mkdir, const char *, mode_t);
    return fails_path(AT_FDCWD, p, 1) ? -1 : real(p, m);
}
int mkdirat(int d, const char *p, mode_t m) {
    REAL(int, mkdirat, int, const char *, mode_t);
    return fails_path(d, p, 1) ? -1 : real(d, p, m);
}
#define MODE(flags) mode_t m = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list l; va_start(l, flags); m = va_arg(l, mode_t); va_end(l); }
#define OPEN(name) \
    int name(const char *p, int f, ...) { \
        MODE(f) REAL(int, name, const char *, int, ...); \
        return (f & O_CREAT) && fails_path(AT_FDCWD, p, 1) ? -1 : real(p, f, m); }
#define OPENAT(name) \
    int name(int d, const char *p, int f, ...) { \
        MODE(f) REAL(int, name, int, const char *, int, ...); \
        return (f & O_CREAT) && fails_path(d, p, 1) ? -1 : real(d, p, f, m); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
