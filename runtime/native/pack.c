#define _DEFAULT_SOURCE /* madvise */
#include "pack.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "host.h"

/* Floats of a panel that are gathered before they are written: long enough runs of every source row for the
 * prefetcher, and no more than a first-level cache holds. */
#define BLOCK_FLOATS 8192

#define HUGE_PAGE_BYTES (2u << 20)

typedef struct {
    const tw_packing *packing;
    int64_t panels, panel_rows;
    _Atomic int64_t next;
    _Atomic bool refused;
} pack_job;

/* out[s * stride + r] = rows[r][k + s] for 4 rows and 4 steps. */
static inline void transpose_4x4(const float *const *rows, int64_t k, float *out, int64_t stride) {
#if defined(__SSE2__)
    __m128 a = _mm_loadu_ps(rows[0] + k), b = _mm_loadu_ps(rows[1] + k);
    __m128 c = _mm_loadu_ps(rows[2] + k), d = _mm_loadu_ps(rows[3] + k);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, a);
    _mm_storeu_ps(out + stride, b);
    _mm_storeu_ps(out + 2 * stride, c);
    _mm_storeu_ps(out + 3 * stride, d);
#elif defined(__ARM_NEON)
    float32x4x2_t ab = vtrnq_f32(vld1q_f32(rows[0] + k), vld1q_f32(rows[1] + k));
    float32x4x2_t cd = vtrnq_f32(vld1q_f32(rows[2] + k), vld1q_f32(rows[3] + k));
    vst1q_f32(out, vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0])));
    vst1q_f32(out + stride, vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1])));
    vst1q_f32(out + 2 * stride, vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0])));
    vst1q_f32(out + 3 * stride, vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1])));
#else
    for (int s = 0; s < 4; s++) {
        for (int r = 0; r < 4; r++) {
            out[s * stride + r] = rows[r][k + s];
        }
    }
#endif
}

/* The source row of each column of a panel; NULL where the panel is padding. */
static void rows_of_panel(const tw_packing *p, int64_t expert, int64_t panel, const float **rows) {
    int64_t half_rows = p->n / p->halves;
    for (int64_t c = 0; c < p->columns; c++) {
        int64_t run = (panel * p->columns + c) / p->run;
        int64_t half = run % p->halves;
        int64_t column = run / p->halves * p->run + c % p->run;
        rows[c] = column < half_rows
                      ? p->weight + expert * p->expert_stride + (half * half_rows + column) * p->row_stride
                      : NULL;
    }
}

/* `steps` steps of one column. */
static void pack_column(const float *row, int64_t k, int64_t steps, float *out, int64_t stride) {
    for (int64_t s = 0; s < steps; s++) {
        out[s * stride] = row == NULL ? 0.0f : row[k + s];
    }
}

static void pack_block(const float *const *rows, int64_t columns, int64_t k, int64_t steps, float *out) {
    for (int64_t c = 0; c < columns;) {
        const float *const *four = rows + c;
        bool whole = c + 4 <= columns && four[0] && four[1] && four[2] && four[3];
        int64_t done = 0;
        for (; whole && done + 4 <= steps; done += 4) {
            transpose_4x4(four, k + done, out + done * columns + c, columns);
        }
        int64_t width = whole ? 4 : 1;
        for (int64_t i = 0; i < width; i++) {
            pack_column(four[i], k + done, steps - done, out + done * columns + c + i, columns);
        }
        c += width;
    }
}

/* Copies whole cache lines around the cache: nothing reads a packed weight soon, and its old lines need not be loaded. */
static void stream_out(float *out, const float *block, int64_t count) {
#if defined(__SSE2__)
    for (int64_t i = 0; i < count; i += 4) {
        _mm_stream_ps(out + i, _mm_load_ps(block + i));
    }
    _mm_sfence();
#else
    memcpy(out, block, (size_t)count * sizeof(float));
#endif
}

