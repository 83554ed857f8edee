/* A bound call: unwrap, check, choose, launch; the twin of codegen/recipe/resolve.py for host_so entries. Anything out of
 * the ordinary goes to the Python twin (runtime/calls/pure.py), which says what is wrong, calls the fallback, or runs the
 * kernel. */
#include "bound_call.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>

#include "frame.h"
#include "host.h"
#include "stages.h"
#include "values.h"
#include "workspace.h"

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *twin;
    tw_description description;
} bound_call;

/* Whether the values of tensor i keep its rule, whose bound is `end`. */
static bool value_fits(const tw_tensor_rule *rule, const tw_frame *frame, int i, int64_t end) {
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

static bool values_fit(const tw_description *d, const tw_frame *frame) {
    for (int i = 0; i < d->tensor_count; i++) {
        const tw_tensor_rule *rule = &d->tensors[i];
        int64_t end = 0;
        if (rule->values == TW_ANY || frame->types[i] == NULL) {
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

static bool fill_arguments(const tw_launch *launch, const tw_frame *frame, void *workspace, int64_t bytes,
                           int64_t *values) {
    for (int i = 0; i < launch->argument_count; i++) {
        if (!tw_argument_value(&launch->arguments[i], frame, (int64_t)(intptr_t)workspace, bytes, &values[i])) {
            return false;
        }
    }
    return true;
}

typedef enum { RAN, NOT_RUN, FAILED } launch_result;

/* Runs all launches without the GIL. FAILED leaves the kernel's code in `code`. */
static launch_result launch(const tw_description *d, tw_frame *frame, int32_t *code) {
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
    if (!tw_workspace_fits(d, frame, (int64_t)(intptr_t)workspace)) {
        return NOT_RUN;
    }
    /* All or nothing: what the twin has to look at must not have run in part. The first is filled right before it runs. */
    for (int i = 1; i < variant->launch_count; i++) {
        if (!fill_arguments(&variant->launches[i], frame, workspace, bytes, values)) {
            return NOT_RUN;
        }
    }
    tw_host host = {TW_ABI_VERSION, (int32_t)d->place_value, tw_fork()};
    launch_result result = RAN;
    PyThreadState *state = PyEval_SaveThread();
    if (variant->workspace_zeroed && bytes > 0) {
        memset(workspace, 0, (size_t)bytes);
    }
    for (int i = 0; i < variant->launch_count && result == RAN; i++) {
        const tw_launch *step = &variant->launches[i];
        if (!fill_arguments(step, frame, workspace, bytes, values)) {
            result = NOT_RUN;
        } else if ((*code = ((tw_entry)step->entry)(&host, values)) != 0) {
            result = FAILED;
        }
    }
    PyEval_RestoreThread(state);
    return result;
}

/* Everything before the launch. False: the twin must look at it. */
static bool prepare(const tw_description *d, PyObject *const *args, tw_frame *frame) {
    return tw_unwrap(d, args, frame) && tw_grad_is_off(d, args, frame) && tw_metadata_fits(d, frame) &&
           tw_outputs_are_apart(d, frame) && values_fit(d, frame) && tw_choose(d, frame);
}

static PyObject *call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    bound_call *bound = (bound_call *)self;
    const tw_description *d = &bound->description;
    if (PyVectorcall_NARGS(nargsf) == d->tensor_count && keywords == NULL) {
        tw_frame frame;
        int32_t code = 0;
        if (prepare(d, args, &frame)) {
            if (tw_outputs_are_empty(d, &frame)) {
                return tw_outputs_of(d, args);
            }
            switch (launch(d, &frame, &code)) {
            case RAN:
                return tw_outputs_of(d, args);
            case FAILED:
                return PyObject_CallMethod(bound->twin, "kernel_failed", "i", code);
            case NOT_RUN:
                break;
            }
        }
    }
    return PyObject_Vectorcall(bound->twin, args, nargsf & ~PY_VECTORCALL_ARGUMENTS_OFFSET, keywords);
}

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
    tw_frame frame;
    int32_t code;
    if (repeats < 1 || PyTuple_GET_SIZE(tensors) != d->tensor_count || !prepare(d, items, &frame)) {
        PyErr_SetString(PyExc_ValueError, "stage_times needs tensors that the kernel serves, and at least one repeat");
        return NULL;
    }
    double stage_ns[8];
    int stage = 0;
    bool ok = true;
    TIME_STAGE(tw_unwrap(d, items, &frame));
    TIME_STAGE(tw_grad_is_off(d, items, &frame));
    TIME_STAGE(tw_metadata_fits(d, &frame) && tw_outputs_are_apart(d, &frame));
    TIME_STAGE(values_fit(d, &frame));
    TIME_STAGE(tw_choose(d, &frame));
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

static PyObject *workspace_bytes(PyObject *self, PyObject *sizes) {
    return PyObject_CallMethod(((bound_call *)self)->twin, "workspace_bytes", "(O)", sizes);
}

static PyMethodDef methods[] = {
    {"stage_times", stage_times, METH_VARARGS,
     "stage_times(tensors, repeats) -> mean CPU nanoseconds of each stage of a call."},
    {"workspace_bytes", workspace_bytes, METH_O, "workspace_bytes(sizes) -> bytes of workspace that such a call takes."},
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
