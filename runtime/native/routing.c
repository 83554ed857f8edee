#include <features.h>

#include "routing.h"

#include <math.h>
#include <string.h>

#include "values.h"

#define LANES 8

static inline int64_t id_at(const void *ids, bool wide, int64_t i) {
    return wide ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];
}

int64_t tw_sort_tokens(const void *ids, bool wide, int64_t tokens, int64_t top_k, int64_t experts, int32_t *row_token,
                       int32_t *expert_offsets, int32_t *slot_row) {
    int64_t picks = tokens * top_k;
    memset(expert_offsets, 0, (size_t)(experts + 1) * sizeof(int32_t));
    /* Counts stand two places up, so that after summing expert e's entry e + 1 is where its rows begin ... */
    int32_t *next_row = expert_offsets + 1;
    for (int64_t i = 0; i < picks; i++) {
        int64_t expert = id_at(ids, wide, i);
        if (expert < -1 || expert >= experts) {
            return -1;
        }
        if (expert >= 0 && expert + 1 < experts) {
            next_row[expert + 1]++;
        }
    }
    for (int64_t e = 1; e < experts; e++) {
        next_row[e] += next_row[e - 1];
    }
    /* ... and after all rows are given out, where they end. */
    int64_t slot = 0;
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t j = 0; j < top_k; j++, slot++) {
            int64_t expert = id_at(ids, wide, slot);
            if (expert < 0) {
                slot_row[slot] = -1;
                continue;
            }
            int32_t row = next_row[expert]++;
            row_token[row] = (int32_t)token;
            slot_row[slot] = row;
        }
    }
    return expert_offsets[experts];
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* e^x for x <= 0 to about 1e-7, 0 below -87. Free of branches, so that it vectorises: among negative floats, the bits of
 * a smaller one are the larger integer. */
static inline float exp_of_negative(float x) {
    const uint32_t lowest = 0xc2ae0000u; /* -87 */
    uint32_t bits = bits_of(x);
    uint32_t kept = bits <= lowest ? UINT32_MAX : 0;
    float clamped = float_of(bits <= lowest ? bits : lowest);
    /* x = n ln 2 + r: adding 1.5 * 2^23 rounds to the nearest n, ln 2 in two parts keeps r exact. */
    float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    return float_of(bits_of(p * float_of((uint32_t)((int32_t)n + 127) << 23)) & kept);
}

/* Sum of e^(logits - largest). */
static TW_WIDEST float sum_of_exponentials(const float *logits, int64_t count, float largest) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            lanes[l] += exp_of_negative(logits[i + l] - largest);
        }
    }
    float sum = 0.0f;
    for (; i < count; i++) {
        sum += exp_of_negative(logits[i] - largest);
    }
    for (int l = 0; l < LANES; l++) {
        sum += lanes[l];
    }
    return sum;
}

/* Keeps the top_k largest, sorted, by insertion. False when a logit is NaN. */
static bool pick_largest(const float *logits, int64_t experts, int64_t top_k, int32_t *ids, float *values) {
    bool ordered = true;
    int64_t held = 0;
    for (int64_t e = 0; e < experts; e++) {
        float value = logits[e];
        ordered &= value == value;
        if (held == top_k && !(value > values[held - 1])) {
            continue;
        }
        int64_t at = held < top_k ? held++ : held - 1;
        for (; at > 0 && value > values[at - 1]; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = value;
        ids[at] = (int32_t)e;
    }
    return ordered;
}

int64_t tw_softmax_topk(const float *logits, int64_t row_stride, int64_t tokens, int64_t experts, int64_t top_k,
                        bool renormalize, int32_t *topk_ids, float *topk_weights) {
    for (int64_t token = 0; token < tokens; token++) {
        const float *row = logits + token * row_stride;
        int32_t *ids = topk_ids + token * top_k;
        float *weights = topk_weights + token * top_k;
        if (!pick_largest(row, experts, top_k, ids, weights) || !isfinite(weights[0])) {
            return token;
        }
        float largest = weights[0];
        float total = renormalize ? sum_of_exponentials(weights, top_k, largest)
                                  : sum_of_exponentials(row, experts, largest);
        for (int64_t j = 0; j < top_k; j++) {
            weights[j] = exp_of_negative(weights[j] - largest) / total;
        }
    }
    return -1;
}
