#include "cuda_workspaces.h"

typedef struct {
    int32_t device;
    uintptr_t stream;
    int64_t address, bytes;
} piece;

typedef struct {
    PyObject_HEAD
    Py_ssize_t count, last; /* most calls use the piece of the call before them */
    piece *pieces;
} workspaces;

static piece *find(workspaces *self, int32_t device, uintptr_t stream) {
    for (Py_ssize_t tried = 0; tried < self->count; tried++) {
        Py_ssize_t at = self->last + tried < self->count ? self->last + tried : self->last + tried - self->count;
        piece *known = &self->pieces[at];
        if (known->stream == stream && known->device == device) {
            self->last = at;
            return known;
        }
    }
    return NULL;
}

int64_t tw_cuda_workspace(PyObject *object, int32_t device, const void *stream, int64_t bytes) {
    const piece *known = find((workspaces *)object, device, (uintptr_t)stream);
    return known != NULL && known->bytes >= bytes ? known->address : 0;
}

static PyObject *keep(PyObject *object, PyObject *args) {
    workspaces *self = (workspaces *)object;
    unsigned long long stream;
    long long address, bytes;
    int device;
    if (!PyArg_ParseTuple(args, "iKLL", &device, &stream, &address, &bytes)) {
        return NULL;
    }
    piece *known = find(self, device, (uintptr_t)stream);
    if (known == NULL) {
        piece *more = PyMem_Realloc(self->pieces, (size_t)(self->count + 1) * sizeof(piece));
        if (more == NULL) {
            return PyErr_NoMemory();
        }
        self->pieces = more;
        known = &self->pieces[self->count++];
    }
    *known = (piece){device, (uintptr_t)stream, address, bytes};
    Py_RETURN_NONE;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyMem_Free(((workspaces *)object)->pieces);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"keep", keep, METH_VARARGS, "keep(device, stream, address, bytes): what calls on that stream use from now on."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Where pieces of memory lie by device and stream; who made them keeps them."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = TW_WORKSPACES,
    .basicsize = sizeof(workspaces),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyObject *tw_cuda_workspaces_type(void) { return PyType_FromSpec(&spec); }
