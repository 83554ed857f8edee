#include "cuda_driver.h"

#include <pthread.h>

static bool watching, forked;

static void note_fork(void) { forked = true; }

int tw_cuda_watch_forks(void) {
    if (watching) {
        return 0;
    }
    watching = true;
    return pthread_atfork(NULL, NULL, note_fork);
}

bool tw_cuda_forked(void) { return forked; }
