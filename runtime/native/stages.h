/* Timing the stages of a call. */
#ifndef TILEWRIGHT_STAGES_H
#define TILEWRIGHT_STAGES_H

#include <time.h>

/* Of this thread, for other processes are not what is measured. */
static inline double tw_cpu_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* Mean CPU time of `step`, which leaves no trace, in `repeats` runs; adds to `stage_ns` at `stage`, while all is `ok`. */
#define TIME_STAGE(step)                                                                                               \
    do {                                                                                                               \
        double start = tw_cpu_nanoseconds();                                                                           \
        for (Py_ssize_t r = 0; r < repeats && ok; r++) {                                                               \
            ok = (step);                                                                                               \
        }                                                                                                              \
        stage_ns[stage++] = (tw_cpu_nanoseconds() - start) / (double)repeats;                                          \
    } while (0)

#endif
