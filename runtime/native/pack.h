/* Weights into panels (codegen/layouts.py). */
#ifndef TILEWRIGHT_PACK_H
#define TILEWRIGHT_PACK_H

#include <stdint.h>

enum { TW_MAX_COLUMNS = 1024 };

/* fp32 weights [experts, n, k], the last dimension contiguous, and the panels that they become. */
typedef struct {
    const float *weight;
    int64_t expert_stride, row_stride; /* in elements */
    int64_t experts, n, k;
    int64_t columns, halves, run; /* of the layout; run is never 0 here */
    float *packed;                /* [experts, panels, k, columns] */
} tw_packing;

/* Packs on up to `threads` threads of the pool. */
void tw_pack(const tw_packing *packing, int threads);

#endif
