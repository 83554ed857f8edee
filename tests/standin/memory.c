/* The stand-in's device memory is the process's own: a table of what is allocated, and copies within it. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

enum { ALIGNMENT = 512, GUARD_BYTES = 512, MOST_POISONED = 64 << 20 };
static const double TRANSFER_NS_PER_BYTE = 0.04; /* 25 GB/s */

typedef struct {
    CUdeviceptr address;
    size_t bytes;
    void *memory;
    int device;
} allocation;

static allocation *table;
static size_t count, room, total_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* never held while Python runs */

static void poison(void *at, size_t bytes) {
    if (bytes <= MOST_POISONED) memset(at, 0xFF, bytes); /* NaN as a float of any width */
}

void standin_forget_memory(size_t bytes) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++) free(table[i].memory);
    count = 0;
    total_bytes = bytes;
    pthread_mutex_unlock(&lock);
}

static size_t used_on(int device) {
    size_t used = 0;
    for (size_t i = 0; i < count; i++)
        if (table[i].device == device) used += table[i].bytes;
    return used;
}

/* The allocation that `pointer` lies in, or ends; -1 without one. Under the lock. */
static long holder(CUdeviceptr pointer) {
    long ends = -1;
    for (size_t i = 0; i < count; i++) {
        if (pointer - table[i].address < table[i].bytes) return (long)i;
        if (pointer == table[i].address + table[i].bytes) ends = (long)i;
    }
    return ends;
}

/* Which memory a pointer belongs to: an allocation of the driver, or one that this process's Python knows of. */
int standin_extent(CUdeviceptr pointer, CUdeviceptr *base, size_t *bytes) {
    pthread_mutex_lock(&lock);
    long at = holder(pointer);
    if (at >= 0) {
        *base = table[at].address;
        *bytes = table[at].bytes;
    }
    pthread_mutex_unlock(&lock);
    return at >= 0 || standin_foreign_extent(pointer, base, bytes);
}

static bool holds(CUdeviceptr pointer, size_t bytes) {
    CUdeviceptr base;
    size_t all;
    return standin_extent(pointer, &base, &all) && pointer - base <= all && bytes <= all - (pointer - base);
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t bytes) {
    REQUIRE_CONTEXT();
    if (standin_captures_any()) {
        standin_spoil_captures();
        return RULE(capture_unsafe);
    }
    if (!bytes) return RULE(allocation_bytes);
    pthread_mutex_lock(&lock);
    CUresult result = CUDA_SUCCESS;
    void *memory = NULL;
    size_t all = (bytes + GUARD_BYTES + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (bytes > total_bytes || used_on(current->device) > total_bytes - bytes) {
        result = RULE(memory);
    } else if (!(memory = aligned_alloc(ALIGNMENT, all))) {
        result = RULE(memory);
    } else {
        if (count == room) table = realloc(table, (room = 2 * room + 64) * sizeof *table);
        poison(memory, bytes);
        table[count++] = (allocation){(CUdeviceptr)(uintptr_t)memory, bytes, memory, current->device};
        *out = (CUdeviceptr)(uintptr_t)memory;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
    REQUIRE_CONTEXT();
    if (!pointer) return CUDA_SUCCESS;
    CUresult result = standin_await_all(0);
    if (result) return result;
    pthread_mutex_lock(&lock);
    long at = holder(pointer);
    if (at < 0 || table[at].address != pointer) {
        result = RULE(not_allocated);
    } else {
        free(table[at].memory);
        table[at] = table[--count];
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    REQUIRE_CONTEXT();
    pthread_mutex_lock(&lock);
    *total = total_bytes;
    *available = total_bytes - used_on(current->device);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    REQUIRE_CONTEXT();
    if (!holds(to, bytes)) return RULE(copy_range);
    CUresult result = standin_await_all((double)bytes * TRANSFER_NS_PER_BYTE);
    if (!result) memcpy((void *)(uintptr_t)to, from, bytes);
    return result;
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    REQUIRE_CONTEXT();
    if (!holds(from, bytes)) return RULE(copy_range);
    CUresult result = standin_await_all((double)bytes * TRANSFER_NS_PER_BYTE);
    if (!result) memcpy(to, (const void *)(uintptr_t)from, bytes);
    return result;
}

CUresult cuMemsetD8_v2(CUdeviceptr at, unsigned char value, size_t bytes) {
    REQUIRE_CONTEXT();
    if (!holds(at, bytes)) return RULE(copy_range);
    return standin_enqueue_fill(NULL, at, value, bytes);
}

CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
    REQUIRE_CONTEXT();
    if (!holds(at, bytes)) return RULE(copy_range);
    if (!standin_is_stream(stream)) return RULE(stream);
    return standin_enqueue_fill(stream, at, value, bytes);
}
