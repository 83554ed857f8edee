/* Weights into elements of few bits and their scales (codegen/numbers/precisions.py); runtime/weights/quantising.py gives the same bits. */
#ifndef TILEWRIGHT_QUANTISE_H
#define TILEWRIGHT_QUANTISE_H

#include <stdbool.h>
#include <stdint.h>

/* fp32 is not quantised: a word is a weight. */
typedef enum { TW_FP32, TW_BF16, TW_INT8, TW_FP8_E4M3, TW_INT4, TW_FP4_E2M1, TW_ELEMENTS } tw_element;

/* Steps of k in a word of 32 bits. */
int64_t tw_steps_per_word(tw_element element);

/* Quantises `count` weights that share a scale. Words are written `stride` apart, the last one padded with zeros; the
 * scale (bits of an fp32, a bf16 pair, or an exponent) goes to *scale. False: a weight is not finite, or too large. */
bool tw_quantise(tw_element element, const float *weights, int64_t count, uint32_t *words, int64_t stride,
                 uint32_t *scale);

#endif
