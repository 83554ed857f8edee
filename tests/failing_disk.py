"""A disk that is full after some more writes: a library that is loaded before the system's, in this and in children.

Only files under one folder lie on that disk. What programs write through the C library's streams, as compilers do, it
does not see, but sees them make their files.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

/* Writes that are left, and the error of those after them; shared with all children. */
static struct { atomic_long left; atomic_int error; } *disk;
static char folder[4096];

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAILING_DISK_STATE"), *under = getenv("FAILING_DISK_FOLDER");
    if (!path || !under) return;
    int fd = NEXT(open)(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || NEXT(ftruncate)(fd, 4096) != 0) _exit(99);
    snprintf(folder, sizeof folder, "%s", under);
    disk = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
}

void failing_disk_set(long left, int error) { atomic_store(&disk->error, error); atomic_store(&disk->left, left); }
long failing_disk_left(void) { return atomic_load(&disk->left); }

static int lies_there(const char *path) {
    char absolute[4096];
    if (path[0] != '/') {
        if (!getcwd(absolute, sizeof absolute)) return 0;
        return strncmp(absolute, folder, strlen(folder)) == 0;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(int there) {
    if (!disk || !there || atomic_load(&disk->error) == 0) return 0;
    if (atomic_fetch_sub(&disk->left, 1) > 0) return 0;
    errno = atomic_load(&disk->error);
    return 1;
}

static int is_full(void) { return disk && atomic_load(&disk->error) == ENOSPC && atomic_load(&disk->left) <= 0; }

static int open_there(int fd) {
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = disk ? readlink(name, path, sizeof path - 1) : -1;
    if (length <= 0) return 0;
    path[length] = 0;
    return lies_there(path);
}

static int makes(const char *path, int flags) {
    struct stat status;
    return (flags & O_CREAT) && lies_there(path) && lstat(path, &status) != 0;
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...) {                                       \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return disk && makes(path, flags) && fails(1) ? -1 : NEXT(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
int openat(int at, const char *path, int flags, ...) {
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more);
    return disk && path[0] == '/' && makes(path, flags) && fails(1) ? -1 : NEXT(openat)(at, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    return disk && mode[0] != 'r' && makes(path, O_CREAT) && fails(1) ? NULL : NEXT(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return disk && mode[0] != 'r' && makes(path, O_CREAT) && fails(1) ? NULL : NEXT(fopen64)(path, mode);
}
ssize_t write(int fd, const void *data, size_t count) {
    return open_there(fd) && fails(1) ? -1 : NEXT(write)(fd, data, count);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return open_there(fd) && fails(1) ? -1 : NEXT(writev)(fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    return open_there(fd) && fails(1) ? -1 : NEXT(pwrite)(fd, data, count, at);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    return open_there(fd) && fails(1) ? -1 : NEXT(pwrite64)(fd, data, count, at);
}
int mkdir(const char *path, mode_t mode) { return lies_there(path) && fails(1) ? -1 : NEXT(mkdir)(path, mode); }
int link(const char *from, const char *to) { return lies_there(to) && fails(1) ? -1 : NEXT(link)(from, to); }

int statvfs(const char *path, struct statvfs *status) {
    int found = NEXT(statvfs)(path, status);
    if (found == 0 && lies_there(path) && is_full()) status->f_bavail = status->f_bfree = 0;
    return found;
}
int statvfs64(const char *path, struct statvfs64 *status) {
    int found = NEXT(statvfs64)(path, status);
    if (found == 0 && lies_there(path) && is_full()) status->f_bavail = status->f_bfree = 0;
    return found;
}
"""

WHOLE = 1 << 40
"""Writes that a disk takes which is not full."""


class Disk:
    """The disk, in a process that was started with :func:`environment`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.failing_disk_set.argtypes = (ctypes.c_long, ctypes.c_int)
        self._library.failing_disk_left.restype = ctypes.c_long

    def fail_after(self, writes: int, error: int) -> None:
        """Take so many more writes, then fail with ``error`` (an errno) until further notice."""
        self._library.failing_disk_set(writes, error)

    def mend(self) -> int:
        """Take all writes again; returns how many were refused."""
        left = int(self._library.failing_disk_left())
        self._library.failing_disk_set(WHOLE, 0)
        return max(0, -left)


def environment(folder: Path, disk: Path) -> dict[str, str]:
    """Environment of a process whose ``disk`` may fail; what is needed for it is built in ``folder``."""
    library = folder / "failing_disk.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=_SOURCE, text=True, check=True)
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "FAILING_DISK_STATE": str(folder / "state"),
        "FAILING_DISK_FOLDER": str(disk),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
