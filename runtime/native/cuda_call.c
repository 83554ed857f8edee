/* A call bound to a CUDA device: unwrap, check, choose, enqueue; the twin of runtime/calls/device.py. Anything out of the
 * ordinary goes there, where it is said what is wrong, the fallback is called, or memory is made. */
#include "cuda_call.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <structmember.h>

#include "cuda_launches.h"
#include "cuda_workspaces.h"
#include "stages.h"

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *twin;
    tw_cuda_place place;
    PyObject *workspaces; /* of cuda_workspaces.h */
    tw_description description;
} cuda_call;

/* The stream on which the library of the tensors works. False: several libraries, or one that does not tell. */
static bool find_stream(const cuda_call *self, const tw_frame *frame, void **stream) {
    const tw_description *d = &self->description;
    const tw_tensor_type *library = NULL;
    for (int i = 0; i < d->tensor_count; i++) {
        if (frame->types[i] == NULL) {
            continue;
        }
        if (library != NULL && frame->types[i]->stream != library->stream) {
            return false;
        }
        library = frame->types[i];
    }
    if (library == NULL || library->stream == NULL) {
        return false;
    }
    if (library->stream(d->device_type, d->device_id, stream) != 0) {
        PyErr_Clear();
        return false;
    }
    return true;
}

static bool find_workspace(const cuda_call *self, tw_frame *frame, tw_ready_call *ready) {
    const tw_variant *variant = frame->variant;
    ready->workspace = 0;
    if (!tw_evaluate(&variant->workspace_bytes, frame->symbols, &ready->workspace_bytes) ||
        ready->workspace_bytes < 0) {
        return false;
    }
    if (ready->workspace_bytes > 0) {
        int32_t device = self->description.device_id;
        ready->workspace = tw_cuda_workspace(self->workspaces, device, ready->stream, ready->workspace_bytes);
        if (ready->workspace == 0) {
            return false;
        }
    }
    return tw_workspace_fits(&self->description, frame, ready->workspace);
}

/* Everything before the driver launches. False: the twin must look at it. */
static bool prepare(const cuda_call *self, PyObject *const *args, tw_frame *frame) {
    const tw_description *d = &self->description;
    return tw_unwrap(d, args, frame) && tw_grad_is_off(d, args, frame) && tw_metadata_fits(d, frame) &&
           tw_outputs_are_apart(d, frame) && tw_choose(d, frame);
}

static bool make_ready(const cuda_call *self, tw_frame *frame, tw_ready_call *ready) {
    return find_workspace(self, frame, ready) && tw_make_ready(&self->place, frame, ready);
}

/* Enqueues without the GIL, for the driver may wait for a place in its queue. */
static int enqueue(const cuda_call *self, const tw_ready_call *ready, int *failed) {
    PyThreadState *state = PyEval_SaveThread();
    int code = tw_enqueue(&self->place, ready, failed);
    PyEval_RestoreThread(state);
    return code;
}

static PyObject *call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    const cuda_call *self = (cuda_call *)object;
    const tw_description *d = &self->description;
    if (PyVectorcall_NARGS(nargsf) == d->tensor_count && keywords == NULL && !tw_cuda_forked()) {
        tw_frame frame;
        tw_ready_call ready;
        if (prepare(self, args, &frame)) {
            if (tw_outputs_are_empty(d, &frame)) {
                return tw_outputs_of(d, args);
            }
            if (find_stream(self, &frame, &ready.stream) && make_ready(self, &frame, &ready)) {
                int failed, code = enqueue(self, &ready, &failed);
                if (code != 0) {
                    long long size = frame.symbols[d->dynamic_symbol];
                    return PyObject_CallMethod(self->twin, "launch_failed", "Lii", size, failed, code);
                }
                return tw_outputs_of(d, args);
            }
        }
    }
    return PyObject_Vectorcall(self->twin, args, nargsf & ~PY_VECTORCALL_ARGUMENTS_OFFSET, keywords);
}

static bool release_gil(void) {
    PyEval_RestoreThread(PyEval_SaveThread());
    return true;
}

