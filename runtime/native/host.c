#include "host.h"

#include <pthread.h>
#include <stddef.h>

#include "team.h"

static tw_pool pool;

static void forget_pool(void) { pool = (tw_pool){NULL, NULL}; }

int tw_set_pool(tw_fork_fn parallel, int (*team_size)(void)) {
    static int registered;
    pool = (tw_pool){parallel, team_size};
    if (registered) {
        return 0;
    }
    registered = 1;
    return pthread_atfork(NULL, NULL, forget_pool);
}

static void parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    tw_parallel(&pool, body, data, threads, flags);
}

tw_fork_fn tw_fork(void) { return pool.parallel == NULL ? NULL : parallel; }
