/* Timing the stages of a call. */
#ifndef TILEWRIGHT_STAGES_H
#define TILEWRIGHT_STAGES_H

#include <time.h>

static inline double tw_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* Mean time of `step`, which leaves no trace, in `repeats` runs; adds to `stage_ns` at `stage`, while all is `ok`. */
#define TIME_STAGE(step)                                                                                               \
    do {                                                                                                               \
        double start = tw_nanoseconds();                                                                               \
        for (Py_ssize_t r = 0; r < repeats && ok; r++) {                                                               \
            ok = (step);                                                                                               \
        }                                                                                                              \
        stage_ns[stage++] = (tw_nanoseconds() - start) / (double)repeats;                                              \
    } while (0)

#endif