static PyObject *stage_times(PyObject *object, PyObject *args) {
    const cuda_call *self = (cuda_call *)object;
    const tw_description *d = &self->description;
    PyObject *tensors;
    Py_ssize_t repeats;
    if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &tensors, &repeats)) {
        return NULL;
    }
    PyObject *const *items = ((PyTupleObject *)tensors)->ob_item;
    tw_frame frame;
    tw_ready_call ready;
    int failed;
    if (repeats < 1 || PyTuple_GET_SIZE(tensors) != d->tensor_count || !prepare(self, items, &frame) ||
        !find_stream(self, &frame, &ready.stream) || !make_ready(self, &frame, &ready)) {
        PyErr_SetString(PyExc_ValueError, "stage_times needs tensors that the kernel serves, and at least one repeat");
        return NULL;
    }
    double stage_ns[8];
    int stage = 0;
    bool ok = true;
    TIME_STAGE(tw_unwrap(d, items, &frame));
    TIME_STAGE(tw_grad_is_off(d, items, &frame));
    TIME_STAGE(tw_metadata_fits(d, &frame) && tw_outputs_are_apart(d, &frame));
    TIME_STAGE(tw_choose(d, &frame));
    TIME_STAGE(find_stream(self, &frame, &ready.stream));
    TIME_STAGE(make_ready(self, &frame, &ready));
    TIME_STAGE(release_gil());
    TIME_STAGE(tw_enqueue(&self->place, &ready, &failed) == 0);
    if (!ok) {
        PyErr_SetString(PyExc_RuntimeError, "a stage failed while it was timed");
        return NULL;
    }
    return Py_BuildValue("{s:d,s:d,s:d,s:d,s:d,s:d,s:d,s:d}", "unwrap", stage_ns[0], "grad", stage_ns[1], "metadata",
                         stage_ns[2], "choose", stage_ns[3], "stream", stage_ns[4], "parameters", stage_ns[5], "gil",
                         stage_ns[6], "driver", stage_ns[7]);
}

/* Addresses of the driver's functions, of the context and more: what runtime/calls/native.py says of a place. */
static int parse_place(PyObject *tuple, cuda_call *self) {
    unsigned long long get_context, set_context, launch, encode_map, set_bytes, context;
    int mends;
    if (!PyArg_ParseTuple(tuple, "KKKKKKp", &get_context, &set_context, &launch, &encode_map, &set_bytes, &context,
                          &mends)) {
        return -1;
    }
    tw_cuda_driver *driver = &self->place.driver;
    driver->get_context = (int (*)(void **))(uintptr_t)get_context;
    driver->set_context = (int (*)(void *))(uintptr_t)set_context;
    driver->launch = (int (*)(const tw_launch_config *, void *, void **, void **))(uintptr_t)launch;
    driver->encode_map = (int (*)(tw_tensor_map *, int, uint32_t, void *, const uint64_t *, const uint64_t *,
                                  const uint32_t *, const uint32_t *, int, int, int, int))(uintptr_t)encode_map;
    driver->set_bytes = (int (*)(uint64_t, unsigned char, size_t, void *))(uintptr_t)set_bytes;
    self->place.context = (void *)(uintptr_t)context;
    self->place.mends_small_maps = mends;
    return 0;
}

static PyObject *cuda_call_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    PyObject *twin, *workspaces, *place, *tuple;
    static char *names[] = {"twin", "workspaces", "place", "description", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO!O!", names, &twin, &workspaces, &PyTuple_Type, &place,
                                     &PyTuple_Type, &tuple)) {
        return NULL;
    }
    if (strcmp(Py_TYPE(workspaces)->tp_name, TW_WORKSPACES) != 0) {
        return PyErr_Format(PyExc_TypeError, "workspaces are no %s", TW_WORKSPACES);
    }
    int error = tw_cuda_watch_forks();
    if (error != 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    cuda_call *self = (cuda_call *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->vectorcall = call;
    self->twin = Py_NewRef(twin);
    self->workspaces = Py_NewRef(workspaces);
    if (parse_place(place, self) != 0 || tw_description_parse(&self->description, tuple) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int cuda_call_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(((cuda_call *)self)->twin);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* No tp_clear: what a call refers to must stay until nothing can call it. The twin breaks reference cycles. */
static void cuda_call_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    tw_description_free(&((cuda_call *)self)->description);
    Py_XDECREF(((cuda_call *)self)->twin);
    Py_XDECREF(((cuda_call *)self)->workspaces);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *binding_of(PyObject *self, void *Py_UNUSED(closure)) {
    return PyObject_GetAttrString(((cuda_call *)self)->twin, "binding");
}

static PyObject *workspace_bytes(PyObject *self, PyObject *sizes) {
    return PyObject_CallMethod(((cuda_call *)self)->twin, "workspace_bytes", "(O)", sizes);
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(cuda_call, vectorcall), READONLY, NULL},
    {"twin", T_OBJECT, offsetof(cuda_call, twin), READONLY, "The pure-Python call with the same launches."},
    {NULL},
};

static PyGetSetDef properties[] = {
    {"binding", binding_of, NULL, "What the call is made of.", NULL},
    {NULL},
};

static PyMethodDef methods[] = {
    {"stage_times", stage_times, METH_VARARGS,
     "stage_times(tensors, repeats) -> mean CPU nanoseconds of each stage of a call."},
    {"workspace_bytes", workspace_bytes, METH_O, "workspace_bytes(sizes) -> bytes of workspace that such a call takes."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "A call bound to a CUDA device: call it with the remaining tensors, in order."},
    {Py_tp_new, cuda_call_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_traverse, cuda_call_traverse},
    {Py_tp_dealloc, cuda_call_dealloc},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "tilewright.runtime._native.CudaCall",
    .basicsize = sizeof(cuda_call),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyObject *tw_cuda_call_type(void) { return PyType_FromSpec(&spec); }
