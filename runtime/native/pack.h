/* Weights into panels (codegen/numbers/layouts.py). */
#ifndef TILEWRIGHT_PACK_H
#define TILEWRIGHT_PACK_H

#include <stdbool.h>
#include <stdint.h>

#include "quantise.h"

enum { TW_MAX_COLUMNS = 1024 };

/* fp32 weights [experts, n, k], the last dimension contiguous, and the panels that they become. */
typedef struct {
    const float *weight;
    int64_t expert_stride, row_stride; /* in elements */
    int64_t experts, n, k;
    int64_t columns, halves, run; /* of the layout; run is never 0 here */
    tw_element element;
    int64_t group;          /* steps of k that share a scale, dividing k; k for those that have none */
    int64_t scales_per_row; /* groups whose scales share a row of words; 0: no scales */
    void *packed;           /* words [experts, panels, rows, columns] */
} tw_packing;

/* Packs on up to `threads` threads of the pool. False: a weight that was to be quantised is not finite, or too large. */
bool tw_pack(const tw_packing *packing, int threads);

#endif
