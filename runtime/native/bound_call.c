/* A bound call: unwrap, check, choose, launch; the twin of codegen/recipe/resolve.py for host_so entries. Anything out of
 * the ordinary goes to the Python twin (runtime/calls/pure.py), which says what is wrong, calls the fallback, or runs the
 * kernel. */
#include "bound_call.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>
#include <time.h>

#include "description.h"
#include "tensors.h"
#include "values.h"
#include "workspace.h"

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *twin;
    tw_description description;
} bound_call;

/* State of one call. */
typedef struct {
    DLTensor tensors[TW_MAX_TENSORS];
    int64_t elements[TW_MAX_TENSORS];
    bool present[TW_MAX_TENSORS];
    int64_t symbols[TW_MAX_GUARD_SYMBOLS];
    const tw_variant *variant;
} call_frame;

static bool unwrap(const tw_description *d, PyObject *const *args, call_frame *frame) {
    for (int i = 0; i < d->tensor_count; i++) {
        frame->present[i] = args[i] != Py_None;
        if (frame->present[i] ? !tw_read_tensor(args[i], &frame->tensors[i]) : !d->tensors[i].optional) {
            return false;
        }
    }
    return true;
}

static bool grad_is_off(const tw_description *d, PyObject *const *args, const call_frame *frame) {
    for (int i = 0; i < d->tensor_count; i++) {
        if (!frame->present[i]) {
            /* Rare enough to ask the twin, which looks at each tensor. */
            return !tw_needs_grad(args, i) && !tw_needs_grad(args + i + 1, d->tensor_count - i - 1);
        }
    }
    return !tw_needs_grad(args, d->tensor_count);
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

static bool metadata_fits(const tw_description *d, call_frame *frame) {
    for (int s = 0; s < d->symbol_count; s++) {
        frame->symbols[s] = -1;
    }
    frame->symbols[d->threads_symbol] = d->threads;
    for (int i = 0; i < d->tensor_count; i++) {
        const tw_tensor_rule *rule = &d->tensors[i];
        const DLTensor *tensor = &frame->tensors[i];
        if (!frame->present[i]) {
            continue;
        }
        if (tensor->device.device_type != kDLCPU || tensor->dtype.code != rule->code ||
            tensor->dtype.bits != rule->bits || tensor->dtype.lanes != 1 || !shape_fits(rule, tensor, frame->symbols) ||
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

static tw_range range_of(const call_frame *frame, int i) {
    uintptr_t begin = (uintptr_t)frame->tensors[i].data;
    return (tw_range){begin, begin + (uintptr_t)frame->elements[i] * (frame->tensors[i].dtype.bits / 8u)};
}

static bool overlap(tw_range a, tw_range b) { return a.begin < b.end && b.begin < a.end; }

static bool outputs_are_apart(const tw_description *d, const call_frame *frame) {
    for (int o = 0; o < d->output_count; o++) {
        tw_range output = range_of(frame, d->outputs[o]);
        for (int i = 0; i < d->tensor_count; i++) {
            if (i != d->outputs[o] && frame->present[i] && overlap(output, range_of(frame, i))) {
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

/* Whether there is nothing to compute. */
static bool outputs_are_empty(const tw_description *d, const call_frame *frame) {
    int64_t elements = 0;
    for (int o = 0; o < d->output_count; o++) {
        elements += frame->elements[d->outputs[o]];
    }
    return elements == 0;
}

/* What a call returns: its output, or the tuple of several. */
static PyObject *outputs_of(const tw_description *d, PyObject *const *args) {
    if (d->output_count == 1) {
        return Py_NewRef(args[d->outputs[0]]);
    }
    PyObject *tuple = PyTuple_New(d->output_count);
    for (int o = 0; o < d->output_count && tuple != NULL; o++) {
        PyTuple_SET_ITEM(tuple, o, Py_NewRef(args[d->outputs[o]]));
    }
    return tuple;
}

/* Whether the values of tensor i keep its rule, whose bound is `end`. */
static bool value_fits(const tw_tensor_rule *rule, const call_frame *frame, int i, int64_t end) {
    const DLTensor *tensor = &frame->tensors[i];
    const void *data = tensor->data;
    int64_t count = frame->elements[i];
    switch (rule->values) {
    case TW_OFFSETS:
        return count > 0 && tw_are_offsets(data, count, end);
    case TW_RISING:
        return count > 0 && tw_are_rising(data, count, end);
    case TW_FINITE:
        return tw_are_finite(data, count);
    case TW_LOGITS:
        return tw_are_logits(data, count, rule->dims[rule->ndim - 1]);
    case TW_LENGTH:
        return tw_are_within(data, count, 1, end + 1);
    case TW_PAGES:
        return tw_are_pages(data, tensor->shape[0], tensor->shape[1], frame->tensors[rule->lengths].data,
                            rule->page_size, end);
    default:
        return tw_are_within(data, count, rule->values == TW_SLOT ? -1 : 0, end);
    }
}

static bool values_fit(const tw_description *d, const call_frame *frame) {
    for (int i = 0; i < d->tensor_count; i++) {
        const tw_tensor_rule *rule = &d->tensors[i];
        int64_t end = 0;
        if (rule->values == TW_ANY || !frame->present[i]) {
            continue;
        }
        if (rule->bound.length > 0 && !tw_evaluate(&rule->bound, frame->symbols, &end)) {
            return false;
        }
        if (!value_fits(rule, frame, i, end)) {
            return false;
        }
    }
    return true;
}

static inline int64_t address_of(const call_frame *frame, int64_t i) {
    return frame->present[i] ? (int64_t)(intptr_t)frame->tensors[i].data : 0;
}

static bool guards_hold(const tw_guard *guards, int count, const call_frame *frame) {
    for (int g = 0; g < count; g++) {
        int64_t value;
        if (!tw_evaluate(&guards[g].expression, frame->symbols, &value) || value % guards[g].multiple != 0) {
            return false;
        }
    }
    return true;
}

static bool choose(const tw_description *d, call_frame *frame) {
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
    return guards_hold(frame->variant->guards, frame->variant->guard_count, frame);
}

/* Moves an address by the argument's offset, which is at most `most`. */
static inline bool add_offset(const tw_argument *argument, const call_frame *frame, int64_t most, int64_t *address) {
    int64_t offset;
    if (argument->program.length == 0) { /* most arguments are addresses as they are */
        return true;
    }
    if (!tw_evaluate(&argument->program, frame->symbols, &offset)) {
        return false;
    }
    return offset >= 0 && offset <= most && !__builtin_add_overflow(*address, offset, address);
}

static bool fill_arguments(const tw_launch *launch, const call_frame *frame, void *workspace, int64_t bytes,
                           int64_t *values) {
    for (int i = 0; i < launch->argument_count; i++) {
        const tw_argument *argument = &launch->arguments[i];
        bool known = true;
        switch (argument->kind) {
        case TW_POSITIONAL:
            values[i] = address_of(frame, argument->value);
            known = add_offset(argument, frame, INT64_MAX, &values[i]);
            break;
        case TW_ADDRESS:
            values[i] = argument->value;
            known = add_offset(argument, frame, INT64_MAX, &values[i]);
            break;
        case TW_WORKSPACE:
            values[i] = (int64_t)(intptr_t)workspace;
            known = add_offset(argument, frame, bytes, &values[i]);
            break;
        case TW_SIZE:
            known = tw_evaluate(&argument->program, frame->symbols, &values[i]);
            break;
        }
        if (!known) {
            return false;
        }
    }
    return true;
}

typedef enum { RAN, NOT_RUN, FAILED } launch_result;

/* Runs all launches without the GIL. FAILED leaves the kernel's code in `code`. */
static launch_result launch(const tw_description *d, call_frame *frame, int32_t *code) {
    const tw_variant *variant = frame->variant;
    int64_t bytes, values[TW_MAX_ARGUMENTS] = {0};
    if (!tw_evaluate(&variant->workspace_bytes, frame->symbols, &bytes) || bytes < 0 ||
        bytes > d->most_workspace_bytes) {
        return NOT_RUN;
    }
    void *workspace = bytes > 0 ? tw_workspace((size_t)bytes) : NULL;
    if (bytes > 0 && workspace == NULL) {
        return NOT_RUN;
    }
    if (variant->workspace_guard_count > 0) {
        frame->symbols[d->symbol_count + d->tensor_count] = (int64_t)(intptr_t)workspace;
        if (!guards_hold(variant->workspace_guards, variant->workspace_guard_count, frame)) {
            return NOT_RUN;
        }
    }
    /* All or nothing: what the twin has to look at must not have run in part. The first is filled right before it runs. */
    for (int i = 1; i < variant->launch_count; i++) {
        if (!fill_arguments(&variant->launches[i], frame, workspace, bytes, values)) {
            return NOT_RUN;
        }
    }
    tw_host host = {TW_ABI_VERSION, d->threads, tw_fork()};
    launch_result result = RAN;
    PyThreadState *state = PyEval_SaveThread();
    if (variant->workspace_zeroed && bytes > 0) {
        memset(workspace, 0, (size_t)bytes);
    }
    for (int i = 0; i < variant->launch_count && result == RAN; i++) {
        const tw_launch *step = &variant->launches[i];
        if (!fill_arguments(step, frame, workspace, bytes, values)) {
            result = NOT_RUN;
        } else if ((*code = step->entry(&host, values)) != 0) {
            result = FAILED;
        }
    }
    PyEval_RestoreThread(state);
    return result;
}

/* Everything before the launch. False: the twin must look at it. */
static bool prepare(const tw_description *d, PyObject *const *args, call_frame *frame) {
    return unwrap(d, args, frame) && grad_is_off(d, args, frame) && metadata_fits(d, frame) &&
           outputs_are_apart(d, frame) && values_fit(d, frame) && choose(d, frame);
}

static PyObject *call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    bound_call *bound = (bound_call *)self;
    const tw_description *d = &bound->description;
    if (PyVectorcall_NARGS(nargsf) == d->tensor_count && keywords == NULL) {
        call_frame frame;
        int32_t code = 0;
        if (prepare(d, args, &frame)) {
            if (outputs_are_empty(d, &frame)) {
                return outputs_of(d, args);
            }
            switch (launch(d, &frame, &code)) {
            case RAN:
                return outputs_of(d, args);
            case FAILED:
                return PyObject_CallMethod(bound->twin, "kernel_failed", "i", code);
            case NOT_RUN:
                break;
            }
        }
    }
    return PyObject_Vectorcall(bound->twin, args, nargsf & ~PY_VECTORCALL_ARGUMENTS_OFFSET, keywords);
}

static double nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* Mean time of `step`, which leaves no trace, in `repeats` runs. */
#define TIME_STAGE(step)                                                                                               \
    do {                                                                                                               \
        double start = nanoseconds();                                                                                  \
        for (Py_ssize_t r = 0; r < repeats && ok; r++) {                                                               \
            ok = (step);                                                                                               \
        }                                                                                                              \
        stage_ns[stage++] = (nanoseconds() - start) / (double)repeats;                                                 \
    } while (0)

static bool release_gil(void) {
    PyEval_RestoreThread(PyEval_SaveThread());
    return true;
}

static PyObject *stage_times(PyObject *self, PyObject *args) {
    const tw_description *d = &((bound_call *)self)->description;
    PyObject *tensors;
    Py_ssize_t repeats;
    if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &tensors, &repeats)) {
        return NULL;
    }
    PyObject *const *items = ((PyTupleObject *)tensors)->ob_item;
    call_frame frame;
    int32_t code;
    if (repeats < 1 || PyTuple_GET_SIZE(tensors) != d->tensor_count || !prepare(d, items, &frame)) {
        PyErr_SetString(PyExc_ValueError, "stage_times needs tensors that the kernel serves, and at least one repeat");
        return NULL;
    }
    double stage_ns[8];
    int stage = 0;
    bool ok = true;
    TIME_STAGE(unwrap(d, items, &frame));
    TIME_STAGE(grad_is_off(d, items, &frame));
    TIME_STAGE(metadata_fits(d, &frame) && outputs_are_apart(d, &frame));
    TIME_STAGE(values_fit(d, &frame));
    TIME_STAGE(choose(d, &frame));
    TIME_STAGE(release_gil());
    TIME_STAGE(launch(d, &frame, &code) == RAN);
    if (!ok) {
        PyErr_SetString(PyExc_RuntimeError, "a stage failed while it was timed");
        return NULL;
    }
    return Py_BuildValue("{s:d,s:d,s:d,s:d,s:d,s:d,s:d}", "unwrap", stage_ns[0], "grad", stage_ns[1], "metadata",
                         stage_ns[2], "values", stage_ns[3], "choose", stage_ns[4], "gil", stage_ns[5], "launch",
                         stage_ns[6] - stage_ns[5]);
}

static PyObject *bound_call_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    PyObject *twin, *tuple;
    static char *names[] = {"twin", "description", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!", names, &twin, &PyTuple_Type, &tuple)) {
        return NULL;
    }
    bound_call *self = (bound_call *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->vectorcall = call;
    self->twin = Py_NewRef(twin);
    if (tw_description_parse(&self->description, tuple) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int bound_call_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(((bound_call *)self)->twin);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* No tp_clear: what a call refers to must stay until nothing can call it. The twin breaks reference cycles. */
static void bound_call_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    tw_description_free(&((bound_call *)self)->description);
    Py_XDECREF(((bound_call *)self)->twin);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *binding_of(PyObject *self, void *Py_UNUSED(closure)) {
    return PyObject_GetAttrString(((bound_call *)self)->twin, "binding");
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(bound_call, vectorcall), READONLY, NULL},
    {"twin", T_OBJECT, offsetof(bound_call, twin), READONLY, "The pure-Python call with the same results."},
    {NULL},
};

static PyGetSetDef properties[] = {
    {"binding", binding_of, NULL, "What the call is made of.", NULL},
    {NULL},
};

static PyMethodDef methods[] = {
    {"stage_times", stage_times, METH_VARARGS,
     "stage_times(tensors, repeats) -> mean nanoseconds of each stage of a call."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "A call bound to its weights and kernels: call it with the remaining tensors, in order."},
    {Py_tp_new, bound_call_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_traverse, bound_call_traverse},
    {Py_tp_dealloc, bound_call_dealloc},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "tilewright.runtime._native.BoundCall",
    .basicsize = sizeof(bound_call),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyObject *tw_bound_call_type(void) { return PyType_FromSpec(&spec); }
