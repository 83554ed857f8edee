/* Parallel regions on torch's OpenMP threads, each of which is on a core of its own when it begins. */
#ifndef TILEWRIGHT_TEAM_H
#define TILEWRIGHT_TEAM_H

#include "host.h"

/* The pool: GOMP_parallel and omp_get_num_threads of one OpenMP library; NULL: there is none. */
typedef struct {
    tw_fork_fn parallel;
    int (*team_size)(void);
} tw_pool;

/* GOMP_parallel of `pool`, with threads that share a core moved apart, and without waiting on a core that one of them
 * needs. Pools that say no team size are called as they are. */
void tw_parallel(const tw_pool *pool, void (*body)(void *), void *data, unsigned threads, unsigned flags);

#endif
