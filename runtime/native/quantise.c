#include "quantise.h"

#include <string.h>

/* Elements that are held between rounding and packing; a multiple of the steps of every word. */
#define CHUNK 128
/* 2^126: larger weights, infinities and NaN are refused, so that no sum or scale overflows. */
#define TOO_LARGE 0x7e800000
/* 2^-100: groups whose largest weight is smaller are zero, so that no reciprocal overflows. */
#define TINY 0x1p-100f

typedef uint32_t __attribute__((may_alias)) bits32;

static const int STEPS[TW_ELEMENTS] = {1, 2, 4, 4, 8, 8};

int64_t tw_steps_per_word(tw_element element) {
    return STEPS[element];
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

/* To the nearest whole number, ties to even, for |value| < 2^22. */
static inline float nearest(float value) {
    return (value + 12582912.0f) - 12582912.0f;
}

/* The upper half of an fp32, rounded to nearest even; bits of the result are in the upper half again. */
static inline uint32_t nearest_bf16(uint32_t bits) {
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

static inline float clamped(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

/* Bits of the largest magnitude, which order like the magnitudes themselves. */
static uint32_t largest(const float *weights, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(((const bits32 *)weights)[i] & 0x7fffffff);
        most = magnitude > most ? magnitude : most;
    }
    return (uint32_t)most;
}

static void encode_bf16(const float *weights, int64_t count, uint32_t *codes) {
    for (int64_t i = 0; i < count; i++) {
        codes[i] = nearest_bf16(((const bits32 *)weights)[i]) >> 16;
    }
}

static void encode_int8(const float *weights, int64_t count, float inverse, uint32_t *codes) {
    for (int64_t i = 0; i < count; i++) {
        codes[i] = (uint32_t)(int32_t)nearest(weights[i] * inverse) & 0xff;
    }
}

static void encode_int4(const float *weights, int64_t count, float inverse, float offset, uint32_t *codes) {
    for (int64_t i = 0; i < count; i++) {
        codes[i] = (uint32_t)(int32_t)clamped(nearest((weights[i] - offset) * inverse), -8.0f, 7.0f) & 0xf;
    }
}

static void encode_e4m3(const float *weights, int64_t count, float inverse, uint32_t *codes) {
    for (int64_t i = 0; i < count; i++) {
        float value = weights[i] * inverse;
        uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
        /* Of the fp32, four bits of exponent and three of mantissa are kept; below 2^-6 there are steps of 2^-9. */
        uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
        uint32_t subnormal = (uint32_t)(int32_t)nearest(clamped(float_of(magnitude) * 512.0f, 0.0f, 8.0f));
        uint32_t code = magnitude < 0x3c800000 ? subnormal : normal;
        /* Zeros have no sign: AMD's e4m3 has NaN where -0 would be. */
        codes[i] = code == 0 ? 0 : code | (bits >> 24 & 0x80);
    }
}

static void encode_e2m1(const float *weights, int64_t count, float inverse, uint32_t *codes) {
    for (int64_t i = 0; i < count; i++) {
        float value = weights[i] * inverse;
        uint32_t bits = bits_of(value);
        float a = float_of(bits & 0x7fffffff);
        /* Halfway between two elements, the one with an even code is taken. */
        codes[i] = (uint32_t)((a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) +
                              (a > 5.0f)) |
                   (bits >> 28 & 8);
    }
}

/* Scale and offset of a group of int4 elements, as the bits of a bf16 pair, and the reciprocal of the scale. */
static uint32_t choose_range(const float *weights, int64_t count, float *inverse, float *offset) {
    static const float SHRINK[4][2] = {{1.0f, 1.0f}, {0.9f, 1.0f}, {1.0f, 0.9f}, {0.9f, 0.9f}};
    float low = weights[0], high = weights[0], least = 0.0f;
    for (int64_t i = 1; i < count; i++) {
        low = weights[i] < low ? weights[i] : low;
        high = weights[i] > high ? weights[i] : high;
    }
    uint32_t pair = 0;
    for (int trial = 0; trial < 4; trial++) {
        float first = low * SHRINK[trial][0], last = high * SHRINK[trial][1];
        uint32_t scale_bits = nearest_bf16(bits_of((last - first) / 15.0f));
        float scale = float_of(scale_bits);
        scale = scale < TINY ? 0.0f : scale;
        float each = scale == 0.0f ? 0.0f : 1.0f / scale;
        uint32_t offset_bits = nearest_bf16(bits_of(first + 8.0f * scale));
        float middle = float_of(offset_bits);
        float errors[4] = {0.0f}; /* four sums, so that vectors add them up in this very order */
        for (int64_t i = 0; i < count; i += 4) {
            for (int lane = 0; lane < 4; lane++) {
                float weight = weights[i + lane];
                float element = clamped(nearest((weight - middle) * each), -8.0f, 7.0f);
                float error = (scale * element + middle) - weight;
                errors[lane] += error * error;
            }
        }
        float error = (errors[0] + errors[1]) + (errors[2] + errors[3]);
        if (trial == 0 || error < least) {
            least = error;
            *inverse = each;
            *offset = middle;
            pair = offset_bits | bits_of(scale) >> 16;
        }
    }
    return pair;
}

static void pack_words(const uint32_t *codes, int64_t count, int steps, uint32_t *words, int64_t stride) {
    int bits = 32 / steps;
    for (int64_t i = 0; i < count; i += steps) {
        int64_t here = count - i < steps ? count - i : steps;
        uint32_t word = 0;
        for (int64_t t = 0; t < here; t++) {
            word |= codes[i + t] << (bits * t);
        }
        words[i / steps * stride] = word;
    }
}

bool tw_quantise(tw_element element, const float *weights, int64_t count, uint32_t *words, int64_t stride,
                 uint32_t *scale) {
    uint32_t most = largest(weights, count);
    if (most >= TOO_LARGE) {
        return false;
    }
    float range = float_of(most), inverse = 0.0f, offset = 0.0f;
    bool zero = range < TINY;
    if (element == TW_INT8 || element == TW_FP8_E4M3) {
        float top = element == TW_INT8 ? 127.0f : 448.0f;
        *scale = zero ? 0 : bits_of(range / top);
        inverse = zero ? 0.0f : top / range;
    } else if (element == TW_INT4) {
        *scale = choose_range(weights, count, &inverse, &offset);
    } else if (element == TW_FP4_E2M1) {
        uint32_t exponent = most >> 23;
        exponent = exponent < 3 ? 1 : exponent - 2; /* the largest element, 6, has the exponent 2 */
        *scale = exponent;
        inverse = float_of((254 - exponent) << 23);
    }
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        uint32_t codes[CHUNK];
        int64_t here = count - begin < CHUNK ? count - begin : CHUNK;
        const float *from = weights + begin;
        switch (element) {
            case TW_INT8: encode_int8(from, here, inverse, codes); break;
            case TW_FP8_E4M3: encode_e4m3(from, here, inverse, codes); break;
            case TW_INT4: encode_int4(from, here, inverse, offset, codes); break;
            case TW_FP4_E2M1: encode_e2m1(from, here, inverse, codes); break;
            default: encode_bf16(from, here, codes);
        }
        pack_words(codes, here, STEPS[element], words + begin / STEPS[element] * stride, stride);
    }
    return true;
}
