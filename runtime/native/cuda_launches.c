#include "cuda_launches.h"

#include <string.h>

#define FAULTY_BIT (1ull << 21)
#define SMALL_BYTES (128ull << 10)
enum { NOT_INTERLEAVED = 0, ZEROS_OUTSIDE = 0 };

static int enter(const tw_cuda_place *place, void **before) {
    int code = place->driver.get_context(before);
    return code != 0 || *before == place->context ? code : place->driver.set_context(place->context);
}

static void leave(const tw_cuda_place *place, void *before) {
    if (before != place->context) {
        place->driver.set_context(before);
    }
}

/* The map of what begins at `address`, encoded unless it is the one that was made last. The maps of a binding are read
 * and written with the GIL; launches use copies. */
static bool encode(const tw_cuda_place *place, tw_map *map, int64_t address, const int64_t *shape, tw_tensor_map *made) {
    if (map->made && map->made_at == address && memcmp(map->made_shape, shape, sizeof(int64_t) * map->rank) == 0) {
        *made = map->last;
        return true;
    }
    uint64_t lengths[TW_MAX_MAP_RANK], strides[TW_MAX_MAP_RANK], bytes = map->element_bytes;
    uint32_t box[TW_MAX_MAP_RANK], steps[TW_MAX_MAP_RANK];
    for (int i = 0; i < map->rank; i++) { /* the driver wants the fastest dimension first */
        int from = map->rank - 1 - i;
        lengths[i] = (uint64_t)shape[from];
        box[i] = map->box[from];
        steps[i] = 1;
        if (__builtin_mul_overflow(bytes, lengths[i], &bytes)) {
            return false;
        }
        strides[i] = bytes; /* the last is not read */
    }
    void *before;
    if (enter(place, &before) != 0) {
        return false;
    }
    int code = place->driver.encode_map(made, map->data_type, (uint32_t)map->rank, (void *)(intptr_t)address, lengths,
                                        strides, box, steps, NOT_INTERLEAVED, map->swizzle, map->l2_promotion,
                                        ZEROS_OUTSIDE);
    leave(place, before);
    if (code != 0) {
        return false;
    }
    if (place->mends_small_maps && bytes < SMALL_BYTES) {
        made->words[1] &= ~FAULTY_BIT;
    }
    map->made_at = address;
    memcpy(map->made_shape, shape, sizeof(int64_t) * map->rank);
    map->last = *made;
    map->made = true;
    return true;
}

/* Where the parameters of a launch are being filled in. */
typedef struct {
    const tw_grid *grid;
    tw_ready_launch *ready;
    int count, map_count;
} filling;

static bool add_number(filling *f, int64_t value) {
    if (f->count == f->grid->parameter_count) {
        return false;
    }
    int bits = 8 * f->grid->parameter_bytes[f->count];
    if (bits < 64 && (value < -(1ll << (bits - 1)) || value >= 1ll << (bits - 1))) {
        return false;
    }
    f->ready->values[f->count] = value; /* of which a smaller parameter takes the low bytes: little-endian */
    f->ready->pointers[f->count] = &f->ready->values[f->count];
    f->count++;
    return true;
}

static bool add_map(const tw_cuda_place *place, filling *f, tw_map *map, int64_t address, const tw_frame *frame) {
    int64_t shape[TW_MAX_MAP_RANK], stride = 1, strides[TW_MAX_MAP_RANK];
    if (f->count == f->grid->parameter_count || f->map_count == TW_MAX_MAPS) {
        return false;
    }
    for (int i = 0; i < map->rank; i++) {
        if (!tw_evaluate(&map->shape[i], frame->symbols, &shape[i]) || shape[i] < 0 || shape[i] > INT32_MAX) {
            return false;
        }
    }
    for (int i = map->rank - 1; i >= 0; i--) {
        strides[i] = stride;
        if (__builtin_mul_overflow(stride, shape[i], &stride)) {
            return false;
        }
    }
    tw_tensor_map *made = &f->ready->maps[f->map_count++];
    f->ready->pointers[f->count++] = made;
    if (!f->ready->empty && !encode(place, map, address, shape, made)) {
        return false;
    }
    for (int i = 0; i < map->rank; i++) {
        if (!add_number(f, shape[i])) {
            return false;
        }
    }
    for (int i = 0; i < map->rank; i++) {
        if (!add_number(f, strides[i])) {
            return false;
        }
    }
    return true;
}

static bool counts_of(const tw_program *programs, const tw_frame *frame, int64_t least, uint32_t *counts) {
    for (int i = 0; i < 3; i++) {
        int64_t count;
        if (!tw_evaluate(&programs[i], frame->symbols, &count) || count < least || count > INT32_MAX) {
            return false;
        }
        counts[i] = (uint32_t)count;
    }
    return true;
}

static bool fill(const tw_cuda_place *place, const tw_launch *launch, const tw_frame *frame, const tw_ready_call *call,
                 tw_ready_launch *ready) {
    const tw_grid *grid = launch->grid;
    tw_launch_config *config = &ready->config;
    if (!counts_of(grid->blocks, frame, 0, config->grid) || !counts_of(grid->threads, frame, 1, config->block)) {
        return false;
    }
    config->shared_bytes = grid->shared_bytes;
    config->stream = call->stream;
    config->attributes = grid->attributes;
    config->attribute_count = (uint32_t)grid->attribute_count;
    ready->function = (void *)launch->entry;
    ready->empty = config->grid[0] == 0 || config->grid[1] == 0 || config->grid[2] == 0;
    filling f = {grid, ready, 0, 0};
    for (int i = 0; i < launch->argument_count; i++) {
        const tw_argument *argument = &launch->arguments[i];
        int64_t value;
        if (!tw_argument_value(argument, frame, call->workspace, call->workspace_bytes, &value) ||
            !(argument->map != NULL ? add_map(place, &f, argument->map, value, frame) : add_number(&f, value))) {
            return false;
        }
    }
    for (int i = 0; i < grid->hidden; i++) {
        if (!add_number(&f, 0)) {
            return false;
        }
    }
    return f.count == grid->parameter_count;
}

bool tw_make_ready(const tw_cuda_place *place, const tw_frame *frame, tw_ready_call *ready) {
    const tw_variant *variant = frame->variant;
    if (variant->launch_count > TW_MAX_CUDA_LAUNCHES) {
        return false;
    }
    ready->zeroes = variant->workspace_zeroed && ready->workspace_bytes > 0;
    ready->count = variant->launch_count;
    for (int i = 0; i < variant->launch_count; i++) {
        if (!fill(place, &variant->launches[i], frame, ready, &ready->launches[i])) {
            return false;
        }
    }
    return true;
}

int tw_enqueue(const tw_cuda_place *place, const tw_ready_call *ready, int *failed) {
    void *before;
    *failed = -1;
    int code = enter(place, &before);
    if (code != 0) {
        return code;
    }
    if (ready->zeroes) {
        code = place->driver.set_bytes((uint64_t)ready->workspace, 0, (size_t)ready->workspace_bytes, ready->stream);
    }
    for (int i = 0; i < ready->count && code == 0; i++) {
        const tw_ready_launch *launch = &ready->launches[i];
        if (!launch->empty) {
            *failed = i;
            code = place->driver.launch(&launch->config, launch->function, (void **)launch->pointers, NULL);
        }
    }
    leave(place, before);
    return code;
}
