#include "host.h"

#include <pthread.h>
#include <stddef.h>

static tw_fork_fn installed_fork;

static void forget_fork(void) { installed_fork = NULL; }

int tw_set_fork(tw_fork_fn fork) {
    static int registered;
    installed_fork = fork;
    if (registered) {
        return 0;
    }
    registered = 1;
    return pthread_atfork(NULL, NULL, forget_fork);
}

tw_fork_fn tw_fork(void) { return installed_fork; }
