/* One call of a binding: what it was given, checked against the description. What all kinds of calls share. */
#ifndef TILEWRIGHT_FRAME_H
#define TILEWRIGHT_FRAME_H

#include "description.h"
#include "tensors.h"

typedef struct {
    DLTensor tensors[TW_MAX_TENSORS];
    const tw_tensor_type *types[TW_MAX_TENSORS]; /* NULL: absent */
    int64_t elements[TW_MAX_TENSORS];
    int64_t symbols[TW_MAX_GUARD_SYMBOLS];
    const tw_variant *variant;
} tw_frame;

/* Steps of a call, in order. False: the twin must look at it. */
bool tw_unwrap(const tw_description *d, PyObject *const *args, tw_frame *frame);
bool tw_grad_is_off(const tw_description *d, PyObject *const *args, const tw_frame *frame);
bool tw_metadata_fits(const tw_description *d, tw_frame *frame);
bool tw_outputs_are_apart(const tw_description *d, const tw_frame *frame);
bool tw_choose(const tw_description *d, tw_frame *frame);

/* Whether all guards hold. */
bool tw_guards_hold(const tw_guard *guards, int count, const tw_frame *frame);

/* Whether those hold that read the address of the workspace. */
bool tw_workspace_fits(const tw_description *d, tw_frame *frame, int64_t workspace);

/* Whether there is nothing to compute. */
bool tw_outputs_are_empty(const tw_description *d, const tw_frame *frame);

/* What a call returns: its output, or the tuple of several. */
PyObject *tw_outputs_of(const tw_description *d, PyObject *const *args);

/* Value of an argument, with a workspace of `bytes` bytes. False: it comes to none. */
bool tw_argument_value(const tw_argument *argument, const tw_frame *frame, int64_t workspace, int64_t bytes,
                       int64_t *value);

#endif
