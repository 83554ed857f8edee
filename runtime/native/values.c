#include <features.h>

#include "values.h"

#include <math.h>

#define LANES 16

TW_WIDEST bool tw_are_offsets(const int32_t *values, int64_t count, int64_t end) {
    int32_t decreases = 0;
    for (int64_t i = 1; i < count; i++) {
        decreases |= values[i] < values[i - 1];
    }
    return values[0] == 0 && values[count - 1] == end && !decreases;
}

TW_WIDEST bool tw_are_rising(const int32_t *values, int64_t count, int64_t end) {
    int32_t falls = 0;
    for (int64_t i = 1; i < count; i++) {
        falls |= values[i] <= values[i - 1];
    }
    return values[0] == 0 && values[count - 1] == end && !falls;
}

TW_WIDEST bool tw_are_within(const int32_t *values, int64_t count, int64_t lowest, int64_t end) {
    int64_t span = end - lowest;
    if (span <= 0) {
        return count == 0;
    }
    /* One comparison per value: what lies below wraps around to above. */
    int64_t widest = (int64_t)INT32_MAX + 1 - lowest;
    uint32_t limit = (uint32_t)(span < widest ? span : widest), base = (uint32_t)lowest;
    int32_t outside = 0;
    for (int64_t i = 0; i < count; i++) {
        outside |= (uint32_t)values[i] - base >= limit;
    }
    return !outside;
}

bool tw_are_pages(const int32_t *values, int64_t rows, int64_t width, const int32_t *lengths, int64_t page_size,
                  int64_t end) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t used = lengths[row] > 0 ? (lengths[row] - 1) / page_size + 1 : 0;
        if (!tw_are_within(values + row * width, used < width ? used : width, 0, end)) {
            return false;
        }
    }
    return true;
}

/* Over each row: 0 * largest is NaN for an infinity, and a NaN anywhere differs from itself. */
TW_WIDEST bool tw_are_logits(const float *values, int64_t count, int64_t row) {
    int32_t found = 0;
    for (int64_t start = 0; start < count; start += row) {
        const float *logits = values + start;
        float lanes[LANES], largest;
        int64_t i = 0;
        for (int l = 0; l < LANES; l++) {
            lanes[l] = -INFINITY;
        }
        for (; i + LANES <= row; i += LANES) {
            for (int l = 0; l < LANES; l++) {
                found |= logits[i + l] != logits[i + l];
                lanes[l] = logits[i + l] > lanes[l] ? logits[i + l] : lanes[l];
            }
        }
        largest = lanes[0];
        for (int l = 1; l < LANES; l++) {
            largest = lanes[l] > largest ? lanes[l] : largest;
        }
        for (; i < row; i++) {
            found |= logits[i] != logits[i];
            largest = logits[i] > largest ? logits[i] : largest;
        }
        found |= largest * 0.0f != 0.0f;
    }
    return !found;
}

TW_WIDEST bool tw_are_finite(const float *values, int64_t count) {
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        /* 0 times an infinity is NaN, and NaN differs from 0. */
        found |= values[i] * 0.0f != 0.0f;
    }
    return !found;
}
