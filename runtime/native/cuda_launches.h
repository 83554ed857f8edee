/* The launches of one call on a CUDA device, made ready and enqueued; the twin of runtime/launchers/cuda/kernel.py. */
#ifndef TILEWRIGHT_CUDA_LAUNCHES_H
#define TILEWRIGHT_CUDA_LAUNCHES_H

#include "frame.h"

enum { TW_MAX_CUDA_LAUNCHES = 8, TW_MAX_MAPS = 8 };

/* Where a binding launches. */
typedef struct {
    tw_cuda_driver driver;
    void *context;        /* the device's primary one */
    bool mends_small_maps; /* see runtime/launchers/cuda/tensor_maps.py */
} tw_cuda_place;

/* One launch: `pointers` are the parameters' addresses in `values` and `maps`. */
typedef struct {
    _Alignas(64) tw_tensor_map maps[TW_MAX_MAPS];
    int64_t values[TW_MAX_PARAMETERS];
    void *pointers[TW_MAX_PARAMETERS];
    tw_launch_config config;
    void *function;
    bool empty;
} tw_ready_launch;

typedef struct {
    void *stream;
    int64_t workspace, workspace_bytes;
    bool zeroes;
    int count;
    tw_ready_launch launches[TW_MAX_CUDA_LAUNCHES];
} tw_ready_call;

/* Fill in the launches; stream and workspace are there. With the GIL. False: the twin must look at it. */
bool tw_make_ready(const tw_cuda_place *place, const tw_frame *frame, tw_ready_call *ready);

/* Enqueue all of them, each after the one before. Returns 0, or the driver's error, with the launch that it is of in
 * `failed` (-1: what comes before all launches). */
int tw_enqueue(const tw_cuda_place *place, const tw_ready_call *ready, int *failed);

#endif