static void pack_panel(const tw_packing *p, int64_t expert, int64_t panel, float *out) {
    const float *rows[TW_MAX_COLUMNS];
    _Alignas(64) float block[BLOCK_FLOATS];
    rows_of_panel(p, expert, panel, rows);
    int64_t most = BLOCK_FLOATS / p->columns;
    for (int64_t k = 0; k < p->k; k += most) {
        int64_t steps = p->k - k < most ? p->k - k : most;
        float *to = out + k * p->columns;
        if ((uintptr_t)to % 16 == 0 && steps * p->columns % 4 == 0) {
            pack_block(rows, p->columns, k, steps, block);
            stream_out(to, block, steps * p->columns);
        } else {
            pack_block(rows, p->columns, k, steps, to);
        }
    }
}

static int64_t rows_of_words(const tw_packing *p) {
    int64_t steps = tw_steps_per_word(p->element), groups = p->k / p->group;
    int64_t scale_rows = p->scales_per_row ? (groups + p->scales_per_row - 1) / p->scales_per_row : 0;
    return groups * ((p->group + steps - 1) / steps) + scale_rows;
}

/* Group by group over all columns, so that the rows that are written stay in the first-level cache. */
static bool quantise_panel(const tw_packing *p, int64_t expert, int64_t panel, uint32_t *out) {
    const float *rows[TW_MAX_COLUMNS];
    rows_of_panel(p, expert, panel, rows);
    int64_t steps = tw_steps_per_word(p->element);
    int64_t group_words = (p->group + steps - 1) / steps * p->columns;
    uint32_t *scales = NULL;
    for (int64_t g = 0; g * p->group < p->k; g++, out += group_words) {
        int64_t place = p->scales_per_row ? g % p->scales_per_row : 0;
        if (p->scales_per_row && place == 0) {
            scales = out;
            memset(scales, 0, (size_t)p->columns * sizeof *scales);
            out += p->columns;
        }
        for (int64_t c = 0; c < p->columns; c++) {
            uint32_t scale = 0;
            if (rows[c] == NULL) {
                for (int64_t at = c; at < group_words; at += p->columns) {
                    out[at] = 0;
                }
            } else if (!tw_quantise(p->element, rows[c] + g * p->group, p->group, out + c, p->columns, &scale)) {
                return false;
            }
            if (scales != NULL) {
                scales[c] |= scale << (32 / p->scales_per_row * place);
            }
        }
    }
    return true;
}

static void pack_panels(void *data) {
    pack_job *job = data;
    const tw_packing *p = job->packing;
    int64_t count = p->experts * job->panels;
    for (int64_t i; !job->refused && (i = atomic_fetch_add(&job->next, 1)) < count;) {
        uint32_t *out = (uint32_t *)p->packed + i * job->panel_rows * p->columns;
        if (p->element == TW_FP32) {
            pack_panel(p, i / job->panels, i % job->panels, (float *)out);
        } else if (!quantise_panel(p, i / job->panels, i % job->panels, out)) {
            job->refused = true;
        }
    }
}

/* Ask for large pages before memory is touched: fewer page faults now, fewer TLB misses in every kernel later. */
static void prefer_huge_pages(void *memory, int64_t count) {
#if defined(MADV_HUGEPAGE)
    uintptr_t begin = ((uintptr_t)memory + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    uintptr_t end = ((uintptr_t)memory + (uintptr_t)count * sizeof(float)) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if (begin < end) {
        madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* advice: nothing depends on its success */
    }
#else
    (void)memory, (void)count;
#endif
}

bool tw_pack(const tw_packing *packing, int threads) {
    int64_t half_rows = packing->n / packing->halves;
    int64_t runs = (half_rows + packing->run - 1) / packing->run * packing->halves;
    int64_t panels = (runs * packing->run + packing->columns - 1) / packing->columns;
    pack_job job = {packing, panels, rows_of_words(packing), 0, false};
    prefer_huge_pages(packing->packed, packing->experts * panels * job.panel_rows * packing->columns);
    tw_fork_fn fork = tw_fork();
    if (fork != NULL && threads > 1) {
        fork(pack_panels, &job, (unsigned)threads, 0);
    } else {
        pack_panels(&job);
    }
    return !job.refused;
}
