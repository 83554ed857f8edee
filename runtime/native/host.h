/* The C interface between the runtime and a host_so kernel (templates/shared/abi.jinja), and the thread pool. */
#ifndef TILEWRIGHT_HOST_H
#define TILEWRIGHT_HOST_H

#include <stdint.h>

#define TW_ABI_VERSION 1

typedef void (*tw_fork_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
    int32_t abi_version;
    int32_t threads;
    tw_fork_fn fork;
} tw_host;

typedef int32_t (*tw_entry)(const tw_host *host, const int64_t *args);

/* Install the thread pool: GOMP_parallel (NULL: none) and omp_get_num_threads of the same library (NULL: unknown).
 * Returns 0, or an errno value. */
int tw_set_pool(tw_fork_fn parallel, int (*team_size)(void));

/* What kernels get as `fork`: NULL in a forked child, where the pool's threads no longer exist. */
tw_fork_fn tw_fork(void);

#endif
