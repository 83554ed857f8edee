#include "workspace.h"

#include <pthread.h>
#include <stdlib.h>

#define ALIGNMENT 64
#define LEAST_BYTES (1 << 20) /* memory that is not written takes none */

typedef struct {
    void *memory;
    size_t bytes;
} workspace;

static _Thread_local workspace mine;
static pthread_key_t key;
static pthread_once_t key_made = PTHREAD_ONCE_INIT;
static int key_failed;

static void make_key(void) { key_failed = pthread_key_create(&key, free); }

static void *grow(size_t bytes) {
    pthread_once(&key_made, make_key);
    if (key_failed || bytes > (size_t)-1 - ALIGNMENT) {
        return NULL;
    }
    /* The old contents are of no use, so both need not fit in memory at once. */
    free(mine.memory);
    mine = (workspace){NULL, 0};
    pthread_setspecific(key, NULL);
    bytes = bytes < LEAST_BYTES ? LEAST_BYTES : bytes;
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *memory = aligned_alloc(ALIGNMENT, rounded);
    if (memory == NULL || pthread_setspecific(key, memory) != 0) {
        free(memory);
        return NULL;
    }
    mine = (workspace){memory, rounded};
    return memory;
}

void *tw_workspace(size_t bytes) { return bytes <= mine.bytes ? mine.memory : grow(bytes); }
