/* Why: the system may wake a thread of the pool on the core of the thread that wakes it. OpenMP's threads wait by
 * spinning, so the two take turns there, a time slice (3-4 ms) each, until something moves one of them: one-token calls
 * of a fresh process took 8-25 ms instead of 1. OpenMP reads its own settings for that (GOMP_SPINCOUNT, OMP_PROC_BIND)
 * when it is loaded, which is before anybody asks for a kernel. */
#define _GNU_SOURCE /* sched_getcpu, cpu_set_t */
#include "team.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define WORD_BITS 64
#define SPINS 2000     /* about as long as a thread takes that is awake on a core of its own: some microseconds */
#define MOST_YIELDS 500 /* then OpenMP waits by its own rules: the machine has no core left for us */

typedef struct {
    const tw_pool *pool;
    void (*body)(void *);
    void *data;
    _Atomic int entered;
    _Atomic uint64_t taken[CPU_SETSIZE / WORD_BITS]; /* cores that a thread of this team is on */
} team;

static _Thread_local const team *led; /* by this thread */

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Whether this thread is the first of the team on its core. */
static bool claim_core(team *t) {
    int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) {
        return true;
    }
    uint64_t bit = (uint64_t)1 << core % WORD_BITS;
    return !(atomic_fetch_or_explicit(&t->taken[core / WORD_BITS], bit, memory_order_relaxed) & bit);
}

/* Moves this thread to a core where no other of the team is, if it may run on one; it may run where it might before. */
static void move_apart(team *t) {
    cpu_set_t own, others;
    if (sched_getaffinity(0, sizeof own, &own) != 0) {
        return;
    }
    CPU_ZERO(&others);
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (CPU_ISSET(core, &own) && !(t->taken[core / WORD_BITS] >> core % WORD_BITS & 1)) {
            CPU_SET(core, &others);
        }
    }
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
        claim_core(t);
        sched_setaffinity(0, sizeof own, &own);
    }
}

/* Lets threads of the team that wait for this core have it: who waits for them in OpenMP's barrier would spin on it. */
static void await_all(const team *t) {
    int size = t->pool->team_size();
    for (int i = 0; i < SPINS && t->entered < size; i++) {
        relax();
    }
    for (int i = 0; i < MOST_YIELDS && t->entered < size; i++) {
        sched_yield();
    }
}

static void run(void *argument) {
    team *t = argument;
    bool leads = led == t;
    t->entered++;
    if (!leads && !claim_core(t)) {
        move_apart(t);
    }
    t->body(t->data);
    if (leads) {
        await_all(t);
    }
}

void tw_parallel(const tw_pool *pool, void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    if (pool->team_size == NULL || threads < 2) {
        pool->parallel(body, data, threads, flags);
        return;
    }
    team t = {.pool = pool, .body = body, .data = data};
    const team *before = led;
    led = &t;
    claim_core(&t);
    pool->parallel(run, &t, threads, flags);
    led = before;
}
