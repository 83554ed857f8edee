/* Checks of a tensor's data, which a kernel relies on for its addresses. */
#ifndef TILEWRIGHT_VALUES_H
#define TILEWRIGHT_VALUES_H

#include <stdbool.h>
#include <stdint.h>

/* GCC's -O2 leaves loops of unknown length scalar. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

/* Runs on the widest vectors of this CPU where the compiler can choose at load time. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define TW_WIDEST __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef TW_WIDEST
#define TW_WIDEST
#endif

/* Starts at 0, never decreases, ends at `end`. `count` is at least 1. */
bool tw_are_offsets(const int32_t *values, int64_t count, int64_t end);

/* Starts at 0, rises with every value, ends at `end`. `count` is at least 1. */
bool tw_are_rising(const int32_t *values, int64_t count, int64_t end);

/* Every value lies in [lowest, end). */
bool tw_are_within(const int32_t *values, int64_t count, int64_t lowest, int64_t end);

/* Of each of `rows` rows of `width` values, the first ones, one for `page_size` of the row's length (rounded up) and at
 * most all of them, lie in [0, end). */
bool tw_are_pages(const int32_t *values, int64_t rows, int64_t width, const int32_t *lengths, int64_t page_size,
                  int64_t end);

/* No value is NaN or infinite. */
bool tw_are_finite(const float *values, int64_t count);

/* No value is NaN or +inf, and every `row` values hold one above -inf. */
bool tw_are_logits(const float *values, int64_t count, int64_t row);

#endif
