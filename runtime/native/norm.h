/* Norms of rows, for the few rows of a decoding step. */
#ifndef TILEWRIGHT_NORM_H
#define TILEWRIGHT_NORM_H

#include <stdint.h>

/* out = x / sqrt(mean(x^2) + epsilon) * weight for each of `rows` rows of `n` values, one after the other in memory. */
void tw_rms_norm(const float *x, const float *weight, float epsilon, int64_t rows, int64_t n, float *out);

#endif
