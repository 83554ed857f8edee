#include "frame.h"

bool tw_unwrap(const tw_description *d, PyObject *const *args, tw_frame *frame) {
    for (int i = 0; i < d->tensor_count; i++) {
        bool present = args[i] != Py_None;
        frame->types[i] = present ? tw_read_tensor(args[i], &frame->tensors[i]) : NULL;
        if (frame->types[i] == NULL && (present || !d->tensors[i].optional)) {
            return false;
        }
    }
    return true;
}

static bool is_torch(const tw_frame *frame, int i) { return frame->types[i] != NULL && frame->types[i]->is_torch; }

bool tw_grad_is_off(const tw_description *d, PyObject *const *args, const tw_frame *frame) {
    /* Runs of tensors at once: most calls are one. */
    for (int i = 0, first = 0; i <= d->tensor_count; i++) {
        if (i == d->tensor_count || !is_torch(frame, i)) {
            if (i > first && tw_needs_grad(args + first, i - first)) {
                return false;
            }
            first = i + 1;
        }
    }
    return true;
}

static bool shape_fits(const tw_tensor_rule *rule, const DLTensor *tensor, int64_t *symbols) {
    if (tensor->ndim != rule->ndim) {
        return false;
    }
    for (int d = 0; d < rule->ndim; d++) {
        int64_t expected = rule->dims[d], size = tensor->shape[d];
        if (expected < 0) {
            int64_t *symbol = &symbols[-1 - expected];
            if (*symbol < 0) {
                *symbol = size;
            }
            expected = *symbol;
        }
        if (size != expected) {
            return false;
        }
    }
    return true;
}

bool tw_metadata_fits(const tw_description *d, tw_frame *frame) {
    for (int s = 0; s < d->symbol_count; s++) {
        frame->symbols[s] = -1;
    }
    frame->symbols[d->place_symbol] = d->place_value;
    for (int i = 0; i < d->tensor_count; i++) {
        const tw_tensor_rule *rule = &d->tensors[i];
        const DLTensor *tensor = &frame->tensors[i];
        if (frame->types[i] == NULL) {
            continue;
        }
        if (tensor->device.device_type != d->device_type || tensor->device.device_id != d->device_id ||
            tensor->dtype.code != rule->code || tensor->dtype.bits != rule->bits || tensor->dtype.lanes != 1 || !shape_fits(rule, tensor, frame->symbols) ||
            !tw_is_dense(tensor)) {
            return false;
        }
        frame->elements[i] = tw_elements(tensor);
        if (frame->elements[i] > 0 && tensor->data == NULL) {
            return false;
        }
    }
    return true;
}

static tw_range range_of(const tw_frame *frame, int i) {
    uintptr_t begin = (uintptr_t)frame->tensors[i].data;
    return (tw_range){begin, begin + (uintptr_t)frame->elements[i] * (frame->tensors[i].dtype.bits / 8u)};
}

static bool overlap(tw_range a, tw_range b) { return a.begin < b.end && b.begin < a.end; }

bool tw_outputs_are_apart(const tw_description *d, const tw_frame *frame) {
    for (int o = 0; o < d->output_count; o++) {
        tw_range output = range_of(frame, d->outputs[o]);
        for (int i = 0; i < d->tensor_count; i++) {
            if (i != d->outputs[o] && frame->types[i] != NULL && overlap(output, range_of(frame, i))) {
                return false;
            }
        }
        for (int i = 0; i < d->range_count; i++) {
            if (overlap(output, d->ranges[i])) {
                return false;
            }
        }
    }
    return true;
}

bool tw_outputs_are_empty(const tw_description *d, const tw_frame *frame) {
    int64_t elements = 0;
    for (int o = 0; o < d->output_count; o++) {
        elements += frame->elements[d->outputs[o]];
    }
    return elements == 0;
}

PyObject *tw_outputs_of(const tw_description *d, PyObject *const *args) {
    if (d->output_count == 1) {
        return Py_NewRef(args[d->outputs[0]]);
    }
    PyObject *tuple = PyTuple_New(d->output_count);
    for (int o = 0; o < d->output_count && tuple != NULL; o++) {
        PyTuple_SET_ITEM(tuple, o, Py_NewRef(args[d->outputs[o]]));
    }
    return tuple;
}

static inline int64_t address_of(const tw_frame *frame, int64_t i) {
    return frame->types[i] != NULL ? (int64_t)(intptr_t)frame->tensors[i].data : 0;
}

bool tw_guards_hold(const tw_guard *guards, int count, const tw_frame *frame) {
    for (int g = 0; g < count; g++) {
        int64_t value;
        if (!tw_evaluate(&guards[g].expression, frame->symbols, &value) || value % guards[g].multiple != 0) {
            return false;
        }
    }
    return true;
}

bool tw_choose(const tw_description *d, tw_frame *frame) {
    int64_t size = frame->symbols[d->dynamic_symbol];
    int v = 0;
    while (v < d->variant_count && d->variants[v].max_size < size) {
        v++;
    }
    if (v == d->variant_count || d->variants[v].launch_count == 0) {
        return false;
    }
    frame->variant = &d->variants[v];
    if (frame->variant->guards_read_addresses) {
        for (int i = 0; i < d->tensor_count; i++) {
            frame->symbols[d->symbol_count + i] = address_of(frame, i);
        }
    }
    return tw_guards_hold(frame->variant->guards, frame->variant->guard_count, frame);
}

bool tw_workspace_fits(const tw_description *d, tw_frame *frame, int64_t workspace) {
    const tw_variant *variant = frame->variant;
    if (variant->workspace_guard_count == 0) {
        return true;
    }
    frame->symbols[d->symbol_count + d->tensor_count] = workspace;
    return tw_guards_hold(variant->workspace_guards, variant->workspace_guard_count, frame);
}

/* Moves an address by the argument's offset, which is at most `most`. */
static inline bool add_offset(const tw_argument *argument, const tw_frame *frame, int64_t most, int64_t *address) {
    int64_t offset;
    if (argument->program.length == 0) { /* most arguments are addresses as they are */
        return true;
    }
    if (!tw_evaluate(&argument->program, frame->symbols, &offset)) {
        return false;
    }
    return offset >= 0 && offset <= most && !__builtin_add_overflow(*address, offset, address);
}

bool tw_argument_value(const tw_argument *argument, const tw_frame *frame, int64_t workspace, int64_t bytes,
                       int64_t *value) {
    switch (argument->kind) {
    case TW_POSITIONAL:
        *value = address_of(frame, argument->value);
        return add_offset(argument, frame, INT64_MAX, value);
    case TW_ADDRESS:
        *value = argument->value;
        return add_offset(argument, frame, INT64_MAX, value);
    case TW_WORKSPACE:
        *value = workspace;
        return add_offset(argument, frame, bytes, value);
    default:
        return tw_evaluate(&argument->program, frame->symbols, value);
    }
}
