/* Launches that are carried out: this library is loaded into a Python process, and has that process's Python import
 * what decodes a launch and has the kernel's source run (tests/executing_launches.py). */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "standin.h"

typedef int (*executor)(execution *);
typedef int (*finder)(CUdeviceptr pointer, CUdeviceptr *base, size_t *bytes);

static executor execute;
static finder find;

void standin_execute_with(executor one, finder other) {
    execute = one;
    find = other;
}
bool standin_executes(void) { return execute != NULL; }

bool standin_foreign_extent(CUdeviceptr pointer, CUdeviceptr *base, size_t *bytes) {
    return find && find(pointer, base, bytes);
}

/* In a child of the process whose devices these are: learn of them, where the environment says that there are any. */
void standin_attach(void) {
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    if (execute || !getenv("TILEWRIGHT_STANDIN") || pthread_mutex_trylock(&once)) return;
    int (*hold)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*let_go)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
    int (*run)(const char *) = (int (*)(const char *))dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    if (hold && let_go && run) {
        int held = hold();
        run("import sys; sys.path.append('" TESTS "'); import executing_launches; executing_launches.attach()");
        let_go(held);
    } else {
        fprintf(stderr, "the stand-in of the CUDA driver executes launches in processes of Python alone\n");
    }
    pthread_mutex_unlock(&once);
}

/* A CUresult, or HANGS. */
int standin_execute(const launched *launch, CUfunction entry, double *cost_ns) {
    execution asked = {launch, entry->module->image, entry->module->image_bytes, entry->offsets, entry->sizes,
                       entry->parameter_count, 0, ""};
    int result = execute(&asked);
    *cost_ns = asked.cost_ns;
    if (result > 0) standin_break((CUresult)result, asked.said);
    return result;
}
