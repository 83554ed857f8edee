#include <features.h>

#include "norm.h"

#include <math.h>

#include "values.h"

#define LANES 16

static TW_WIDEST void norm_row(const float *x, const float *weight, float epsilon, int64_t n, float *out) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            lanes[l] += x[i + l] * x[i + l];
        }
    }
    float sum = 0.0f;
    for (; i < n; i++) {
        sum += x[i] * x[i];
    }
    for (int l = 0; l < LANES; l++) {
        sum += lanes[l];
    }
    float factor = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (i = 0; i < n; i++) {
        out[i] = x[i] * factor * weight[i];
    }
}

void tw_rms_norm(const float *x, const float *weight, float epsilon, int64_t rows, int64_t n, float *out) {
    for (int64_t row = 0; row < rows; row++) {
        norm_row(x + row * n, weight, epsilon, n, out + row * n);
    }
}
