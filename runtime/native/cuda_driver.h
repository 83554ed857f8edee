/* The part of the CUDA driver that a launch needs: names, values and layouts are those of its API (cuda.h, 12.4 on).
 * The library is opened by runtime/launchers/cuda/driver.py, which hands over addresses. */
#ifndef TILEWRIGHT_CUDA_DRIVER_H
#define TILEWRIGHT_CUDA_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* CUtensorMap, which has to lie at a multiple of 64. */
typedef struct {
    uint64_t words[16];
} tw_tensor_map;

/* CUlaunchAttribute, of whose values launches here use integers alone. */
typedef struct {
    uint32_t id, padding;
    uint32_t value[16];
} tw_launch_attribute;

/* CUlaunchConfig. */
typedef struct {
    uint32_t grid[3], block[3], shared_bytes;
    void *stream;
    const tw_launch_attribute *attributes;
    uint32_t attribute_count;
} tw_launch_config;

/* Functions, each of which returns a CUresult: 0 for success. */
typedef struct {
    int (*get_context)(void **context);
    int (*set_context)(void *context);
    int (*launch)(const tw_launch_config *config, void *function, void **parameters, void **extra);
    int (*encode_map)(tw_tensor_map *map, int data_type, uint32_t rank, void *address, const uint64_t *shape,
                      const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave, int swizzle,
                      int l2_promotion, int outside);
    int (*set_bytes)(uint64_t address, unsigned char value, size_t count, void *stream);
} tw_cuda_driver;

/* Begin to notice forks. Returns 0, or an errno value. */
int tw_cuda_watch_forks(void);

/* Whether this process was forked from one that launched: nothing of CUDA works in it. */
bool tw_cuda_forked(void);

#endif
